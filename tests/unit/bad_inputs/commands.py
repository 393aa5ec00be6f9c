"""The configuration, and options of the commands."""

from . import Bad


def settings(what: str, says: list[str], *options: str, command: str = "check") -> Bad:
    return Bad(what, says, command=(command, *options))


def toml(what: str, contents: str | bytes, *says: str) -> Bad:
    return Bad(what, ["{folder}/run.toml", *says], lambda i: i.write("run.toml", contents))


ROWS = [
    toml("utf-16", "a = 1".encode("utf-16"), "UTF-16", "save it as UTF-8"),
    toml("latin-1", b"# 1\n# \xe9\n", "not UTF-8", "line 2"),
    toml("a zero byte", b"a = 1\x00", "not valid TOML"),
    toml("nested too deeply", "a = " + "[" * 9000, "nested too deeply"),
    toml("half a line", "[model]\npath = ", "not valid TOML"),
    toml("nothing", "", "model.path: missing", "--model.path"),
    toml("a value for a section", "model = 3\n", "model = 3"),
    settings("a number of ranks below one", ["--nproc = 0", "at least 1"], "--nproc", "0", command="train"),
    settings("no number of ranks", ["--nproc", "'two'", "opsd train --help"], "--nproc", "two", command="train"),
    Bad(
        "ranks twice",
        ["--nproc = 2", "torchrun has started ranks already"],
        command=("train", "--nproc", "2"),
        environment={"RANK": "0"},
    ),
    Bad(
        "a folder for the responses",
        ["--out = {folder}/model", "is a folder", "name a file in it"],
        command=("evaluate", "--out", "{folder}/model"),
    ),
    Bad(
        "responses in place of the problems",
        ["--out = {folder}/test.jsonl", "exists already", "name another file"],
        command=("evaluate", "--out", "{folder}/test.jsonl"),
    ),
    Bad(
        "responses below a file",
        ["--out = ", "run.toml", "Not a directory", "choose another folder"],
        command=("evaluate", "--out", "{folder}/run.toml/out.jsonl"),
    ),
    settings("the kernel's files", ["--out", "/proc"], "--out", "/proc/out.jsonl", command="evaluate"),
    Bad(
        "nothing to evaluate on",
        ["evaluate.data.path is missing", "--evaluate.data.path"],
        lambda i: i.write("run.toml", "\n".join(x for x in i.toml.read_text().splitlines() if "test.jsonl" not in x)),
        command=("evaluate",),
    ),
    settings("a port that is none", ["--port = 70000", "between 1 and 65535"], "--port", "70000", command="serve"),
    settings("port 0", ["--port = 0", "between 1 and 65535"], "--port", "0", command="serve"),
    settings("a server for all", ["--host 0.0.0.0", "OPSD_API_KEY"], "--host", "0.0.0.0", command="serve"),
    Bad(
        "no such host",
        ["--host 256.1.1.1 --port 8123", "cannot listen", "name another"],
        command=("serve", "--host", "256.1.1.1", "--port", "8123"),
        environment={"OPSD_API_KEY": "a secret"},
    ),
    settings("a learning rate by meaning", ["--learning_rate", "is --optim.lr"], "--learning_rate", "1"),
    settings("in another section", ["--train.lr: unknown option", "is --optim.lr"], "--train.lr", "1"),
    settings("tp", ["--tp", "is --parallel.tensor_model_parallel_size"], "--tp", "2"),
    settings("dashes", ["is --rollout.max_response_tokens"], "--rollout.max-new-tokens", "2"),
    settings("a misspelt setting", ["--optim.lrr", "is --optim.lr"], "--optim.lrr", "1"),
    settings("a misspelt option", ["--world-sise", "is --world-size"], "--world-sise", "1"),
    settings("no section to explain", ["--help optimizer", "optim", "evaluate"], "--help", "optimizer"),
    settings("no command", ["invalid choice: 'chek'", "opsd --help"], command="chek"),
    Bad(
        "a name by meaning in the file",
        ["run.toml: optim.learning_rate: unknown key", "is optim.lr"],
        lambda i: i.write("run.toml", i.toml.read_text().replace("warmup_steps = 0", "learning_rate = 1.0")),
    ),
    Bad(
        "a section by another name",
        ["run.toml: training: unknown key", "is train"],
        lambda i: i.write("run.toml", i.toml.read_text() + "[training]\nsteps = 1\n"),
    ),
    settings("text for a number", ["--optim.lr = 'fast'", "number"], "--optim.lr", "fast"),
    settings("a number for text", ["--model.dtype = 16", "'bfloat16' or 'float32'"], "--model.dtype", "16"),
    settings("half a step", ["--train.steps = 1.5", "integer"], "--train.steps", "1.5"),
    settings("a word for yes", ["--checkpoint.export_hf = 'yes'", "boolean"], "--checkpoint.export_hf", "yes"),
    settings(
        "no GPU",
        ["--nodes = 0", "greater than 0"],
        *["--nodes", "0", "--gpus-per-node", "8", "--gpu-memory-gib", "80"],
        command="plan",
    ),
    settings(
        "no memory",
        ["--gpu-memory-gib = -1.0"],
        *["--nodes", "1", "--gpus-per-node", "8", "--gpu-memory-gib", "-1"],
        command="plan",
    ),
    settings(
        "a cluster that nobody has",
        ["--nodes 100000 x --gpus-per-node 8", "65536 GPUs", "name fewer"],
        *["--nodes", "100000", "--gpus-per-node", "8", "--gpu-memory-gib", "80"],
        command="plan",
    ),
    settings(
        "endless memory",
        ["--gpu-memory-gib = inf", "finite"],
        *["--nodes", "1", "--gpus-per-node", "8", "--gpu-memory-gib", "inf"],
        command="plan",
    ),
    settings("a word too many", ["extra: not expected here"], "extra"),
    settings(
        "endless batches", ["global_batch_size", "less than 2147483648"], "--train.global_batch_size", "4" + "0" * 15
    ),
    settings("a seed of many digits", ["--train.seed", "less than"], "--train.seed", str(2**62)),
    settings("an age to wait", ["timeout_minutes"], "--parallel.timeout_minutes", "1000000000000"),
    settings("a temperature of nothing", ["objective.temperature", "0.01"], "--objective.temperature", "1e-300"),
    settings("half a cluster", ["required", "--gpus-per-node", "opsd plan --help"], "--nodes", "1", command="plan"),
]
