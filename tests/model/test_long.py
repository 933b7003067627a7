"""Long prompts: memory stays O(tile), time at most quadratic, and the work is exactly the formula's."""

import json
import subprocess
import sys

import pytest
import torch

from nanoglm.api import load
from nanoglm.model import BatchStore
from nanoglm.ops import Batch, count_work

# In a process of its own, so that nobody else's memory is counted. CPU seconds, not wall time: the
# machine may be busy.
PREFILL = """
import json, sys, time
import torch
from nanoglm.api import load
from nanoglm.cache import PAGE, PagedCache
from nanoglm.engine.generate import prefill
from nanoglm.memory import peak_memory
from nanoglm.ops import count_work

torch.set_num_threads(1)
model = load("tiny").module
result = {}
for length in (16_384, 65_536):
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = PagedCache(model.config, length // PAGE)
    began = time.process_time()
    with count_work() as work:
        prefill(model, cache, cache.open(), ids)
    result[length] = [time.process_time() - began, work.pairs_scored, work.rows_attended]
result["peak"] = 1e9 * peak_memory()  # not ru_maxrss: that begins with what the process had that started this one
print(json.dumps(result))
"""


def formula(length: int, full: int, layers: int, k: int) -> tuple[int, int]:
    """Pairs scored by ``full`` indexers, rows attended in ``layers`` layers."""
    return full * length * (length + 1) // 2, layers * sum(min(t + 1, k) for t in range(length))


def test_prefill_of_65536_tokens() -> None:
    """Under 1.5 GB resident, log-log slope of time from 16K to 64K at most 2.1, work as computed."""
    done = subprocess.run([sys.executable, "-c", PREFILL], capture_output=True, text=True, timeout=580, check=True)
    result = json.loads(done.stdout)
    for length in (16_384, 65_536):
        _, pairs, rows = result[str(length)]
        whole, tail = formula(length, full=2, layers=3, k=16), 16  # the last layer, a Shared one, works at one row
        assert (pairs, rows) == (whole[0], whole[1] + tail)
    assert result["peak"] < 1.5e9
    ratio = result["65536"][0] / result["16384"][0]
    assert ratio <= 4**2.1, result


@pytest.mark.parametrize("preset", ["tiny", "nano"])
@torch.no_grad()
def test_work_is_that_of_the_schedule(preset: str) -> None:
    """Only Full layers score, every layer attends to at most k rows; dense attention does neither."""
    model = load(preset).module
    config = model.config
    ids, batch = torch.arange(180) % 250, Batch.contiguous([150, 30])
    with count_work() as work:
        model(ids, batch, BatchStore())
    parts = [formula(n, len(config.full_layers), config.num_hidden_layers, config.index_topk) for n in (150, 30)]
    assert (work.pairs_scored, work.rows_attended) == tuple(map(sum, zip(*parts, strict=True)))
    with count_work() as work:
        model(ids, batch, BatchStore(), attention="dense")
    assert (work.pairs_scored, work.rows_attended) == (0, 0)
