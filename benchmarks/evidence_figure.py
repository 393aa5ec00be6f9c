"""Draws docs/evidence.png from benchmarks/results/overfit-0.5b-*.jsonl and fresh-0.5b-*.jsonl."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from megatron_opsd.reliability.run_dir import read_jsonl

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
FIXED = {
    "none": "float32",
    "bf16": "bfloat16, as checkpoints are",
    "dither": "bfloat16, dithered",
}
FRESH = {
    "bf16-3e-6": "3e-6, bfloat16",
    "dither-3e-6": "3e-6, dithered",
    "dither-1e-6": "1e-6, dithered",
    "warmup-1e-6": "1e-6, dithered, with warm-up",
}
WINDOW = 3  # steps of the moving mean for fresh rollouts


def draw(axes: tuple[Axes, Axes], name: str, label: str, window: int) -> None:
    rows = read_jsonl(RESULTS / f"{name}.jsonl")
    left, right = axes
    ends = range(window, len(rows) + 1)
    steps = [rows[end - 1]["step"] for end in ends]

    def means(key: str) -> list[float]:
        return [sum(row[key] for row in rows[end - window : end]) / window for end in ends]

    left.plot(steps, means("divergence"), label=label)
    gaps = [
        student - teacher for student, teacher in zip(means("entropy_student"), means("entropy_teacher"), strict=True)
    ]
    right.plot(steps, gaps, label=label)


def main() -> None:
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for row, prefix, names, window in ((0, "overfit", FIXED, 1), (1, "fresh", FRESH, WINDOW)):
        for name, label in names.items():
            draw(tuple(panels[row]), f"{prefix}-0.5b-{name}", label, window)
    for row, what in ((0, "one batch, lr 3e-6"), (1, f"fresh rollouts, means of {WINDOW} steps")):
        for column, quantity in ((0, "forward KL, nats"), (1, "entropy: student's less teacher's")):
            panels[row, column].set(title=what, xlabel="step", ylabel=quantity)
        panels[row, 0].set_ylim(bottom=0)
        panels[row, 1].axhline(0, color="0.8", zorder=0)
        panels[row, 0].legend(fontsize="small")
    figure.savefig(ROOT / "docs/evidence.png", dpi=110)


if __name__ == "__main__":
    main()
