"""Effects of each clip on the gradient and on the quick start: `python benchmarks/clip_study.py turn|train|report`.

`turn` compares the gradient with every clip with the unclipped one, token by token: for random distributions of few
entries, for wide ones with a teacher near the student, and for the quick start's student and teacher before their
first step. `train` runs the quick start for 20 steps with every clip (about a minute each, after `make demo` has made
its data). `report` draws docs/clips.png and writes benchmarks/results/clips.md from these measurements.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opsd.objective import Divergence, vocab_parallel_divergence
from megatron_opsd.reliability.run_dir import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
KINDS = ("forward_kl", "jsd", "reverse_kl")
SIZES = (0.01, 0.05, 0.2)
CLIPS: tuple[tuple[str, float | None], ...] = (
    ("none", None),
    *product(("entry", "saturate"), SIZES),
    ("token", 0.05),
    ("token", 0.5),
)
STEPS = 20

Row = dict[str, Any]


def divergence(kind: Any, mode: Any, clip: float | None) -> Divergence:
    return Divergence(kind=kind, clip=clip, clip_mode="entry" if clip is None else mode)


# --- turn -------------------------------------------------------------------------------------------------------------


def distributions() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, student's and teacher's logits, [n, v] in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, v: int) -> Tensor:
        return torch.randn(n, v, generator=generator, dtype=torch.float64)

    yield "quick start", *quick_start_logits()
    yield "few entries", 2 * normal(20_000, 4), 2 * normal(20_000, 4)
    student = 3 * normal(2_000, 5_000)
    yield "wide, teacher near", student, student + 0.5 * normal(2_000, 5_000)


@torch.no_grad()
def quick_start_logits() -> tuple[Tensor, Tensor]:
    """Logits of the quick start's base at the tokens of its own sampled answers, without and with the solution."""
    from transformers import AutoModelForCausalLM

    from megatron_opsd.config_file import load_config
    from megatron_opsd.data.datasets import read_examples
    from megatron_opsd.data.prompts import build_prompts

    config = load_config(str(ROOT / "examples/arithmetic/opsd.toml"), {})
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    prompts = build_prompts(config)
    torch.manual_seed(0)
    student, teacher = [], []
    for example in read_examples(config.data, prompts.tokenizer)[:200]:
        prompt, shown = prompts.student(example), prompts.teacher(example)
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=True, top_k=0)
        response = whole[0, len(prompt) :].tolist()
        for logits, ids in ((student, prompt), (teacher, shown)):
            logits.append(model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1])
    return torch.cat(student), torch.cat(teacher)


def gradient(student: Tensor, teacher: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    """The gradient of each token's loss with respect to the student's logits, and whether the clip affects it."""
    leaf = student.clone().requires_grad_()
    out = vocab_parallel_divergence(leaf, teacher, spec, vocab_size=student.shape[1], tp_group=None)
    return torch.autograd.grad(out.loss.sum(), leaf)[0], out.clip_count > 0


def turn() -> list[Row]:
    """How each clip's gradient compares with the unclipped one."""
    rows = []
    for name, student, teacher in distributions():
        for kind in KINDS:
            straight, _ = gradient(student, teacher, Divergence(kind=kind))
            length = straight.norm(dim=1)
            # Where both sides agree, the gradient is nearly zero and its direction means nothing.
            counted = length > 1e-3
            for mode, clip in CLIPS[1:]:
                bent, touched = gradient(student, teacher, divergence(kind, mode, clip))
                cosine = torch.cosine_similarity(straight, bent, dim=1)[counted]
                kept = (bent.norm(dim=1) / length)[counted]
                stopped = kept == 0
                rows.append(
                    {
                        "distribution": name, "kind": kind, "mode": mode, "clip": clip, "tokens": int(counted.sum()),
                        "touched": float(touched[counted].double().mean()),
                        "opposed": float((cosine < 0).double().mean()),
                        "stopped": float(stopped.double().mean()),
                        "cosine_low": float(cosine[~stopped].quantile(0.05)) if (~stopped).any() else None,
                        "length": float(kept.median()),
                    }
                )  # fmt: skip
    return rows


# --- train ------------------------------------------------------------------------------------------------------------


def train(done: list[Row], target: Path) -> None:
    """Run the quick start with every clip, one after the other. Saved runs are not repeated."""
    for kind, (mode, clip) in product(KINDS, CLIPS):
        if any((row["kind"], row["mode"], row["clip"]) == (kind, mode, clip) for row in done):
            continue
        run_dir = ROOT / f"runs/clips/{kind}-{mode}-{clip}"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            "--nproc-per-node",
            "1",
        ]
        command += ["-m", "megatron_opsd", "train", "examples/arithmetic/opsd.toml", "--logging.run_dir", str(run_dir)]
        command += ["--parallel.tensor_model_parallel_size", "1", "--objective.kind", kind, "--train.steps", str(STEPS)]
        command += ["--objective.clip_mode", mode, *(["--objective.clip", str(clip)] if clip else [])]
        command += ["--evaluate.interval", str(STEPS), "--checkpoint.save_interval", str(STEPS)]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        evaluations, steps = (read_jsonl(run_dir / f"{name}.jsonl") for name in ("evaluations", "metrics"))
        done.append(
            {
                "kind": kind, "mode": mode, "clip": clip,
                "greedy": [evaluations[0]["greedy"], evaluations[-1]["greedy"]],
                "sampled": [evaluations[0]["average"], evaluations[-1]["average"]],
                "clipped": sum(step["clip_fraction"] for step in steps) / len(steps),
            }
        )  # fmt: skip
        target.write_text(json.dumps(done, indent=1) + "\n")


# --- report -----------------------------------------------------------------------------------------------------------


def name_of(row: Row) -> str:
    return "none" if row["mode"] == "none" else f"{row['mode']} {row['clip']:g}"


def as_tables(turned: list[Row], trained: list[Row]) -> str:
    parts = [
        "# Clips: what they do to the gradient, and to the quick start",
        "Made by `benchmarks/clip_study.py`. Against the unclipped gradient to the logits, over tokens whose own is "
        "longer than 1e-3: share touched by the clip, share turned against it (cosine < 0), share left without any, "
        "the cosine that 5 % of the others fall below, and the median of the lengths' ratio.",
    ]
    for name in dict.fromkeys(row["distribution"] for row in turned):
        some = [row for row in turned if row["distribution"] == name]
        lines = [
            f"## {name} ({min(row['tokens'] for row in some)} tokens or more)\n",
            "| kind | clip | touched | opposed | stopped | cosine, 5 % | length |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row['kind']} | {name_of(row)} | {row['touched']:.1%} | {row['opposed']:.1%} | {row['stopped']:.1%} "
            f"| {'' if row['cosine_low'] is None else format(row['cosine_low'], '.2f')} | {row['length']:.2f} |"
            for row in some
        ]
        parts.append("\n".join(lines))
    lines = [f"## The quick start, {STEPS} steps, one seed\n", "| kind | clip | tokens clipped | greedy | sampled |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['kind']} | {name_of(row)} | {row['clipped']:.1%} "
        f"| {row['greedy'][0]:.1%} to {row['greedy'][1]:.1%} | {row['sampled'][0]:.1%} to {row['sampled'][1]:.1%} |"
        for row in trained
    ]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def draw(turned: list[Row], trained: list[Row], target: Path) -> None:
    """A column of panels per kind: share of opposed tokens, and accuracy after training (dotted: before), by clip."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    names = [name_of({"mode": mode, "clip": clip}) for mode, clip in CLIPS]
    figure, panels = plt.subplots(2, len(KINDS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
    for column, kind in enumerate(KINDS):
        above, below = panels[0][column], panels[1][column]
        for marker, name in zip("osd", dict.fromkeys(row["distribution"] for row in turned), strict=True):
            some = [row for row in turned if (row["distribution"], row["kind"]) == (name, kind)]
            places = [names.index(name_of(row)) for row in some]
            above.plot(places, [row["opposed"] for row in some], marker, label=name, alpha=0.8)
        some = [row for row in trained if row["kind"] == kind]
        for marker, key in zip("o^", ("greedy", "sampled"), strict=True):
            places = [names.index(name_of(row)) for row in some]
            (drawn,) = below.plot(places, [row[key][1] for row in some], marker, label=key, alpha=0.8)
            below.axhline(some[0][key][0], color=drawn.get_color(), linewidth=0.8, linestyle=":")
        above.set_title(kind)
        below.set_xticks(range(len(names)), names, rotation=60, ha="right")
    panels[0][0].set_ylabel("tokens whose gradient\nturns around")
    panels[1][0].set_ylabel(f"held-out accuracy\nafter {STEPS} steps")
    for row in panels:
        row[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        for axes in row:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(axis="y", linewidth=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["turn", "train", "report"])
    what = parser.parse_args().what
    turned, trained = RESULTS / "clips-turn.json", RESULTS / "clips-train.json"
    if what == "turn":
        turned.write_text(json.dumps(turn(), indent=1) + "\n")
    elif what == "train":
        train(json.loads(trained.read_text()) if trained.exists() else [], trained)
    else:
        turns, runs = json.loads(turned.read_text()), json.loads(trained.read_text())
        (RESULTS / "clips.md").write_text(as_tables(turns, runs))
        draw(turns, runs, ROOT / "docs/clips.png")


if __name__ == "__main__":
    main()
