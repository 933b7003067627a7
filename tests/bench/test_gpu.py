"""The GPU's benchmark as far as a CPU can run it: its harness, over the CPU's ops at small sizes."""

from __future__ import annotations

import pytest
import torch

from nanoglm.bench import gpu
from nanoglm.bench.timing import Sample
from nanoglm.errors import InputError

pytest.importorskip("triton")


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="no GPU is to be seen"):
        gpu.bench_gpu()
    with pytest.raises(InputError, match="rounds is 2"):
        gpu.bench_gpu(2)


@pytest.mark.parametrize("part", [gpu.indexers, gpu.attentions, gpu.experts, gpu.gradients])
def test_ops_stand_beside_their_limits_and_peers(part) -> None:
    """The limit that binds is the one whose time is longer, and a peer that does the same differs little."""
    limits = {"flops": 1e12, "bytes": 1e11}
    rows = []
    for op in part(2048, 64):
        row = gpu.row_of(op, 3, limits)
        seconds = max(op.flops / 1e12, op.bytes / 1e11)
        assert row["share"] == pytest.approx(seconds / row["ms"] * 1e3)
        assert row["limit"] == ("product" if op.flops / 1e12 == seconds else "copy")
        rows.append(row)
        if "differs" in row:
            assert row["differs"] < 0.02, op.name
    assert len({row["name"] for row in rows}) == len(rows)


def test_of_several_calls_in_one_run_figures_are_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "timed", lambda run, rounds: Sample(0.02, 0.016, 0.04))
    row = gpu.row_of(gpu.Op("four", lambda: None, 0.0, 1e9, calls=4), 3, {"flops": 1.0, "bytes": 1e12})
    assert [row[name] for name in ("ms", "low", "high")] == [5, 4, 10]
    assert row["share"] == pytest.approx(0.2) and row["rate"] == pytest.approx(200)
