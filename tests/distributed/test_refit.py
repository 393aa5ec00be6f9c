"""A refit that goes wrong stops the run and says what happened; one that goes right is exact, whatever its buckets."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opsd.config import Config
from megatron_opsd.config_file import load_config
from megatron_opsd.data.datasets import read_examples
from megatron_opsd.data.prompts import build_prompts
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.model import parallel
from megatron_opsd.rollout.engine import Sampling
from megatron_opsd.rollout.refit import RefitError, refit
from megatron_opsd.telemetry.metrics import Clock
from megatron_opsd.trainer import Trainer
from megatron_opsd.weights.export import Exporter

from .command_line import ARITHMETIC, Torchrun, write_problems
from .harness import run_distributed

VICTIM = "model.layers.1.mlp.up_proj.weight"
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8] * 50]


class Damaged:
    """An exporter whose stream is damaged on the way."""

    def __init__(self, exporter: Exporter, damage: str) -> None:
        self.table, self.checksums = exporter.table, exporter.checksums
        self._exporter, self._damage = exporter, damage

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._exporter:
            if name == VICTIM and self._damage == "drop":
                continue
            if name == VICTIM and self._damage == "corrupt":
                tensor = tensor.clone()
                tensor[3] += 0.5
            if name == VICTIM and self._damage == "raise on rank 1" and dist.get_rank() == 1:
                print(f"raising at {time.time()}", flush=True)
                raise OSError("the disk of rank 1 is gone")
            yield name, tensor


def arithmetic(run_dir: str) -> Config:
    return load_config(
        str(ARITHMETIC / "opsd.toml"),
        {
            "model.path": str(ARITHMETIC / "base"),
            "data.path": str(Path(run_dir) / "data" / "train.jsonl"),
            "logging.run_dir": run_dir,
            "train.global_batch_size": "4",
            "train.micro_batch_size": "2",
            "data.max_problem_tokens": "160",  # room for a prompt longer than a block of the prefix cache
            "rollout.max_response_tokens": "16",
            "rollout.kv_cache_gib": "0.1",
        },
    )


def build(run_dir: str) -> Trainer:
    config = arithmetic(run_dir)
    layout, prompts = parallel.initialize(config.parallel, seed=0), build_prompts(config)
    return Trainer(config, layout, prompts, Sampler(read_examples(config.data, prompts.tokenizer), seed=0))


def worker(run_dir: str) -> None:
    trainer = build(run_dir)

    def answers() -> list[list[int]]:
        rollouts = trainer.engine.generate(PROMPTS, Sampling(8, temperature=0.0), [0, 0])
        return [rollout.token_ids for rollout in rollouts]

    wanted = answers()
    with torch.no_grad():  # move the weights away and back, so that a refit must change something twice
        kept = [parameter.clone() for parameter in trainer.student.model_chunks.parameters()]
        for parameter in trainer.student.model_chunks.parameters():
            parameter.mul_(0.5)
        refit(trainer.exporter, trainer.engine, 1, verify=True)
        assert answers() != wanted
        for parameter, old in zip(trainer.student.model_chunks.parameters(), kept, strict=True):
            parameter.copy_(old)
    layout = trainer.layout
    groups = layout.tp_group, layout.pp_group, layout.ep_group
    for bucket_bytes in (1, 100_000):  # one tensor at a time, and edges inside layers
        exporter = Exporter(trainer.student.model_chunks, trainer.table, *groups, bucket_bytes)
        refit(exporter, trainer.engine, 2, verify=True)
        assert answers() == wanted

    with pytest.raises(RefitError, match=f"{re.escape(VICTIM)} arrived with other contents"):
        refit(Damaged(trainer.exporter, "corrupt"), trainer.engine, 3, verify=True)
    with pytest.raises(AssertionError, match="refit before"):
        answers()  # half-refitted weights write nothing
    with pytest.raises(RefitError, match=f"1 of 35 tensors did not arrive, first {re.escape(VICTIM)}"):
        refit(Damaged(trainer.exporter, "drop"), trainer.engine, 3, verify=False)
    refit(trainer.exporter, trainer.engine, 3, verify=True)
    assert answers() == wanted

    # Without checksums the log-probs of the next step tell.
    refit(Damaged(trainer.exporter, "corrupt"), trainer.engine, 0, verify=False)
    with pytest.raises(RefitError, match=r"log-probs differ from the student's by .* does not hold weights 0"):
        trainer.step(Clock(lambda _: None), lambda: False)
    trainer.engine.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("refit")
    write_problems(path / "data", rows=64)
    return str(path)


def test_damage_is_found_and_named(run_dir: str) -> None:
    run_distributed(worker, 2, run_dir)


def test_one_ranks_failure_ends_all_within_seconds(run_dir: str) -> None:
    """Rank 0 waits in a collective that rank 1 never joins."""
    script = f"from tests.distributed.test_refit import fail_on_rank_1; fail_on_rank_1({run_dir!r})"
    with Torchrun(2, "--no-python", sys.executable, "-c", script) as run:
        statuses, ended = run.finish(timeout=240), time.time()
        output = run.output()
    assert statuses != [0]
    raised = re.search(r"raising at ([\d.]+)", output)
    assert raised, output
    assert ended - float(raised[1]) < 15
    assert "OSError: the disk of rank 1 is gone" in output


def fail_on_rank_1(run_dir: str) -> None:
    trainer = build(run_dir)
    refit(Damaged(trainer.exporter, "raise on rank 1"), trainer.engine, 1, verify=True)  # type: ignore[arg-type]
