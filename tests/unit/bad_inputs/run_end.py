"""Going on from a checkpoint with settings that would make it another training, or from none."""

from . import Bad, Inputs

AUTO = {"checkpoint.resume": "auto"}


def changed(what: str, setting: str, value: str, before: str, now: str) -> Bad:
    """A row in which one setting differs from that of the checkpoint."""
    says = ["step_000002", f"{setting}: {before}", f" -> {now}", "--checkpoint.allow_changes true", "--logging.run_dir"]
    return Bad(what, says, Inputs.earlier_run, AUTO | {setting: value})


def not_complete(inputs: Inputs) -> None:
    (inputs.earlier_run() / "progress.json").unlink()


ROWS = [
    changed("another kind of divergence", "objective.kind", "reverse_kl", "'forward_kl'", "'reverse_kl'"),
    changed("another beta", "objective.beta", "0.3", "0.5", "0.3"),
    changed("another temperature", "objective.temperature", "2.0", "1.0", "2.0"),
    changed("another way to clip", "objective.clip_mode", "none", "'saturate'", "'none'"),
    changed("another clip", "objective.clip", "0.5", "0.05", "0.5"),
    changed("another mean", "objective.normalization", "sequence", "'token'", "'sequence'"),
    changed("another context", "method.context", "answer", "'solution'", "'answer'"),
    changed(
        "other responses", "method.train_on", '["right"]', "['right', 'wrong', 'unfinished', 'unknown']", "['right']"
    ),
    changed("another teacher", "teacher.kind", "live", "'frozen'", "'live'"),
    changed("a teacher that thinks", "prompts.teacher_thinking", "true", "False", "True"),
    changed("another prompt", "prompts.student_template", "{problem}!", "'Problem: {problem}", "'{problem}!'"),
    changed("a prefix", "prompts.teacher_prefix", "<think>", "None", "'<think>'"),
    changed("other tokens skipped", "prompts.skip_first_tokens", "2", "0", "2"),
    changed("another seed", "train.seed", "5", "0", "5"),
    Bad(
        "an average that the checkpoint does not have",
        ["teacher.kind = 'ema'", "step_000002", "start a new run"],
        Inputs.earlier_run,
        AUTO | {"teacher.kind": "ema", "checkpoint.allow_changes": "true"},
    ),
    Bad(
        "a new run in the folder of an earlier one",
        ["logging.run_dir", "holds an earlier run (checkpoints)", "--checkpoint.resume auto"],
        Inputs.earlier_run,
    ),
    Bad(
        "a checkpoint that is none",
        ["run/checkpoints/step_000002", "not a complete checkpoint"],
        not_complete,
        {"checkpoint.resume": "{folder}/run/checkpoints/step_000002"},
    ),
    Bad("no such checkpoint", ["nowhere", "not a complete checkpoint"], settings={"checkpoint.resume": "nowhere"}),
    Bad(
        "back to an earlier step in the same folder",
        ["newer than", "step_000002", "--logging.run_dir"],
        lambda i: (i.earlier_run(4), i.earlier_run(2)),
        {"checkpoint.resume": "{folder}/run/checkpoints/step_000002"},
    ),
    Bad(
        "half a progress.json",
        ["progress.json", "not valid JSON"],
        lambda i: i.write("run/checkpoints/step_000002/progress.json", '{"step": '),
        AUTO,
    ),
    Bad(
        "a progress.json of something else",
        ["progress.json", "resume from another checkpoint"],
        lambda i: i.write("run/checkpoints/step_000002/progress.json", '{"epoch": 3}'),
        AUTO,
    ),
    Bad(
        "steps that are text",
        ["progress.json", "step = '2'", "resume from another checkpoint"],
        lambda i: (i.earlier_run(), i.change("run/checkpoints/step_000002/progress.json", step="2")),
        AUTO,
    ),
    Bad(
        "no settings to compare with",
        ["progress.json", "meaning = None"],
        lambda i: i.earlier_run(2, meaning=None),
        AUTO,
    ),
    Bad(
        "the newest by another name",
        ["latest", "not a complete checkpoint", "auto"],
        settings={"checkpoint.resume": "latest"},
    ),
    Bad(
        "a trained model without checkpoints",
        ["run/hf", "there are no checkpoints to go on from"],
        lambda i: i.write("run/hf/config.json", "{}"),
        AUTO,
    ),
]
