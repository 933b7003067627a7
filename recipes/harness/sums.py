"""Held-out sums as a file for evaluation harnesses: one problem a line, its answer, three wrong ones beside it.

python recipes/harness/sums.py sums.jsonl --count 100
"""

import json
import sys
from pathlib import Path

import numpy as np

from nanoglm.dialogues import problem


def write(path: Path, count: int, seed: int = 0) -> None:
    """Writes so many problems that training never drew."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            drawn = problem(rng, held_out=True)
            wrong = [
                drawn.answer + int(step) for step in rng.choice([-20, -10, -2, -1, 1, 2, 10, 20], 3, replace=False)
            ]
            choices = [f"The answer is {value}." for value in (drawn.answer, *wrong)]
            line = {"input": f"What is {drawn.expression}?", "target": str(drawn.answer), "choices": choices}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[sys.argv.index("--count") + 1]) if "--count" in sys.argv else 100)
