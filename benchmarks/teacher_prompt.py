"""How a teacher uses the solution in its prompt: `python benchmarks/teacher_prompt.py FILE.toml OUT.json`.

The model of FILE.toml answers the problems of `evaluate.data` with the student's prompt and with the teacher's. Then
transformers scores greedy responses (tokenized again) and reference solutions with both prompts: the mean log-prob of a
token, how often both sides put the same token first, and which tokens are at both ends. Settings can be overridden as
in a run.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_opsd.config import Config, ParallelConfig
from megatron_opsd.config_file import add_overrides, load_config
from megatron_opsd.data.datasets import read_held_out
from megatron_opsd.data.prompts import PromptBuilder, build_prompts, max_model_len
from megatron_opsd.evaluate import evaluate
from megatron_opsd.model import parallel
from megatron_opsd.rollout import build_engine
from megatron_opsd.types import Evaluation, Example
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.mapping import NameTable

READ = 20  # problems whose responses and solutions transformers scores
ENDS = 3  # tokens of a response's beginning and end


class TeacherAsStudent(PromptBuilder):
    """Builds the teacher's prompt instead of the student's."""

    def student(self, example: Example) -> list[int]:
        return self.teacher(example)


def answer(config: Config, examples: Sequence[Example], prompts: PromptBuilder) -> dict[str, Evaluation]:
    """Both sides' answers, by the same engine with the same seeds."""
    reader, table = HFReader(config.model.path), NameTable(read_architecture(config.model.path))
    longest = config.data.max_solution_tokens + max_model_len(config, prompts)
    engine = build_engine(config, longest + len(prompts.teacher(Example(0, "", ""))))
    engine.update_weights(((name, reader.read(name)) for name in table.hf_tensors()), version=0)
    sides = {"student": prompts, "teacher": TeacherAsStudent(**vars(prompts))}
    evaluations = {side: evaluate(engine, prompts, examples, config) for side, prompts in sides.items()}
    engine.close()
    return evaluations


def summarize(evaluation: Evaluation) -> dict[str, float]:
    """Accuracies with standard errors over problems, and the share of answers that were cut short."""
    greedy = [record for record in evaluation.records if record["sampling"] == "greedy"]
    return {
        **evaluation.scores(),
        "standard_error": math.sqrt(evaluation.greedy * (1 - evaluation.greedy) / len(greedy)),
        "cut_short": sum(record["finish_reason"] == "length" for record in greedy) / len(greedy),
    }


class Reader:
    """Log-probs of a text's tokens after a prompt."""

    def __init__(self, path: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    @torch.no_grad()
    def read(self, prompt: list[int], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-prob of each token of ``ids``, and the likeliest token in its place; both [n]."""
        logits = self._model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        return log_p.gather(1, torch.tensor(ids)[:, None])[:, 0], log_p.argmax(-1)


def read_both(
    reader: Reader, prompts: PromptBuilder, example: Example, ids: list[int]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Means over tokens under both prompts, and the tokens at both ends."""
    (student, first), (teacher, second) = (
        reader.read(prompt, ids) for prompt in (prompts.student(example), prompts.teacher(example))
    )
    decode = prompts.tokenizer.decode
    ends = [
        {
            "place": place,
            "token": decode([ids[place]]),
            "student": [decode([int(first[place])]), round(float(student[place]), 3)],
            "teacher": [decode([int(second[place])]), round(float(teacher[place]), 3)],
        }
        for place in sorted({*range(min(ENDS, len(ids))), *range(max(0, len(ids) - ENDS), len(ids))})
    ]
    agreement = float((first == second).double().mean())
    return {"student": float(student.mean()), "teacher": float(teacher.mean()), "agreement": agreement}, ends


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="FILE.toml")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    add_overrides(parser)
    options = vars(parser.parse_args(arguments))
    file, out = options.pop("config"), options.pop("out")
    config = load_config(file, options)
    if config.evaluate.data is None:
        parser.error("evaluate.data.path is missing")
    parallel.initialize(ParallelConfig(), config.train.seed)
    prompts = build_prompts(config)
    examples = read_held_out(config.evaluate.data, prompts.tokenizer)[: config.evaluate.limit]
    evaluations = answer(config, examples, prompts)
    report: dict[str, Any] = {side: summarize(evaluation) for side, evaluation in evaluations.items()}
    print(json.dumps(report, indent=1), flush=True)
    reader, eos = Reader(config.model.path), prompts.tokenizer.convert_tokens_to_ids([str(prompts.tokenizer.eos_token)])
    for what in ("solution", "response"):
        rows = []
        for example, record in list(zip(examples, evaluations["student"].records, strict=False))[:READ]:
            text = example.solution if what == "solution" else record["response"]
            ids = prompts.tokenizer.encode(text, add_special_tokens=False)
            ended = what == "solution" or record["finish_reason"] == "stop"
            rows.append(read_both(reader, prompts, example, [*ids, *eos] if ended else ids))  # type: ignore[list-item]
        report[what] = {name: sum(means[name] for means, _ in rows) / len(rows) for name in rows[0][0]}
        report[f"{what}_ends"] = [ends for _, ends in rows[:3]]
        print(what, report[what], flush=True)
    report["first_problem"] = asdict(examples[0])
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
