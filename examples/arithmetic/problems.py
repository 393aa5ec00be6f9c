r"""Three-digit addition, worked column by column.

    Compute 347+285.
    7+5+0=12. 4+8+1=13. 3+2+1=6. The answer is \boxed{632}.

`python examples/arithmetic/problems.py --out DIR` writes `train.jsonl` and `test.jsonl` (columns problem, solution,
answer, carries). A hash of the operands decides which problems are held out, so no file has to be consulted to keep
the two apart, and no run can train on a problem that another run tests.
"""

import argparse
import json
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_opsd.types import Example


class Addition(NamedTuple):
    """Two addends of three digits each."""

    left: int
    right: int


def is_held_out(problem: Addition) -> bool:
    """Whether the problem is for testing only (one in ten). Both orders of the same addends fall on the same side."""
    low, high = sorted(problem)
    return zlib.crc32(f"{low}+{high}".encode()) % 10 == 0


def draw(rng: random.Random, *, held_out: bool) -> Addition:
    """Draw one problem from the asked side of the split."""
    while True:
        problem = Addition(rng.randint(100, 999), rng.randint(100, 999))
        if is_held_out(problem) == held_out:
            return problem


def draw_distinct(count: int, seed: int, *, held_out: bool) -> list[Addition]:
    """Draw `count` different problems from the asked side of the split."""
    rng = random.Random(seed)
    drawn: dict[Addition, None] = {}
    while len(drawn) < count:
        drawn[draw(rng, held_out=held_out)] = None
    return list(drawn)


def work_out(problem: Addition, rng: random.Random | None = None, slip: float = 0.0) -> str:
    """Write the solution out. With `rng`, each carry that is due is forgotten with probability `slip`."""
    carry, steps, result = 0, [], ""
    for column in range(3):
        left, right = (addend // 10**column % 10 for addend in problem)
        total = left + right + carry
        steps.append(f"{left}+{right}+{carry}={total}.")
        result = (str(total) if column == 2 else str(total % 10)) + result
        carry = int(total >= 10)
        if carry and rng is not None and rng.random() < slip:
            carry = 0
    return f"{' '.join(steps)} The answer is \\boxed{{{result}}}."


def count_carries(problem: Addition) -> int:
    """How many columns carry: how difficult the problem is."""
    return sum(sum(addend % 10**column for addend in problem) >= 10**column for column in (1, 2, 3))


def as_example(problem: Addition, index: int = 0) -> Example:
    """The problem with its right solution and answer, as a training step sees it."""
    left, right = problem
    return Example(index, f"Compute {left}+{right}.", work_out(problem), str(left + right), count_carries(problem))


def write_jsonl(path: Path, problems: Iterable[Addition]) -> None:
    """Write one row per problem with the columns problem, solution, answer and carries."""
    rows = map(as_example, problems)
    lines = [
        json.dumps({"problem": row.problem, "solution": row.solution, "answer": row.answer, "carries": row.difficulty})
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description="Write the addition problems as train.jsonl and test.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files; made if missing")
    parser.add_argument("--train", type=int, default=4096, help="rows of train.jsonl")
    parser.add_argument("--test", type=int, default=500, help="rows of test.jsonl, all held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "train.jsonl", draw_distinct(args.train, args.seed, held_out=False))
    write_jsonl(args.out / "test.jsonl", draw_distinct(args.test, args.seed, held_out=True))
    print(f"wrote {args.train} training and {args.test} held-out problems to {args.out}")


if __name__ == "__main__":
    main()
