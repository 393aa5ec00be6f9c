"""The file of responses that a run's first weights wrote before its first step. Without torch: it is checked early."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_opsd.config import Config
from megatron_opsd.errors import UserError
from megatron_opsd.files import excerpt, parse_json
from megatron_opsd.reliability.run_dir import RunDir, complete_lines
from megatron_opsd.types import Example, Grade, Rollout

Responses = dict[str, list["Response"]]  # by problem
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each file of weights, to tell models apart


class Response(NamedTuple):
    """A response, compact."""

    token_ids: "array[int]"
    finish_reason: str
    grade: Grade


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
        self._model = Path(config.model.path)

    def check(self) -> None:
        """Check the settings and the model of the file, if there is one."""
        if not self._file.exists():
            return
        with self._file.open(errors="replace") as lines:
            first = next(lines, "")
        if not first.endswith("\n"):  # a run was killed before it wrote anything
            return
        settings = parse_json(first, f"{self._file}:1")
        for name, now in self._identity().items():
            before = settings.get(name) if isinstance(settings, dict) else None
            if before != now:
                raise UserError(
                    f"{self._file}: was written with {name} = {excerpt(before)}, which now is {excerpt(now)}; give the "
                    "first value, or choose another --logging.run_dir"
                )

    def _identity(self) -> dict[str, Any]:
        return self._settings | {"the model": fingerprint(self._model)}

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
            response = Response(array("i", record.token_ids), record.finish_reason, record.grade)
            found.setdefault(record.problem, []).append(response)
        whole = {problem: responses for problem, responses in found.items() if len(responses) == self._k}
        kept = [line for line, record in zip(lines[1:], records, strict=True) if record.problem in whole]
        text = "".join([lines[0], *kept])
        if len(text.encode()) != self._file.stat().st_size:
            staging = self._file.with_name(f".{self._file.name}")
            staging.write_text(text)
            staging.rename(self._file)
        return whole

    def append(self, examples: Sequence[Example], rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """Add the responses to some problems."""
        lines = [] if self._file.exists() else [json.dumps(self._identity())]
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


def fingerprint(model: Path) -> str:
    """Tells models apart without reading all of them: config, tokenizer, and a few bytes of the weights."""
    found = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        found.update((model / name).read_bytes() if (model / name).exists() else b"")
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            for sample in range(SAMPLES):
                weights.seek(size * sample // SAMPLES)
                found.update(weights.read(SAMPLE_BYTES))
    return found.hexdigest()[:16]


def digest(example: Example) -> str:
    """Identifies a problem and its solution, wherever they are in the data."""
    return hashlib.sha256(json.dumps([example.problem, example.solution]).encode()).hexdigest()[:16]
