"""Responses that the run's first weights wrote with the solution in sight, kept in the run's folder."""

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_opsd.errors import UserError
from megatron_opsd.files import excerpt
from megatron_opsd.methods.answers import Writer
from megatron_opsd.model.parallel import on_rank_0
from megatron_opsd.reliability.run_dir import RunDir, complete_lines
from megatron_opsd.rollout.engine import sample_seed
from megatron_opsd.types import Example, Rollout

BLOCK = 256  # problems between two writes to the disk

_Response = tuple["array[int]", str]  # token ids, compact; finish reason


class WrittenResponses:
    """``rollout.samples_per_prompt`` responses to each problem, written once and read again by a run that goes on.

    The first line of the file says with which settings. Raises `UserError` where these are others now.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, config = writer, writer.config
        self._k, self._seed = config.rollout.samples_per_prompt, config.train.seed
        self._file = RunDir(config.logging.run_dir).written
        prompts, rollout = config.prompts, config.rollout
        self._settings: dict[str, Any] = {
            "train.seed": config.train.seed,
            "prompts.teacher_template": prompts.teacher_template,
            "prompts.student_thinking": prompts.student_thinking,
            **{
                f"rollout.{name}": getattr(rollout, name)
                for name in ("max_response_tokens", "temperature", "top_p", "top_k", "samples_per_prompt")
            },
        }
        self._responses: dict[int, list[_Response]] | None = None

    def missing(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the problems that have no responses yet, each once; collective at first."""
        if self._responses is None:
            self._responses = on_rank_0(self._read)
        found = {example.index: example for example in examples if example.index not in self._responses}
        return list(found.values())

    def write(self, examples: Sequence[Example], should_abort: Callable[[], bool]) -> None:
        """Let the engine answer these problems; collective. Raises StepAbortedError as the engine does."""
        assert self._responses is not None
        k = self._k
        repeated = [example for example in examples for _ in range(k)]
        asked = [self._writer.prompts.with_solution(example) for example in repeated]
        # By problem, not by place: a problem has the same responses whatever else is asked.
        seeds = [sample_seed(self._seed, 0, example.index * k + i % k) for i, example in enumerate(repeated)]
        rollouts, grades = self._writer.write(repeated, asked, seeds, should_abort)
        records = [
            {"index": example.index, "token_ids": x.token_ids, "finish_reason": x.finish_reason, "grade": grade}
            for example, x, grade in zip(repeated, rollouts, grades, strict=True)
        ]
        self._take(records)
        if dist.get_rank() == 0:
            is_new = not self._file.exists()
            with self._file.open("a") as file:
                if is_new:
                    file.write(json.dumps(self._settings) + "\n")
                file.writelines(json.dumps(record) + "\n" for record in records)

    def read(self, example: Example, step: int) -> list[Rollout]:
        """The responses to a problem, as a method of ``step`` takes them."""
        assert self._responses is not None
        return [Rollout(ids.tolist(), [], reason, step) for ids, reason in self._responses[example.index]]

    def _take(self, records: Sequence[dict[str, Any]]) -> None:
        assert self._responses is not None
        for record in records:
            response = array("i", record["token_ids"]), record["finish_reason"]
            self._responses.setdefault(record["index"], []).append(response)

    def _read(self) -> dict[int, list[_Response]]:
        """What the file holds, without a problem that a killed run has left half-written."""
        lines = complete_lines(self._file)
        if not lines:
            self._file.unlink(missing_ok=True)
            return {}
        settings, *records = map(json.loads, lines)
        for name, now in self._settings.items():
            if settings.get(name) != now:
                raise UserError(
                    f"{self._file}: was written with {name} = {excerpt(settings.get(name))}, which now is "
                    f"{excerpt(now)}; give the first value, or choose another --logging.run_dir"
                )
        self._responses = {}
        self._take(records)
        whole = {index: found for index, found in self._responses.items() if len(found) == self._k}
        kept = [line for line, record in zip(lines[1:], records, strict=True) if record["index"] in whole]
        self._file.write_text("".join([lines[0], *kept]))
        return whole
