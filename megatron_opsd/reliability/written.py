"""The file of responses that a run's first weights wrote before its first step. Without torch: it is checked early."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.files import excerpt, parse_json
from megatron_opsd.reliability.run_dir import RunDir, complete_lines
from megatron_opsd.types import Example, Grade, Rollout

Responses = dict[str, list[tuple["array[int]", str]]]  # by problem: token ids, compact, and the finish reason


class _Record(BaseModel):
    """A response in its file."""

    model_config = ConfigDict(extra="forbid")

    problem: str
    token_ids: list[int]
    finish_reason: str
    grade: Grade


class WrittenFile:
    """``rollout.samples_per_prompt`` responses to each problem. The first line says with which settings.

    Raises `UserError` where these are others now, or a line is damaged.
    """

    def __init__(self, config: Config) -> None:
        self._file = RunDir(config.logging.run_dir).written
        self._k = config.rollout.samples_per_prompt
        names = ("max_response_tokens", "temperature", "top_p", "top_k", "samples_per_prompt")
        self._settings: dict[str, Any] = {
            "train.seed": config.train.seed,
            "prompts.teacher_template": config.prompts.teacher_template,
            "prompts.student_thinking": config.prompts.student_thinking,
            **{f"rollout.{name}": getattr(config.rollout, name) for name in names},
        }

    def check(self) -> None:
        """Check the settings of the file, if there is one."""
        if lines := complete_lines(self._file):
            settings = parse_json(lines[0], f"{self._file}:1")
            for name, now in self._settings.items():
                before = settings.get(name) if isinstance(settings, dict) else None
                if before != now:
                    raise UserError(
                        f"{self._file}: was written with {name} = {excerpt(before)}, which now is {excerpt(now)}; give "
                        "the first value, or choose another --logging.run_dir"
                    )

    def read(self) -> Responses:
        """What is there. A problem that a killed run has left half-written is taken out of the file."""
        self.check()
        lines = complete_lines(self._file)
        if not lines:
            self._file.unlink(missing_ok=True)
            return {}
        records = [self._parse(number, line) for number, line in enumerate(lines[1:], start=2)]
        found: Responses = {}
        for record in records:
            found.setdefault(record.problem, []).append((array("i", record.token_ids), record.finish_reason))
        whole = {problem: responses for problem, responses in found.items() if len(responses) == self._k}
        kept = [line for line, record in zip(lines[1:], records, strict=True) if record.problem in whole]
        self._file.write_text("".join([lines[0], *kept]))
        return whole

    def append(self, examples: Sequence[Example], rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """Add the responses to some problems."""
        lines = [] if self._file.exists() else [json.dumps(self._settings)]
        for example, rollout, grade in zip(examples, rollouts, grades, strict=True):
            record = _Record(
                problem=digest(example), token_ids=rollout.token_ids, finish_reason=rollout.finish_reason, grade=grade
            )
            lines.append(record.model_dump_json())
        with self._file.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def _parse(self, number: int, line: str) -> _Record:
        try:
            return _Record.model_validate_json(line)
        except ValidationError:
            raise UserError(
                f"{self._file}:{number}: is no response that a run has written; delete the file, and its responses are "
                "written again"
            ) from None


def digest(example: Example) -> str:
    """Identifies a problem and its solution, wherever they are in the data."""
    return hashlib.sha256(json.dumps([example.problem, example.solution]).encode()).hexdigest()[:16]
