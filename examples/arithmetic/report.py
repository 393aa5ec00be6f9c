"""Show what OPSD did: `python examples/arithmetic/report.py RUN_DIR [RUN_DIR ...]`.

Prints a table of the runs, accuracy before and after, and draws `accuracy.png` in the first run's directory.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")  # a file, whether or not there is a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from megatron_opsd.reliability.run_dir import read_jsonl

COLUMNS = 3  # panels in a row of the figure


class Run(NamedTuple):
    """What one run directory recorded."""

    name: str
    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]


def read_run(path: Path) -> Run:
    """Read metrics.jsonl and evaluations.jsonl of a run."""
    steps, evaluations = (read_jsonl(path / file) for file in ("metrics.jsonl", "evaluations.jsonl"))
    return Run(path.absolute().name, steps, evaluations)


def table_of(runs: list[Run]) -> Table:
    """One row a run: held-out accuracy before and after, and what it took."""
    table = Table(title="Held-out accuracy, before and after")
    for heading in ("run", "greedy", "sampled", "steps", "minutes in steps"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for run in runs:
        before, after = run.evaluations[0], run.evaluations[-1]
        changes = (f"{before[key]:.1%} to {after[key]:.1%}" for key in ("greedy", "average"))
        seconds = sum(step["seconds_total"] for step in run.steps)
        table.add_row(run.name, *changes, str(len(run.steps)), f"{seconds / 60:.1f}")
    return table


def draw_run(axes: Axes, run: Run) -> None:
    """One panel: accuracy over steps."""
    # The rollouts of step n come from the weights after n - 1 steps.
    axes.plot(
        [step["step"] - 1 for step in run.steps],
        [step.get("accuracy", math.nan) for step in run.steps],
        color="0.65",
        linewidth=0.9,
        label="rollouts (training problems, sampled)",
    )
    tested = [evaluation["step"] for evaluation in run.evaluations]
    for key, label, color, marker in (
        ("average", "held-out, sampled at temperature 1", "tab:orange", "s"),
        ("greedy", "held-out, greedy", "tab:blue", "o"),
    ):
        values = [evaluation[key] for evaluation in run.evaluations]
        axes.plot(tested, values, color=color, marker=marker, markersize=4.5, linewidth=2, label=label)
    axes.set(title=run.name, xlabel="optimizer steps", ylim=(0, 1.03), xlim=(-1, tested[-1] + 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def draw(runs: list[Run], path: Path) -> None:
    """One panel a run, on the same scale, and one legend for all."""
    columns = min(len(runs), COLUMNS)
    rows = -(-len(runs) // columns)
    width = max(5.5, 3.6 * columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(width, 3.1 * rows + 0.6), sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for axes, run in zip(panels, runs, strict=False):
        draw_run(axes, run)
    for axes in panels[len(runs) :]:
        axes.remove()
    for row in grid:
        row[0].set_ylabel("problems solved")
    handles, labels = panels[0].get_legend_handles_labels()
    # The rollouts were drawn first, to lie behind; a reader wants the held-out accuracy first.
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3 if columns > 1 else 1, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description="Accuracy before, during and after OPSD runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, one panel each")
    args = parser.parse_args()
    runs = [read_run(path) for path in args.runs]
    Console().print(table_of(runs))
    figure = args.runs[0] / "accuracy.png"
    draw(runs, figure)
    print(f"figure: {figure}")


if __name__ == "__main__":
    main()
