"""Each method's gradient is that of its formula, worked out in float64 from token ids, grades and transformers' logits.

The reference chooses the responses, computes their advantages and weights and the divisor itself.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opsd.config import Config
from megatron_opsd.data.batch import split
from megatron_opsd.data.prompts import PromptBuilder, build_prompts
from megatron_opsd.data.sampler import Sampler
from megatron_opsd.methods import build_method
from megatron_opsd.model import parallel
from megatron_opsd.model.student import LossSums, Student
from megatron_opsd.model.teacher import FrozenTeacher
from megatron_opsd.rollout.engine import NoEngine, sample_seed
from megatron_opsd.trainer import build_batch
from megatron_opsd.types import Example, Grade, Group, Rollout
from megatron_opsd.weights.architecture import read_architecture

from .harness import ROOT, run_distributed
from .test_layouts import build, gradients

BASE = ROOT / "examples" / "arithmetic" / "base"
STEP = 7  # whose weights wrote the responses
LONGEST = 48
RIGHT, WRONG, UNFINISHED, UNKNOWN = Grade.RIGHT, Grade.WRONG, Grade.UNFINISHED, Grade.UNKNOWN

LAYOUTS: list[dict[str, Any]] = [
    {"tensor_model_parallel_size": 2, "micro_batch_size": 2},
    {"tensor_model_parallel_size": 2, "micro_batch_size": 2, "packing": True},
    {"tensor_model_parallel_size": 1, "micro_batch_size": 2},
    {"tensor_model_parallel_size": 1, "micro_batch_size": 2, "packing": True},
]


def problems(prompts: PromptBuilder) -> list[Group]:
    """Three problems with four responses each: some signal, none, and two right answers in different words."""
    grades = [[RIGHT, WRONG, UNFINISHED, WRONG], [WRONG] * 4, [RIGHT, RIGHT, RIGHT, WRONG]]
    texts = [
        ["7+5+0=12. The answer is {632}.", "7+5+0=12. So {522}.", "7+5+0=12. 4+8+", "It is {1}."],
        ["{9}.", "No: {8}.", "9+0+0=9. The answer is {7}.", "{}."],
        ["3. So {3}.", "1+2+0=3. So {3}.", "3. So {3}.", "1+2+0=4. The answer is {4}."],
    ]
    asked = [
        Example(0, "Compute 347+285.", "7+5+0=12. 4+8+1=13. 3+2+1=6. So {632}.", "632"),
        Example(1, "Compute 4+5.", "4+5+0=9. So {9}.", "9"),
        Example(2, "Compute 1+2.", "1+2+0=3.", "3"),
    ]
    draw, end = torch.Generator().manual_seed(0), prompts.tokenizer.eos_token_id
    assert isinstance(end, int)

    def rollout(text: str, grade: Grade) -> Rollout:
        ids = prompts.tokenizer.encode(text, add_special_tokens=False)
        ids = ids if grade == UNFINISHED else [*ids, end]
        logprobs = (-3 * torch.rand(len(ids), generator=draw)).tolist()
        return Rollout(ids, logprobs, "length" if grade == UNFINISHED else "stop", STEP)

    return [
        Group(example, prompts.student(example), [rollout(*of_one) for of_one in zip(some, known, strict=True)], known)
        for example, some, known in zip(asked, texts, grades, strict=True)
    ]


def as_written(groups: list[Group]) -> list[Group]:
    """The responses as if they were not sampled from the student's prompt."""
    return [
        replace(group, rollouts=[replace(x, logprobs=[]) for x in group.rollouts], solution_in_sight=True)
        for group in groups
    ]


@dataclass
class Term:
    """A response in the reference's sum."""

    prompt: list[int]
    rollout: Rollout
    teacher: list[int] | None = None
    advantage: float = 1.0


@dataclass
class Case:
    """Settings of a run, and by hand what its method learns from ``groups``."""

    settings: dict[str, Any]
    terms: Callable[[list[Group], PromptBuilder], list[Term]]
    groups: Callable[[list[Group]], list[Group]] = lambda groups: groups
    objective: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)

    def config(self, layout: dict[str, Any]) -> Config:
        policy = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "samples_per_prompt": 4}
        alone = self.settings.get("kind") == "sft" or self.settings.get("responses") == "data"
        sizes = {name: layout[name] for name in ("micro_batch_size",)} | {"packing": layout.get("packing", False)}
        return Config.model_validate(
            {
                "model": {"path": str(BASE), "dtype": "float32"},
                "data": {"path": "unread", "max_solution_tokens": LONGEST},
                "method": self.settings,
                "prompts": {"teacher_thinking": False} | self.prompts,
                "rollout": {"max_response_tokens": LONGEST, **({} if alone else policy), **self.rollout},
                "objective": {"chunk_size": 16, **self.objective},
                "optim": {"use_distributed_optimizer": False},
                "parallel": {"tensor_model_parallel_size": layout["tensor_model_parallel_size"]},
                "train": {"global_batch_size": 12, **sizes},
            }
        )


def responses(groups: list[Group], *wanted: Grade) -> Iterator[tuple[Group, Rollout]]:
    for group in groups:
        for rollout, grade in zip(group.rollouts, group.grades, strict=True):
            if grade in (wanted or Grade):
                yield group, rollout


def shown_the_solution(*wanted: Grade) -> Callable[[list[Group], PromptBuilder], list[Term]]:
    return lambda groups, prompts: [
        Term(group.prompt, rollout, prompts.teacher(group.example)) for group, rollout in responses(groups, *wanted)
    ]


def likely(*wanted: Grade) -> Callable[[list[Group], PromptBuilder], list[Term]]:
    return lambda groups, _: [Term(group.prompt, rollout) for group, rollout in responses(groups, *wanted)]


def shown_a_sibling(skip: bool) -> Callable[[list[Group], PromptBuilder], list[Term]]:
    def terms(groups: list[Group], prompts: PromptBuilder) -> list[Term]:
        found = []
        for place, (group, rollout) in enumerate(responses(groups)):
            others = [x for _, x in responses([group], RIGHT) if x.token_ids != rollout.token_ids]
            if not others and skip:
                continue
            solution = group.example.solution
            if others:
                chosen = others[sample_seed(0, STEP + 1, place) % len(others)]
                solution = str(prompts.tokenizer.decode(chosen.token_ids[:-1]))  # without the end of the turn
            found.append(Term(group.prompt, rollout, prompts.teacher(replace(group.example, solution=solution))))
        return found

    return terms


def relative(by_std: bool, drop: bool) -> Callable[[list[Group], PromptBuilder], list[Term]]:
    def terms(groups: list[Group], _: PromptBuilder) -> list[Term]:
        found = []
        for group in groups:
            rewards = torch.tensor([float(grade == RIGHT) for grade in group.grades], dtype=torch.float64)
            if drop and bool((rewards == rewards[0]).all()):
                continue
            advantages = rewards - rewards.sum() / 4
            if by_std:
                advantages /= (advantages.square().sum() / 3).sqrt() + 1e-4
            found += [
                Term(group.prompt, x, advantage=a.item()) for x, a in zip(group.rollouts, advantages, strict=True)
            ]
        return found

    return terms


def rationalized(groups: list[Group]) -> list[Group]:
    """As STaR collects them: the failed answers once more, of which one in two is right now."""
    again = [
        Group(group.example, group.prompt, [replace(rollout, logprobs=[])], [RIGHT if i % 2 else WRONG], True)
        for i, (group, rollout) in enumerate(responses(groups, WRONG))
    ]
    return groups + again


GRPO, SAMPLED = {"kind": "grpo"}, {"loss": "sampled_token"}
CASES = {
    "opsd": Case({}, shown_the_solution()),
    "opsd of right answers": Case(
        {"train_on": ["right"]}, shown_the_solution(RIGHT), objective={"normalization": "sequence", "temperature": 1.3}
    ),
    "opsd of unfinished answers": Case(
        {"train_on": ["unfinished"]}, shown_the_solution(UNFINISHED), prompts={"skip_first_tokens": 2}
    ),
    "opsd, rising": Case({}, shown_the_solution(), objective={"position_weights": "rising"}),
    "opsd, falling": Case(
        {},
        shown_the_solution(),
        objective={"position_weights": "falling", "normalization": "constant"},
        prompts={"skip_first_tokens": 3},
    ),
    "opsd of uncertain tokens": Case({}, shown_the_solution(), objective={"entropy_share": 0.3}),
    "opsd of uncertain tokens, rising": Case(
        {},
        shown_the_solution(),
        objective={"entropy_share": 0.6, "normalization": "constant", "position_weights": "rising"},
    ),
    "opsd of siblings": Case({"context": "sibling"}, shown_a_sibling(skip=False)),
    "opsd of siblings alone": Case({"context": "sibling", "no_sibling": "skip"}, shown_a_sibling(skip=True)),
    "opsd of sampled tokens": Case(SAMPLED, shown_the_solution()),
    "opsd of sampled tokens, weighed": Case(SAMPLED, shown_the_solution(), objective={"importance_cap": 1.5}),
    "opsd inside of a think block": Case(
        {},
        shown_the_solution(),
        prompts={"teacher_prefix": "<think>\n", "teacher_thinking": True},
        objective={"normalization": "sequence"},
    ),
    "grpo": Case(GRPO, relative(by_std=True, drop=False), objective={"normalization": "sequence"}),
    "grpo by token": Case(GRPO, relative(by_std=True, drop=False)),
    "dr. grpo": Case(
        GRPO | {"scale_by_std": False}, relative(by_std=False, drop=False), objective={"normalization": "constant"}
    ),
    "grpo without dead groups": Case(
        GRPO | {"drop_groups_without_signal": True},
        relative(by_std=True, drop=True),
        objective={"importance_cap": 1.5, "entropy_share": 0.5},
    ),
    "star": Case({"kind": "star"}, likely(RIGHT), rationalized),
    "star by sequence": Case(
        {"kind": "star", "rationalize": False}, likely(RIGHT), objective={"normalization": "sequence"}
    ),
    "sft": Case({"kind": "sft"}, likely(), as_written),
    "distill": Case({"kind": "distill"}, shown_the_solution(), as_written),
}


class Reference:
    """The formulas, in float64."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
        self.model.requires_grad_(True)

    def logits(self, prompt: list[int], rollout: Rollout) -> Tensor:
        """[tokens of the response, v]"""
        ids = torch.tensor([prompt + rollout.token_ids])
        return self.model(ids).logits[0, len(prompt) - 1 : -1]

    def gradients(self, config: Config, terms: list[Term], threshold: float | None) -> tuple[dict, float, Tensor]:
        """Gradients by name, the loss, and the entropies of the tokens that are trained on."""
        objective, total, divisor, entropies = config.objective, torch.zeros(()), 0.0, []
        opens_block = config.prompts.teacher_prefix == "<think>\n"
        for term in terms:
            logits = self.logits(term.prompt, term.rollout) / objective.temperature
            log_p, y = logits.log_softmax(-1), torch.tensor(term.rollout.token_ids)
            own = log_p.gather(1, y[:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1).detach()
            if term.teacher is None:
                losses = -term.advantage * self.importance(config, own, term) * own
            else:
                with torch.no_grad():
                    log_q = (self.logits(term.teacher, term.rollout) / objective.temperature).log_softmax(-1)
                if config.method.samples_tokens:
                    advantage = (log_q.gather(1, y[:, None])[:, 0] - own).detach()
                    losses = -advantage * self.importance(config, own, term) * own
                else:
                    d = log_q - log_p
                    f = log_q.exp() * (d + torch.expm1(-d))
                    losses = (0.05 * torch.log1p(f / 0.05)).sum(-1)  # forward KL, `saturate` .05
            trained = torch.arange(len(y)) >= config.prompts.skip_first_tokens
            if opens_block and term.rollout.finish_reason == "stop":
                trained[-1] = False
            m = int(trained.sum())
            place = torch.zeros(len(y), dtype=torch.float64)
            place[trained] = torch.arange(m, dtype=torch.float64)
            weights = {
                "even": torch.ones_like(place),
                "rising": (place + 0.5) / (m / 2),
                "falling": (m - place - 0.5) / (m / 2),
            }[objective.position_weights]
            weights = torch.where(trained, weights, 0)
            entropies.append(entropy[trained])
            if threshold is not None:
                trained = trained & (entropy >= threshold)
                weights = torch.where(trained, weights, 0)
            count = int(trained.sum())
            scale, share = {"token": (1, count), "sequence": (m, int(m > 0)), "constant": (LONGEST, 1)}[
                objective.normalization
            ]
            total = total + (weights / scale * losses)[trained].sum()
            divisor += share
        loss = total / divisor
        named = dict(self.model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        return dict(zip(named, found, strict=True)), loss.item(), torch.cat(entropies)

    def importance(self, config: Config, own: Tensor, term: Term) -> Tensor | float:
        cap = config.objective.importance_cap
        if cap is None:
            return 1.0
        ratio = (own.detach() - torch.tensor(term.rollout.logprobs, dtype=torch.float64)).exp()
        return ratio.clamp(max=cap)


def backward(
    case: Case, config: Config, layout: parallel.Layout, groups: list[Group], threshold: float | None
) -> tuple[dict[str, Tensor], LossSums]:
    """The gradients of the trainer's own parts."""
    prompts = build_prompts(config)
    sampler = Sampler([group.example for group in groups], 0)
    method = build_method(config, prompts, sampler, NoEngine())
    model = build(config, layout)
    vocab_size = read_architecture(str(BASE)).vocab_size
    student = Student(model, layout, config, vocab_size, method.loss)
    batch = build_batch(method.samples(case.groups(groups)), config, prompts, layout.dp_group.size())
    assignment = batch.assign(config.train.micro_batch_size, layout.dp_group.size())
    microbatches = split(batch, assignment, layout.dp_group.rank(), parallel.device())
    head, hidden = None, []
    if config.method.has_teacher:
        teacher = FrozenTeacher(build(config, layout), "resident")
        head, hidden = teacher.head_weight(), teacher.score(microbatches)
    losses = student.forward_backward(microbatches, head, hidden, threshold)
    return gradients(student, str(BASE), layout), losses


def check(name: str, case: Case, sizes: dict[str, Any], reference: Reference) -> None:
    config = case.config(sizes)
    layout = parallel.initialize(config.parallel, seed=1)
    prompts = build_prompts(config)
    groups = problems(prompts)
    terms = case.terms(case.groups(groups), prompts)
    thresholds: list[float | None] = [None]
    while thresholds:
        threshold = thresholds.pop()
        found, losses = backward(case, config, layout, groups, threshold)
        wanted, loss, entropies = reference.gradients(config, terms, threshold)
        assert losses.means()["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-7), name
        assert found.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            error = (found[parameter] - gradient).norm() / gradient.norm()
            assert error < 2e-4, f"{name}, {sizes}: {parameter} differs by {error:.1e}"
        share = config.objective.entropy_share
        if share < 1 and threshold is None:
            found_threshold = losses.entropy_threshold(share)
            exact = entropies.sort(descending=True).values
            assert found_threshold == pytest.approx(exact[math.ceil(share * len(exact)) - 1].item(), rel=1e-4)
            assert found_threshold is not None
            # Between two tokens' entropies, so that rounding decides nothing.
            below = exact[exact < found_threshold * (1 - 1e-3)][0].item()
            thresholds.append((found_threshold + below) / 2)


def nothing_to_learn(sizes: dict[str, Any]) -> None:
    """Groups without signal have no gradient; what is filtered away leaves no sample."""
    for settings, keeps in (
        (GRPO, True),
        (GRPO | {"drop_groups_without_signal": True}, False),
        ({"kind": "star", "rationalize": False}, False),
        ({"train_on": ["right"]}, False),
    ):
        case = Case(settings, likely())
        config = case.config(sizes)
        layout = parallel.initialize(config.parallel, seed=1)
        prompts = build_prompts(config)
        groups = problems(prompts)[1:2]  # all wrong
        samples = build_method(config, prompts, Sampler([groups[0].example], 0), NoEngine()).samples(groups)
        assert bool(samples) == keeps
        if keeps:
            found, losses = backward(case, config, layout, groups, None)
            assert losses.count == sum(len(x.token_ids) for x in groups[0].rollouts)
            assert all(not gradient.any() for gradient in found.values())


def worker(sizes: dict[str, Any]) -> None:
    reference = Reference()
    for name, case in CASES.items():
        check(name, case, sizes, reference)
    nothing_to_learn(sizes)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=["tp2", "tp2-packed", "dp2", "dp2-packed"])
def test_gradients_are_those_of_the_formulas(sizes: dict[str, Any]) -> None:
    run_distributed(worker, 2, sizes)


def test_cases_differ() -> None:
    """A reference that ignored a setting would agree with a trainer that does."""
    reference, seen = Reference(), {}
    for name, case in CASES.items():
        config = case.config(LAYOUTS[0])
        prompts = build_prompts(config)
        terms = case.terms(case.groups(problems(prompts)), prompts)
        _, loss, entropies = reference.gradients(config, terms, None)
        if config.objective.entropy_share < 1:
            loss = reference.gradients(config, terms, entropies.median().item())[1]
        seen[name] = loss
    assert len({round(loss, 9) for loss in seen.values()}) >= len(CASES) - 1
