"""A user's mistakes: one clear line each, before any weight is read."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opsd.cli import main
from megatron_opsd.plan import preflight
from tests.distributed.harness import Ranks
from tests.distributed.runs import opsd

ROOT = Path(__file__).parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arithmetic example with a small data file: arguments that `opsd check` finds no mistake in."""
    folder = tmp_path_factory.mktemp("errors")
    data = folder / "train.jsonl"
    rows = [
        {"problem": "Compute 1+1.", "solution": "2", "answer": "2"},
        {"problem": "", "solution": "3", "answer": "3"},
    ]
    data.write_text(json.dumps(rows[0]))
    (folder / "empty_problem.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    paths = {"model.path": ARITHMETIC / "base", "data.path": data, "evaluate.data.path": data}
    paths["logging.run_dir"] = folder / "run"
    return [str(ARITHMETIC / "opsd.toml"), *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]


def test_none_is_a_word_where_no_none_is_allowed(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", *config, "--objective.clip_mode", "none", "--evaluate.limit", "none", "--world-size", "4"])
    assert capsys.readouterr().out.endswith("no mistakes found\n")


def test_no_mistakes(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", *config, "--world-size", "4"])
    assert capsys.readouterr().out.endswith("no mistakes found\n")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.path", "no/such/model"], ["no/such/model: no such directory", "model.path"]),
        (["--data.path", "no/such.jsonl"], ["data.path = 'no/such.jsonl'", "no such file"]),
        (["--data.solution_column", "proof"], ["data.solution_column = 'proof'", "choose one of answer, problem"]),
        (["--evaluate.data.answer_column", "x"], ["evaluate.data.answer_column = 'x'", "no such column"]),
        (["--parallel.tensor_model_parallel_size", "3"], ["tensor_model_parallel_size = 3", "num_attention_heads = 4"]),
        (["--parallel.tensor_model_parallel_size", "4"], ["tensor_model_parallel_size = 4", "num_key_value_heads = 2"]),
        (["--parallel.pipeline_model_parallel_size", "4"], ["pipeline_model_parallel_size = 4", "3 layers"]),
        (["--parallel.pipeline_model_parallel_size", "3"], ["tensor 2 x pipeline 3", "world size 4"]),
        (["--parallel.tensor_model_parallel_size", "1", "--parallel.sequence_parallel", "true"], ["sequence_parallel"]),
        (
            ["--parallel.expert_model_parallel_size", "2"],
            ["expert_model_parallel_size = 2", "no experts", "set it to 1"],
        ),
        (["--rollout.tensor_model_parallel_size", "3"], ["rollout.tensor_model_parallel_size = 3"]),
        (["--train.global_batch_size", "48"], ["train.global_batch_size = 48", "micro_batch_size = 16", "2 data-par"]),
        (["--train.global_batch_size", "20"], ["micro_batch_size = 16 does not divide train.global_batch_size = 20"]),
        (["--rollout.samples_per_prompt", "5"], ["samples_per_prompt = 5 does not divide train.global_batch_size"]),
        (["--rollout.max_response_tokens", "40960"], ["max_position_embeddings", "rollout.max_response_tokens"]),
        (["--rollout.kv_cache_gib", "0.0001"], ["rollout.kv_cache_gib = 0.0001 is too little", "raise it"]),
        (["--rollout.kv_cache_gib", "100000"], ["rollout.kv_cache_gib = 100000", "free memory", "lower it"]),
        (["--prompts.teacher_template", "{problem}"], ["prompts.teacher_template has no {solution}"]),
        (["--logging.run_dir", f"{__file__}/run"], ["logging.run_dir = ", "cannot write to", __file__]),
        (["--optim.lr", "fast"], ["--optim.lr = 'fast'", "number"]),
        (["--optim.min_lr", "0.1"], ["optim.min_lr = 0.1", "optim.lr"]),
        (["--objective.clip", "inf"], ["--objective.clip = inf", "finite"]),
        (["--method.context", "shuffled", "--rollout.samples_per_prompt", "32"], ["shuffled", "two problems"]),
        (["--objective.beta", "1.5"], ["--objective.beta = 1.5", "less than 1"]),
        (["--method.kind", "ppo"], ["method.kind = 'ppo'", "opsd, grpo, star, sft, distill"]),
        (["--method.kind", "grpo"], ["'grpo' compares responses", "rollout.samples_per_prompt to 2 or more"]),
        (
            ["--method.kind", "grpo", "--rollout.samples_per_prompt", "4", "--rollout.top_k", "20"],
            ["method.kind = 'grpo' is biased", "rollout.top_k = -1", "allow_biased_sampling"],
        ),
        (["--method.kind", "star", "--teacher.kind", "live"], ["'star' has no teacher", "remove"]),
        (["--method.kind", "star", "--objective.importance_cap", "2.0"], ["importance_cap needs", "remove it"]),
        (
            ["--method.kind", "distill", "--method.responses", "data", "--rollout.samples_per_prompt", "2"],
            ["samples nothing", "samples_per_prompt"],
        ),
        (["--method.context", "sibling"], ["'sibling' shows another", "rollout.samples_per_prompt to 2 or more"]),
        (
            ["--method.kind", "sft", "--objective.temperature", "1.1"],
            ["method.kind = 'sft' learns log-likelihoods", "objective.temperature = 1.1", "set it to 1.0"],
        ),
        (
            ["--rollout.samples_per_prompt", "4", "--rollout.temperature", "0"],
            ["rollout.temperature = 0 writes the same response 4 times", "rollout.samples_per_prompt = 1"],
        ),
        (["--method.no_sibling", "skip"], ["method.no_sibling is for method.context = 'sibling'", "remove"]),
        (
            ["--objective.entropy_share", "0.5", "--objective.normalization", "sequence"],
            ["objective.entropy_share needs objective.normalization = 'token' or 'constant'"],
        ),
        (["--objective.entropy_share", "0.0"], ["--objective.entropy_share = 0.0", "greater than 0"]),
        (["--train.curriculum.window", "1.5"], ["--train.curriculum.window = 1.5", "less than or equal to 1"]),
        (
            ["--method.kind", "sft", "--train.curriculum.window", "0.5"],
            ["method.kind = 'sft'", "train.curriculum goes by the student's answers", "remove"],
        ),
        (["--data.difficulty_column", "carries"], ["data.difficulty_column is for train.curriculum", "remove"]),
        (["--method.kind", "sft", "--method.context", "answer"], ["--method.context", "'sft' has no such setting"]),
        (["--method.rationalize", "false"], ["'opsd' has no such setting, 'star' has", "set method.kind = 'star'"]),
        (["--method.contxt", "answer"], ["--method.contxt: unknown option", "--method.context"]),
        (["--method.train_on", '["rite"]'], ["method.train_on.0 = 'rite'", "'right'"]),
        (["--method.train_on", "[]"], ["method.train_on = []", "name a grade"]),
        (["--method.kind", "sft", "--teacher.kind", "ema"], ["'sft' has no teacher", "remove"]),
        (["--method.kind", "sft", "--rollout.samples_per_prompt", "2"], ["samples nothing", "samples_per_prompt"]),
        (["--teacher.kind", "live", "--method.context", "nothing"], ["compares the student with itself"]),
        (["--teacher.kind", "live", "--teacher.placement", "offload"], ["no weights of its own", "teacher.placement"]),
        (["--teacher.ema_decay", "1.0"], ["--teacher.ema_decay = 1.0", "less than or equal to 0.9999"]),
        (["--objective.importance_cap", "2.0"], ["importance_cap needs method.loss = 'sampled_token'", "remove it"]),
        (
            ["--method.loss", "sampled_token", "--rollout.temperature", "1.1"],
            ["is biased", "rollout.temperature = 1.0", "allow_biased_sampling"],
        ),
        (["--prompts.answer_template", "{problem}"], ["prompts.answer_template has no {answer}"]),
    ],
)
def test_check_says_it_in_one_line(
    config: list[str], overrides: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", *config, "--world-size", "4", *overrides])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("opsd: ")
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--parallel.expert_model_parallel_size", "3"], ["expert_model_parallel_size = 3", "num_experts = 8"]),
        (["--parallel.expert_model_parallel_size", "8"], ["expert_model_parallel_size = 8", "pipeline stage = 4"]),
        ([], ["parallel.sequence_parallel = false", "tensor_model_parallel_size = 2", "set it to true"]),
        (["--rollout.tensor_model_parallel_size", "2"], ["rollout.tensor", "moe_intermediate_size = 25"]),
    ],
)
def test_layouts_of_experts(
    config: list[str], overrides: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "experts"
    shutil.copytree(ARITHMETIC / "base", model)
    file = model / "config.json"
    moe = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 25}
    moe["architectures"] = ["Qwen3MoeForCausalLM"]
    file.write_text(json.dumps(json.loads(file.read_text()) | moe))
    test_check_says_it_in_one_line(config, ["--model.path", str(model), *overrides], expected, capsys)


def mistake(arguments: list[str]) -> str:
    """The one line that ``opsd train`` on one rank says behind its greeting."""
    with Ranks(opsd, 1, ["train", *arguments]) as ranks:
        statuses, output = ranks.finish(timeout=120), ranks.output()
    assert statuses == [2], output
    lines = [line for line in output.splitlines() if line and not line.startswith("loading ")]
    assert len(lines) == 1, output
    return lines[0]


ONE_RANK = ["--parallel.tensor_model_parallel_size", "1"]


def test_port_in_use(config: list[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "megatron_opsd", "train", *config, *ONE_RANK],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line == f"opsd: MASTER_PORT={port}: the port is in use on 127.0.0.1; set MASTER_PORT to a free one"


def run(config: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "train", *config, "--model.path", "no/such/model"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


LINE = "opsd: no/such/model: no such directory; model.path must be a local Hugging Face checkpoint"


def test_ranks_of_this_machine_say_it_once(config: list[str]) -> None:
    done = run([*config, "--nproc", "2"], "megatron_opsd")
    assert done.returncode == 2
    assert done.stderr == f"{LINE}\n"
    assert done.stdout == ""


def test_torchruns_report_ends_with_it(config: list[str]) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m"]
    done = run(config, *launcher, "megatron_opsd")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines.count(LINE) == 1
    assert lines[-2].strip() == f"traceback : {LINE}"  # the last one is torchrun's rule


def test_row_without_a_problem(config: list[str]) -> None:
    bad = str(Path(config[4]).with_name("empty_problem.jsonl"))
    line = mistake([*config, *ONE_RANK, "--data.path", bad])
    assert f"{bad}:2: column 'problem' is empty" in line


def test_vllm_not_installed(config: list[str], tmp_path: Path) -> None:
    """Really absent: the interpreter sees every installed package but vLLM."""
    import pydantic

    packages = Path(pydantic.__file__).parents[1]
    for entry in packages.iterdir():
        if not entry.name.startswith(("vllm", "__editable__")):
            (tmp_path / entry.name).symlink_to(entry)
    code = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]; "
    code += f"from megatron_opsd.cli import main; main({['train', *config, *ONE_RANK]!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("opsd: vllm is not installed")
    assert len(done.stderr.splitlines()) == 1


def test_truncated_weights(config: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(ARITHMETIC / "base", broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    line = mistake([*config, *ONE_RANK, "--model.path", str(broken)])
    assert "model.safetensors: not a readable safetensors file" in line


def test_a_run_directory_that_anybody_may_write_to(config: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "open"
    run_dir.mkdir()
    run_dir.chmod(0o777)
    with pytest.raises(SystemExit, match="2"):
        main(["check", *config, "--logging.run_dir", str(run_dir)])
    run_dir.chmod(0o775)
    main(["check", *config, "--logging.run_dir", str(run_dir)])


def test_a_run_directory_with_checkpoints(config: list[str], tmp_path: Path) -> None:
    """A new run, or one that goes back, never mixes its checkpoints with later ones."""
    for step in (10, 20):
        path = tmp_path / "checkpoints" / f"step_{step:06d}"
        path.mkdir(parents=True)
        (path / "progress.json").write_text(json.dumps({"step": step, "sampler": {}, "teacher": "", "meaning": {}}))
    arguments = [*config, *ONE_RANK, "--logging.run_dir", str(tmp_path)]
    assert "--checkpoint.resume auto" in mistake(arguments)
    back = mistake([*arguments, "--checkpoint.resume", str(tmp_path / "checkpoints" / "step_000010")])
    assert "newer" in back
    assert "--logging.run_dir" in back


@pytest.mark.parametrize("error", ["ImportError", "OSError", "AssertionError"])
def test_a_transformer_engine_that_cannot_be_loaded(
    error: str, config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a GPU; without one it is not needed, and `opsd check` says nothing of it."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "fp8.py").write_text(f"raise {error}('libcudart.so.13: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)  # put back as it was when the test ends
        monkeypatch.delitem(sys.modules, name)
    main(["check", *config])
    monkeypatch.setattr(preflight, "_has_gpu", lambda: True)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["check", *config])
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformer-engine is installed but cannot be loaded (libcudart.so.13: cannot open shared object" in line
    assert "pip uninstall it" in line
