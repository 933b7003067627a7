"""A task for inspect-ai over a local file: every question once, right if the answer's last number is.

inspect eval sums_inspect.py --model openai-api/nanoglm/assistant --model-base-url http://127.0.0.1:8000/v1
"""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def sums(file: str = "sums.jsonl") -> Task:
    """Reads what sums.py wrote."""
    return Task(dataset=json_dataset(str(Path(file).resolve())), solver=[generate()], scorer=match(numeric=True))
