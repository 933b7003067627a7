"""What a search costs: restarting candidates where they part, and passing all through a layer while it is in memory.

python recipes/indexcache_cost.py --out runs/cost

Three ways to do a whole greedy search, in turns, medians of the rounds: every candidate by itself from the first layer
on; candidates that restart; and, with the layers read from a checkpoint, one candidate at a time against all together.
Then a model that is larger than the memory it is searched in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
import tyro

from nanoglm.config import FULL, GLMConfig
from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.evaluate import Evaluator, Score
from nanoglm.indexcache.search import Search
from nanoglm.indexcache.stack import GLMStack
from nanoglm.memory import peak_memory
from nanoglm.model import GLM
from nanoglm.model.block import DecoderLayer
from nanoglm.train.data import Sample
from nanoglm.weights import materialise, save

SEARCHED = "searched"  # the child's mode


class FromDisk(GLMStack):
    """Layers are read anew each time: what a disk's cache kept of them is dropped, as if the model were larger."""

    def layer(self, index: int) -> DecoderLayer:
        assert self.checkpoint is not None
        found = super().layer(index)
        for file in self.checkpoint.directory.glob("*.safetensors"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return found


class OneByOne(Evaluator):
    """Every candidate by itself, from the first layer on."""

    def scores(self, patterns: Iterable[str], committed: str | None = None) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for pattern in patterns:
            found |= super().scores([pattern])
        return found


def config_of(layers: int, width: int) -> GLMConfig:
    """All layers Full; ``width`` decides what a layer's weights take."""
    return GLMConfig.from_dict({
        "vocab_size": 512, "hidden_size": width, "num_hidden_layers": layers, "first_k_dense_replace": 1,
        "num_attention_heads": 8, "q_lora_rank": width // 2, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 64, "index_n_heads": 4, "index_head_dim": 64, "index_topk": 32,
        "intermediate_size": 4 * width, "moe_intermediate_size": width // 2, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 0, "index_topk_freq": 1,
        "rope_parameters": {"rope_theta": 10_000}, "max_position_embeddings": 4096,
    })  # fmt: skip


def random_model(layers: int, width: int) -> GLM:
    """With random weights."""
    with torch.device("meta"):
        model = GLM(config_of(layers, width))
    materialise(model, torch.float32, "cpu")
    model.initialise(0)
    assert set(model.config.indexer_types) == {FULL}
    return model.eval()


def sequences(count: int, length: int) -> Calibration:
    """Random tokens."""
    ids = torch.randint(512, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return Calibration(Sample.of(ids), ("random",) * count)


def timed(make: Callable[[], Evaluator], full: int) -> tuple[float, str]:
    """Seconds of a greedy search, and what it found."""
    began = time.perf_counter()
    row = Search(make()).greedy(full)[-1]
    return time.perf_counter() - began, row.pattern


def versus(name: str, ways: dict[str, Callable[[], Evaluator]], full: int, rounds: int) -> dict[str, object]:
    """All ways in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        patterns = set()
        for way, make in ways.items():
            took, pattern = timed(make, full)
            seconds[way].append(took)
            patterns.add(pattern)
        if len(patterns) != 1:
            raise SystemExit(f"{name}: the ways disagree, {patterns}")
    slow, fast = ways
    ratio = median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    print(
        f"{name}: {slow} {median(seconds[slow]):.1f} s, {fast} {median(seconds[fast]):.1f} s, {ratio:.2f} times faster"
    )
    return {"name": name, "seconds": seconds, "ratio": ratio}


def within(folder: Path, layers: int, budget: int) -> dict[str, object]:
    """A search of a checkpoint larger than the budget, in a process of its own, whose memory is measured."""
    command = [sys.executable, __file__, SEARCHED, str(folder), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(
        f"{layers} layers, {size / 1e6:.0f} MB on disk, searched in {found['took']:.0f} s with {found['more']:.0f} MB "
        f"more than the process without a model (budget {budget / 1e6:.0f} MB): {found['pattern']}"
    )
    return found | {"bytes": size, "budget": budget}


def searched(folder: Path, budget: int) -> None:
    """The child: a quarter of the budget for states, the rest for one layer and what it works with."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, began = peak_memory() or 0.0, time.perf_counter()
    evaluator = Evaluator(GLMStack.streamed(folder), sequences(8, 128), budget=budget // 4, batch_tokens=256)
    pattern = Search(evaluator).greedy(20)[-1].pattern
    more = ((peak_memory() or 0.0) - before) * 1e3
    print(json.dumps({"pattern": pattern, "took": time.perf_counter() - began, "more": more}))


def main(out: Path, rounds: int = 3, layers: int = 12, width: int = 256, budget: int = 400_000_000) -> None:
    """Measures and writes cost.json.

    Args:
        out: A folder, also for the checkpoints, which are removed.
        rounds: Of each comparison.
        layers: Of the models that are searched whole.
        width: Of the hidden states.
        budget: Bytes that the search of the larger model may take.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, data = random_model(layers, width), sequences(8, 128)
    rows: list[object] = []
    rows.append(versus(
        "restart", {
            "from the first layer": lambda: OneByOne(GLMStack(model), data, restart=False),
            "where candidates part": lambda: Evaluator(GLMStack(model), data),
        }, layers // 4, rounds,
    ))  # fmt: skip
    folder = out / "model"
    save(random_model(layers, 2 * width), folder, dtype=torch.float32)
    os.sync()  # what is not written yet cannot be dropped
    few = sequences(2, 64)
    rows.append(versus(
        "layers from a disk", {
            "one candidate at a time": lambda: OneByOne(FromDisk.streamed(folder), few, restart=False),
            "all through a layer": lambda: Evaluator(FromDisk.streamed(folder), few),
        }, layers // 4, rounds,
    ))  # fmt: skip
    shutil.rmtree(folder)
    save(random_model(24, 3 * width), folder, dtype=torch.float32)
    rows.append(within(folder, 24, budget))
    shutil.rmtree(folder)
    (out / "cost.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [SEARCHED]:
        searched(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        tyro.cli(main)
