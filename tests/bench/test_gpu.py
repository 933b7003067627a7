"""The GPU's benchmark as far as a CPU can run it: its harness, over the CPU's ops at small sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoglm.bench import gpu, gpu_models
from nanoglm.bench.report import report
from nanoglm.bench.result import Result
from nanoglm.bench.shapes import Subject, bench_nano
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


class Held(TorchDispatchMode):
    """Watches the bytes of all tensors there are, after each operator; most: of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and not x.is_meta:
                storage = x.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._held.values()))
        return found


def test_a_million_tokens_hold_no_more_than_was_foretold(capsys: pytest.CaptureFixture[str]) -> None:
    """As many as a CPU does in a second, in a whole chunk; rows are bf16 in the main, and foretold in fp32."""
    with Held() as held:
        (row,) = gpu_models.million(3, 128, "cpu")
    assert row["length"] == gpu_models.CHUNK
    beside = held.most / 1e9 - row["held_gb"]
    assert 0 < beside < row["foretold_gb"] - row["held_gb"] < 6 * beside
    number = r"(\d[\d.e-]*) GB"
    said = re.fullmatch(
        rf"8,256 tokens will take: weights {number}, cache {number}, scoring 0 GB, activations of 8,192 rows {number}, "
        rf"together {number}\n", capsys.readouterr().err,
    )  # fmt: skip
    assert said is not None
    weights, cache, activations, together = map(float, said.groups())
    assert together == pytest.approx(row["foretold_gb"], rel=1e-2)
    assert together == pytest.approx(weights + cache + activations, rel=1e-2)


def test_what_is_foretold_is_what_tensors_take() -> None:
    subject = Subject(bench_nano(), 1000)
    memory = gpu_models.foretold(subject)
    assert memory.weights == sum(x.nbytes for x in subject.model.state_dict().values())
    layers, full = range(subject.config.num_hidden_layers), subject.config.full_layers
    rows = [x.untyped_storage().nbytes() for x in (subject.cache.latent(i)[0] for i in layers)]
    assert memory.cache == sum(rows) + sum(subject.cache.index_keys(i).nbytes for i in full)
    assert memory.total == memory.weights + memory.cache + memory.activations + memory.scratch and not memory.scratch


def test_a_page_shows_what_was_foretold_and_does_without(tmp_path: Path) -> None:
    old = Path(__file__).parents[2] / "bench/results/nvidia-h200/gpu.json"
    result = Result.load(old)
    for foretold, head in ((None, "peak GB | held GB |\n"), (4.25, "peak GB | held GB | foretold GB |\n")):
        if foretold:
            result.rows["run"][0]["foretold_gb"] = foretold
        result.save(tmp_path / "gpu.json")
        report((tmp_path / "gpu.json",), tmp_path / "page.md")
        text = (tmp_path / "page.md").read_text()
        assert head in text and ("| 4.25 |\n" in text) == bool(foretold)
