"""Held-out sums as a file, and a task for inspect-ai that reads it.

python recipes/harness/sums.py sums.jsonl --count 100
inspect eval recipes/harness/sums.py --model openai-api/nanoglm/assistant --model-base-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FILE = "sums.jsonl"


def write(path: Path, count: int, seed: int = 0) -> None:
    """One problem a line: a question, its answer, and three wrong ones beside it."""
    import numpy as np

    from nanoglm.dialogues import problem

    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            drawn = problem(rng, held_out=True)
            wrong = [drawn.answer + int(step) for step in rng.choice([-20, -10, -2, -1, 1, 2, 10, 20], 3, replace=False)]
            choices = [f"The answer is {value}." for value in (drawn.answer, *wrong)]
            line = {"input": f"What is {drawn.expression}?", "target": str(drawn.answer), "choices": choices}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[sys.argv.index("--count") + 1]) if "--count" in sys.argv else 100)
else:  # inspect-ai looks for tasks in what it loads
    from inspect_ai import Task, task
    from inspect_ai.dataset import json_dataset
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    @task
    def sums(file: str = FILE) -> Task:
        """Every question once, right if the answer's last number is."""
        return Task(dataset=json_dataset(str(Path(file).resolve())), solver=[generate()], scorer=match(numeric=True))
