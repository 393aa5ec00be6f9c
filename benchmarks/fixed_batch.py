"""Effects of an objective on a model, measured on one fixed batch.

    python benchmarks/fixed_batch.py write FILE.toml BATCH.jsonl [--section.key VALUE ...]
    python benchmarks/fixed_batch.py measure FILE.toml BATCH.jsonl OUT.json [--student DIR] [...]
    python benchmarks/fixed_batch.py slopes FILE.toml BATCH.jsonl OUT.json [--student DIR] [...]
    python benchmarks/fixed_batch.py step FILE.toml BATCH.jsonl OUT.json [...]
    python benchmarks/fixed_batch.py overfit FILE.toml BATCH.jsonl OUT.jsonl [...]
    python benchmarks/fixed_batch.py carry FILE.toml BATCH.jsonl OUT.jsonl [...]

`write` makes the model write a response to each of the first `train.global_batch_size` problems of the data. The other
commands compute the divergences on these responses. The teacher is that model; the student may be a trained one.
`measure` does only this. `slopes` computes the first-order effect of a step along each objective's gradient on the
unclipped divergences and on the student's entropy. `step` takes such small steps, each from the same weights, and
compares. `overfit` trains on the batch for `train.steps` steps with the file's objective and optimizer. `carry` takes
Adam's first step on some sequences and measures its effect on the last third of the batch, which is held out. They run
in one process, with OMP_NUM_THREADS threads.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opsd.config import Config
from megatron_opsd.config_file import add_overrides, load_config
from megatron_opsd.data.batch import Batch, Microbatch, Sample, split
from megatron_opsd.data.datasets import read_examples
from megatron_opsd.data.prompts import build_prompts, max_model_len
from megatron_opsd.methods.losses import divergence
from megatron_opsd.model import parallel
from megatron_opsd.model.gpt import ModelChunks, build_model, forward
from megatron_opsd.model.optimizer import build_optimizer, build_schedule, dithered, optimizer_step
from megatron_opsd.model.student import Student
from megatron_opsd.model.teacher import FrozenTeacher
from megatron_opsd.objective import Divergence, linear_divergence
from megatron_opsd.objective.divergence import KindName
from megatron_opsd.reliability.run_dir import read_jsonl, write_jsonl
from megatron_opsd.rollout import build_engine
from megatron_opsd.rollout.engine import Sampling, sample_seed
from megatron_opsd.types import Rollout
from megatron_opsd.weights.architecture import read_architecture
from megatron_opsd.weights.hf_files import HFReader
from megatron_opsd.weights.load import load_hf
from megatron_opsd.weights.mapping import NameTable

KINDS: tuple[KindName, ...] = ("forward_kl", "reverse_kl", "jsd")
CLIPS: tuple[tuple[str, float | None], ...] = (("none", None), ("entry", 0.05), ("token", 0.5), ("saturate", 0.05))
SHARE = 0.02  # share of the divergence that a step along its unclipped gradient is predicted to remove
CHUNK = 256
# Adam's first steps: a learning rate, which is the change of every weight, and how the weights are rounded.
STEPS = (
    *((lr, "none") for lr in (3e-7, 1e-6, 3e-6, 1e-5)),
    *((lr, rounding) for lr in (1e-6, 3e-6) for rounding in ("bfloat16", "dither")),
)


def write(config: Config, batch: Path) -> None:
    """Write responses of the model to the first problems, with everything that training on them needs."""
    parallel.initialize(config.parallel, config.train.seed)
    prompts, reader = build_prompts(config), HFReader(config.model.path)
    table = NameTable(read_architecture(config.model.path))
    examples = read_examples(config.data, prompts.tokenizer)[: config.train.global_batch_size]
    engine = build_engine(config, max_model_len(config, prompts))
    engine.update_weights(((name, reader.read(name)) for name in table.hf_tensors()), version=0)
    rollout = config.rollout
    sampling = Sampling(rollout.max_response_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    seeds = [sample_seed(config.train.seed, 1, i) for i in range(len(examples))]
    rollouts = engine.generate([prompts.student(example) for example in examples], sampling, seeds)
    write_jsonl(
        batch,
        [
            {
                "student_prompt": prompts.student(example),
                "teacher_prompt": prompts.teacher(example),
                "token_ids": rollout.token_ids,
                "logprobs": rollout.logprobs,
                "finish_reason": rollout.finish_reason,
                "response": prompts.tokenizer.decode(rollout.token_ids),
            }
            for example, rollout in zip(examples, rollouts, strict=True)
        ],
    )
    engine.close()


class Study:
    """Student, teacher's hidden states and the batch."""

    def __init__(self, config: Config, batch: Path, student: str = "") -> None:
        self.config = config
        self.layout = parallel.initialize(config.parallel, config.train.seed)
        self.arch = read_architecture(config.model.path)
        samples = [
            Sample(
                line["student_prompt"],
                line["teacher_prompt"],
                Rollout(line["token_ids"], line["logprobs"], line["finish_reason"], 0),
            )
            for line in read_jsonl(batch)
        ]
        whole = Batch(samples)
        assignment = whole.assign(config.train.micro_batch_size, 1)
        self.microbatches = split(whole, assignment, 0, parallel.device())
        self.teacher = FrozenTeacher(self._load(config.model.path), "resident")
        self.teacher_hidden = self.teacher.score(self.microbatches)
        self.student = Student(
            self._load(student or config.model.path), self.layout, config, self.arch.vocab_size, divergence(config)
        )
        self.start = [parameter.detach().clone() for parameter in self.student.model_chunks.parameters()]

    def _load(self, path: str) -> ModelChunks:
        model = build_model(self.arch, self.config.model, self.config.parallel, self.layout.pg_collection)
        load_hf(model, HFReader(path), NameTable(self.arch), self.layout.shard)
        return model

    def backward(self, part: slice = slice(None)) -> dict[str, float]:
        """Put the gradients of the objective on some micro-batches into the gradient buffer; returns the metrics."""
        head = self.teacher.head_weight()
        return self.student.forward_backward(self.microbatches[part], head, self.teacher_hidden[part]).means()

    def gradient(self) -> Tensor:
        """A copy of the gradient buffer."""
        return self._buffer().clone()

    @torch.no_grad()
    def move(self, length: float, direction: Tensor, rounding: str = "none") -> None:
        """Set the weights to those of the start plus ``length`` times a direction, laid out as the gradient buffer.

        rounding: "bfloat16" rounds the sum; "dither" also rounds it, but starts where ``optim.dither`` does.
        """
        generator = torch.Generator().manual_seed(0)
        for parameter, start in zip(self.student.model_chunks.parameters(), self.start, strict=True):
            origin = dithered(start.bfloat16(), generator) if rounding == "dither" else start
            step = direction[self.place(parameter)].view_as(parameter)
            whole = torch.add(origin, step, alpha=length) if length else origin  # a direction may be NaN
            parameter.copy_(whole if rounding == "none" else whole.bfloat16())

    def place(self, parameter: Tensor) -> slice:
        """The place of a parameter's gradient in the gradient buffer."""
        main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        offset = (main_grad.data_ptr() - self._buffer().data_ptr()) // main_grad.element_size()
        return slice(offset, offset + parameter.numel())

    def _buffer(self) -> Tensor:
        ddp: Any = self.student.ddp_chunks[0]
        (buffer,) = ddp.buffers
        return buffer.grad_data

    @torch.no_grad()
    def measure(self, part: slice = slice(None), kinds: Sequence[KindName] = KINDS) -> dict[str, float]:
        """Means over the tokens of some micro-batches: the unclipped divergences, both entropies, agreement."""
        sums: dict[str, Tensor] = {}
        for microbatch, target in zip(self.microbatches[part], self.teacher_hidden[part], strict=True):
            hidden = self._hidden(microbatch)
            for kind in kinds:
                _, out = linear_divergence(
                    hidden,
                    self.student.model_chunks.last.head_weight(),
                    target,
                    self.teacher.head_weight(),  # type: ignore[arg-type]
                    torch.ones(len(hidden)),
                    Divergence(kind=kind),
                    vocab_size=self.arch.vocab_size,
                    tp_group=None,
                    chunk_size=CHUNK,
                )
                values = {kind: out.unclipped, "entropy_student": out.entropy_student}
                values |= {"entropy_teacher": out.entropy_teacher, "agreement": out.agree}
                for name, value in values.items():
                    if kind == kinds[0] or name == kind:
                        sums[name] = sums.get(name, torch.zeros(())) + value.double().sum()
        return {name: float(value) / self.tokens(part) for name, value in sums.items()}

    def tokens(self, part: slice = slice(None)) -> int:
        return sum(len(microbatch.response_ids) for microbatch in self.microbatches[part])

    def entropy_backward(self) -> None:
        """Put the gradient of the student's mean entropy into the gradient buffer: dH/dz = -p (log p + H)."""
        self.student.ddp_chunks[0].zero_grad_buffer()
        head = self.student.model_chunks.last.head_weight()
        for microbatch in self.microbatches:
            hidden = self._hidden(microbatch)
            slopes = torch.empty_like(hidden)
            with torch.no_grad():
                for rows in range(0, len(hidden), CHUNK):
                    part = hidden[rows : rows + CHUNK]
                    logits = part @ head[: self.arch.vocab_size].t()
                    log_p = logits.log_softmax(-1)
                    p = log_p.exp()
                    slope = -p * (log_p - (p * log_p).sum(-1, keepdim=True)) / self.tokens()
                    slopes[rows : rows + CHUNK] = slope @ head[: self.arch.vocab_size]
                    head.main_grad[: self.arch.vocab_size].addmm_(slope.t(), part)  # type: ignore[attr-defined]
            hidden.backward(slopes)

    def _hidden(self, microbatch: Microbatch) -> Tensor:
        hidden = forward(self.student.ddp_chunks[0], microbatch.student)
        return self.student.model_chunks.last.head_input(hidden).flatten(0, 1)[microbatch.student.index]  # [n, h]


def measure(study: Study, out: Path) -> None:
    """Measure divergences, entropies and agreement of student and teacher, for each micro-batch and for all tokens."""
    parts = [slice(i, i + 1) for i in range(len(study.microbatches))]
    rows = [{"tokens": study.tokens(part), **study.measure(part)} for part in parts]
    whole = {name: sum(row["tokens"] * row[name] for row in rows) / study.tokens() for name in rows[0]}
    whole["tokens"] = study.tokens()
    print(json.dumps(whole), flush=True)
    out.write_text(json.dumps({"whole": whole, "micro_batches": rows}, indent=1) + "\n")


def objectives(study: Study) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each objective with its gradient at the weights of the start."""
    for kind in KINDS:
        for mode, clip in CLIPS:
            study.move(0.0, study.gradient())
            study.student.token_loss = Divergence(kind, clip=clip, clip_mode="entry" if clip is None else mode)  # type: ignore[arg-type]
            loss = study.backward()["loss"]
            gradient = study.gradient()
            yield (
                {"kind": kind, "clip_mode": mode, "clip": clip, "loss": loss, "norm": float(gradient.norm())},
                gradient,
            )


def slopes(study: Study, out: Path) -> None:
    """The first-order effect of Adam's first step at ``optim.lr`` on the divergences and on the entropy."""
    before, rows, lr = study.measure(), [], study.config.optim.lr
    study.entropy_backward()
    slopes = {"entropy_student": study.gradient()}
    for objective, gradient in objectives(study):
        if objective["clip"] is None:
            slopes[objective["kind"]] = gradient
        signs = gradient.sign()
        rows.append(objective | {"lr": lr} | {name: -lr * float(slope @ signs) for name, slope in slopes.items()})
        print(json.dumps(rows[-1]), flush=True)
        out.write_text(json.dumps({"before": before, "rows": rows}, indent=1) + "\n")


def step(study: Study, out: Path) -> None:
    """Take a step of the same length along each objective's gradient, and along its signs, as Adam's first step."""
    before, rows = study.measure(), []
    study.entropy_backward()
    of_entropy = study.gradient()
    of_divergence, lengths = torch.empty(0), {}
    for objective, gradient in objectives(study):
        kind = objective["kind"]
        if objective["clip"] is None:
            of_divergence = gradient
        for along in ("gradient", "signs"):
            direction = gradient.sign() if along == "signs" else gradient / gradient.norm()
            if objective["clip"] is None:
                lengths[along] = SHARE * before[kind] / float(of_divergence @ direction)
            length = lengths[along]
            study.move(-length, direction)
            after = study.measure()
            row: dict[str, Any] = {**objective, "along": along, "length": length}  # along signs: Adam's learning rate
            for name, slope in (("divergence", of_divergence), ("entropy", of_entropy)):
                key = kind if name == "divergence" else "entropy_student"
                row[f"predicted_{name}"] = -length * float(slope @ direction)
                row[f"measured_{name}"] = after[key] - before[key]
            rows.append(row)
            print(json.dumps(row), flush=True)
            out.write_text(json.dumps({"before": before, "share": SHARE, "rows": rows}, indent=1) + "\n")


def carry(study: Study, out: Path) -> None:
    """Take Adam's first step on the first 1, 4, 16, ... micro-batches, and measure its effect on the last third.

    A slope is how fast a divergence changes along the step. There are three: on the step's own sequences, on the
    held-out ones, and on the held-out ones by the head alone (if tied: with the embedding).
    """
    config, rows, kind = study.config, [], study.config.objective.kind
    assert len(study.microbatches) >= 3, "carry needs three micro-batches: set train.micro_batch_size lower"
    held_out = slice(-(len(study.microbatches) // 3), None)
    before = study.measure(held_out, [kind])
    study.backward(held_out)
    of_held_out = study.gradient()
    head, seen = study.place(study.student.model_chunks.last.head_weight()), 1
    while seen <= len(study.microbatches) + held_out.start:
        study.move(0.0, of_held_out)
        own = study.backward(slice(seen))
        along = study.gradient()
        slopes: dict[str, float] = {"grad_norm": float(along.norm())}
        along.div_(study.gradient().abs_().add_(config.optim.adam_eps))
        slopes |= {"own_slope": float(study.gradient() @ along), "slope": float(of_held_out @ along)}
        slopes["head_slope"] = float(of_held_out[head] @ along[head])
        for lr, rounding in STEPS:
            study.move(-lr, along, rounding)
            after = study.measure(held_out, [kind])
            batch = {"sequences": seen * config.train.micro_batch_size, "tokens": study.tokens(slice(seen))}
            batch |= {"divergence": own["divergence"], "lr": lr, "rounding": rounding}
            rows.append({**batch, **slopes, "before": before, "after": after})
            changes = {"own": -lr * slopes["own_slope"], "predicted": -lr * slopes["slope"]}
            changes |= {name: after[name] - before[name] for name in (kind, "entropy_student")}
            shown = " ".join(f"{name} {change:+.4f}" for name, change in changes.items())
            print(f"{batch['sequences']} sequences, {lr:.0e} {rounding}: {shown}", flush=True)
            write_jsonl(out, rows)
        seen *= 4


def learn(study: Study) -> Iterator[dict[str, float]]:
    """Take ``train.steps`` steps on the batch from the start; yields the metrics before each and after the last."""
    config = study.config
    study.move(0.0, study.gradient())
    optimizer = build_optimizer(study.student, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.train.steps)
    for number in range(config.train.steps + 1):
        start = time.monotonic()
        row = {"step": number, **study.backward()}
        if number < config.train.steps:
            row["grad_norm"], row["lr"], _ = optimizer_step(optimizer, schedule, row["loss"])
        yield row | {"seconds": time.monotonic() - start}


def overfit(study: Study, out: Path) -> None:
    """Print and write the metrics of :func:`learn` step by step."""
    rows = []
    for row in learn(study):
        rows.append(row)
        names = ("loss", "divergence", "entropy_student", "entropy_teacher", "agreement", "grad_norm", "seconds")
        print(f"step {row['step']} " + " ".join(f"{name} {row[name]:.4f}" for name in names if name in row), flush=True)
        write_jsonl(out, rows)


STUDIES = {"measure": measure, "slopes": slopes, "step": step, "overfit": overfit, "carry": carry}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", *STUDIES])
    parser.add_argument("config", metavar="FILE.toml")
    parser.add_argument("batch", type=Path, metavar="BATCH.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?")
    parser.add_argument("--student", default="", metavar="DIR", help="a Hugging Face directory, if not model.path")
    add_overrides(parser)
    options = vars(parser.parse_args(arguments))
    if options["command"] != "write" and options["out"] is None:
        parser.error("OUT is missing: the file for what is measured")
    command, file, batch, out, student = (
        options.pop(name) for name in ("command", "config", "batch", "out", "student")
    )
    config = load_config(file, options)
    if command == "write":
        write(config, batch)
    else:
        STUDIES[command](Study(config, batch, student), out)


if __name__ == "__main__":
    main()
