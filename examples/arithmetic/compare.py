"""Compare methods: `python examples/arithmetic/compare.py RUN_DIR [RUN_DIR ...] --out FIGURE`.

Run directories are named METHOD-seedN. Prints a table, and draws held-out accuracy over steps and over written tokens.
"""

import argparse
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # a file, whether or not there is a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from megatron_opsd.reliability.run_dir import RunDir, read_jsonl

GOAL = 0.9
LINES = {"0": "-", "1": "--"}  # by seed


@dataclass(frozen=True)
class Run:
    """What one run directory recorded.

    tokens: those that the engine had written before each evaluation.
    """

    method: str
    seed: str
    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    tokens: list[float]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a run directory."""
        folder = RunDir(path)
        method, _, seed = path.name.rpartition("-seed")
        steps, evaluations = read_jsonl(folder.metrics), read_jsonl(folder.evaluations)
        before = sum(len(record["token_ids"]) for record in read_jsonl(folder.written)[1:])
        written = list(accumulate((step["tokens_written"] for step in steps), initial=before))
        return cls(method, seed, steps, evaluations, [written[int(x["step"])] for x in evaluations])

    def until_goal(self) -> str:
        """Steps and tokens until the first evaluation with the goal's accuracy."""
        for evaluation, tokens in zip(self.evaluations, self.tokens, strict=True):
            if evaluation["greedy"] >= GOAL:
                return f"{evaluation['step']:.0f} steps, {tokens / 1e3:,.0f}k"
        return "never"

    def mean(self, name: str, steps: int) -> str:
        """Mean of a metric over the last steps."""
        values = [step[name] for step in self.steps[-steps:] if name in step]
        return f"{sum(values) / len(values):.3f}" if values else "-"


def table_of(runs: list[Run]) -> Table:
    """One row a run."""
    table = Table(title="Held-out accuracy, and what it took", box=None)
    headings = ("method", "seed", "greedy", "sampled", f"until {GOAL:.0%}: tokens", "in all", "no signal", "entropy")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for run in runs:
        after = run.evaluations[-1]
        scores = (f"{after[key]:.1%}" for key in ("greedy", "average"))
        signal, entropy = run.mean("groups_without_signal", len(run.steps)), run.mean("entropy_student", 5)
        written = f"{run.tokens[-1] / 1e3:,.0f}k"
        table.add_row(run.method, run.seed, *scores, run.until_goal(), written, signal, entropy)
    return table


def draw(runs: list[Run], path: Path) -> None:
    """Two panels: over steps, and over the tokens that were written to get there. Seeds 0 and 1: solid and dashed."""
    methods = list(dict.fromkeys(run.method for run in runs))
    figure, (over_steps, over_tokens) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for run in runs:
        color = f"C{methods.index(run.method)}"
        label = run.method if run.seed == runs[0].seed else None
        accuracy = [evaluation["average"] for evaluation in run.evaluations]
        style = {"color": color, "linestyle": LINES.get(run.seed, ":"), "linewidth": 1.6, "marker": "o"}
        steps = [evaluation["step"] for evaluation in run.evaluations]
        over_steps.plot(steps, accuracy, markersize=3, label=label, **style)
        if run.tokens[-1]:
            points = [(tokens, share) for tokens, share in zip(run.tokens, accuracy, strict=True) if tokens]
            over_tokens.plot(*zip(*points, strict=True), markersize=3, **style)
    for axes, label in ((over_steps, "optimizer steps"), (over_tokens, "tokens written by the engine, log scale")):
        finish(axes, label)
    over_tokens.set_xscale("log")
    over_steps.set_ylabel("held-out problems solved, sampled (T = 1)")
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=110)


def finish(axes: Axes, label: str) -> None:
    """The look of a panel."""
    axes.set(xlabel=label, ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description="Compare runs of several methods.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="named METHOD-seedN")
    parser.add_argument("--out", type=Path, required=True, help="the figure, a PNG file")
    args = parser.parse_args()
    runs = [Run.read(path) for path in args.runs]
    Console(width=120).print(table_of(runs))
    draw(runs, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
