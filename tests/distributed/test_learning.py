"""On one batch that stays the same the student becomes its teacher, by every objective that a recipe may name."""

from pathlib import Path

import fixed_batch

from megatron_opsd.config_file import load_config
from megatron_opsd.objective import Divergence

from .command_line import ARITHMETIC, write_problems
from .engine import TransformersEngine
from .harness import run_distributed

RECOMMENDED = [
    *(Divergence(kind) for kind in fixed_batch.KINDS),
    *(Divergence(kind, clip=0.05, clip_mode="saturate") for kind in fixed_batch.KINDS),
]
DRIVEN_AWAY = Divergence("forward_kl", clip=0.05, clip_mode="entry")


def learn_one_batch(folder: Path) -> None:
    overrides = {
        "data.path": str(folder / "data" / "train.jsonl"),
        "parallel.tensor_model_parallel_size": "1",
        "optim.lr": "3e-4",
        "optim.warmup_steps": "0",
        "train.steps": "60",
        "train.global_batch_size": "8",
        "train.micro_batch_size": "8",
    }
    config = load_config(str(ARITHMETIC / "opsd.toml"), overrides)
    fixed_batch.build_engine = TransformersEngine  # type: ignore[assignment]
    fixed_batch.write(config, folder / "batch.jsonl")
    study = fixed_batch.Study(config, folder / "batch.jsonl")
    for divergence in [*RECOMMENDED, DRIVEN_AWAY]:
        study.student.token_loss = divergence
        first, *_, last = fixed_batch.learn(study)
        what = f"{divergence}: from {first} to {last}"
        if divergence == DRIVEN_AWAY:  # so that this test can tell
            assert last["divergence"] > first["divergence"], what
            continue
        assert last["divergence"] < 0.2 * first["divergence"], what
        assert last["agreement"] > 0.99, what
        assert abs(last["entropy_student"] - last["entropy_teacher"]) < 0.01, what


def test_a_fixed_batch_is_learnt_with_every_recommended_objective(tmp_path: Path) -> None:
    write_problems(tmp_path / "data")
    run_distributed(learn_one_batch, 1, tmp_path)
