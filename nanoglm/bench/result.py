"""Result: the rows of one benchmark with what they were measured on; tables, JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanoglm.errors import InputError
from nanoglm.ops import cpu

Row = dict[str, Any]


class Column(NamedTuple):
    """Where a table's cell comes from and what it means."""

    title: str
    key: str
    form: str
    meaning: str

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        return "" if value is None else format(value, self.form)


_SPREAD = (
    Column("min", "low", ",.4g", "the fastest round"),
    Column("max", "high", ",.4g", "the slowest round"),
)
_PARTS = (
    Column("indexer", "indexer", ",.4g", "of that, scoring and top-k of all Full layers"),
    Column("attention", "attention", ",.4g", "of that, sparse attention of all layers"),
    Column("rest", "rest", ",.4g", "of that, all else: projections, experts, norms, writing the cache"),
    Column(
        "indexer : rest", "ratio", ".2f", "indexer over everything else (attention included): what sharing can save"
    ),
)
_PEER_SPEED = Column("times ours", "times", ".2f", "the peer's time over ours")
COLUMNS: dict[str, tuple[Column, ...]] = {
    "ceilings": (
        Column("ceiling", "name", "", "a library's routine that the ops are held against; its result is not used"),
        Column("ms", "ms", ",.4g", "milliseconds of one call, median of the rounds"),
        *_SPREAD,
        Column("rate", "rate", ",.0f", "operations or bytes by the median time"),
        Column("unit", "unit", "", "of the rate: GFLOP/s (a multiply-add counts two; int8 alike) or GB/s"),
    ),
    "ops": (
        Column("op", "name", "", "the op with its shape and dtype"),
        Column("ms", "ms", ",.4g", "milliseconds of one call, median of the rounds"),
        *_SPREAD,
        Column("rate", "rate", ",.0f", "necessary operations (or bytes of weights) by the median time"),
        Column("unit", "unit", "", "of the rates"),
        Column("limit", "limit_rate", ",.0f", "the rate of the limit, measured in the same rounds"),
        Column("limit is", "limit", "", "the ceiling taken: of several, the fastest"),
        Column("share", "share", ".0%", "rate over limit"),
        Column("peer", "peer", "", "what else does it"),
        Column("peer ms", "peer_ms", ",.4g", "the peer's time for the same inputs, in the same rounds"),
        _PEER_SPEED,
        Column("differs", "differs", ".2g", "of Selections the share of positions that the peer has not chosen, of "
               "attention the relative difference"),
    ),
    "prefill": (
        Column("tokens", "length", ",", "length of the prompt"),
        Column("layers", "pattern", "", "all-Full: every layer runs its indexer; IndexShare: one in four"),
        Column("s", "seconds", ",.4g", "seconds of the whole prefill, median of the rounds"),
        *_SPREAD,
        *_PARTS,
        Column("speed-up", "speed_up", ".2f", "all-Full over IndexShare, median over the rounds' pairs"),
        Column("scoring alone", "scoring", ".2f", "speed-up if of the Shared layers' indexers only scoring and top-k "
               "had gone; their projections, counted in the rest, go too"),
        Column("limit", "limit", ".2f", "all-Full's scored pairs over IndexShare's: what the speed-up tends to"),
        Column("predicted", "predicted", ".2f", "by the cost model, fitted to all lengths but this one"),
        Column("off", "off", "+.1%", "prediction over measurement, less one"),
        Column("3 constants", "predicted_3", ".2f", "the same with a third constant for the indexers' projections"),
        Column("off (3)", "off_3", "+.1%", "of that"),
    ),
    "whole": (
        Column("part", "part", "", "of one single prefill"),
        Column("s", "seconds", ",.4g", "seconds measured (one run)"),
        Column("limit", "limit", ",.4g", "seconds if each op ran throughout as fast as alone on the last chunk, and "
               "the rest as in a prompt of one chunk"),
        Column("share", "share", ".0%", "limit over measured"),
        Column("GEMM bound", "gemm", ",.4g", "seconds if all its operations ran at the rate of plain matrix products"),
        Column("share of it", "gemm_share", ".0%", "bound over measured"),
    ),
    "run": (
        Column("tokens", "length", ",", "length of the prompt"),
        Column("prefill s", "seconds", ",.4g", "seconds of the whole prefill"),
        Column("tokens/s", "rate", ",.0f", "of the prefill"),
        Column("decoded", "decoded", ",", "tokens generated after it"),
        Column("s", "decode_seconds", ",.4g", "seconds for those"),
        Column("tokens/s ", "decode_rate", ",.1f", "of decoding"),
        Column("peak GB", "peak_gb", ",.2f", "most memory the process ever held; on a GPU, in tensors"),
        Column("held GB", "held_gb", ",.2f", "of that, weights and the cache of all tokens, as known beforehand"),
        Column("foretold GB", "foretold_gb", ",.2f", "printed before it ran: weights, cache, what scoring holds, and "
               "activations of a chunk as if in fp32"),
    ),
    "peer": (
        Column("engine", "engine", "", "each run is a process of its own"),
        Column("memory", "memory", "", "default, or huge pages (THP_MEM_ALLOC_ENABLE=1)"),
        Column("tokens", "length", ",", "length of the prompt"),
        Column("prefill s", "seconds", ",.4g", "median of the processes"),
        *_SPREAD,
        Column("decode ms", "decode_ms", ",.4g", "milliseconds a token after it, median"),
        Column("peak GB", "peak_gb", ",.2f", "most memory a process ever held, median"),
        Column("times ours", "times", ".1f", "prefill seconds over ours with the same memory setting"),
        Column("times bound", "most", ".1f", "over all our operations at the rate of plain bf16 products, in this run"),
    ),
    "engine": (
        Column("requests", "requests", ",", "that come at once"),
        Column("way", "way", "", "plain loop: one after another; engine: together, without drafts; then with"),
        Column("tokens/s", "rate", ",.1f", "of all requests, median of the rounds"),
        *_SPREAD,
        Column("first ms", "first", ",.4g", "to a request's first token, median of the requests"),
        Column("between ms", "between", ",.4g", "between two of its tokens, likewise"),
        Column("accepted", "accepted", ".2f", "tokens that a verification gives"),
        Column("over engine", "gain", ".2f", "tokens/s over the engine's without drafts, median of the rounds' pairs"),
        Column("over plain", "plain", ".2f", "tokens/s over the plain loop's, likewise"),
        Column("of ideal", "ideal", ".0%", "between ms without drafts over this, as a share of accepted / (c_verify + "
               "k c_draft), costs measured beside it of the model's passes alone"),
    ),
    "prefix": (
        Column("prefix cache", "kept", "", "whether pages of earlier requests are kept"),
        Column("shared tokens", "shared", ",", "with which both prompts begin; then each has 64 of its own"),
        Column("known", "hit", ",", "of them, found when the second comes"),
        Column("first ms", "first", ",.4g", "to the first request's first token, median"),
        Column("second ms", "second", ",.4g", "to the second's, which comes when the first has ended"),
        Column("share", "share", ".1%", "second over first, median of the rounds' pairs"),
    ),
    "generate": (
        Column("engine", "engine", "", "each run is a process of its own"),
        Column("prompt", "length", ",", "tokens of the prompt"),
        Column("first s", "first", ",.4g", "to the first token, median of the processes"),
        Column("between ms", "between", ",.4g", "between two tokens, greedy, median"),
        Column("tokens/s", "rate", ",.1f", "of the whole call"),
        *_SPREAD,
        Column("ours over it", "times", ".1f", "our tokens/s over its own"),
        Column("alike", "alike", ",", "tokens that are ours before the first that is not"),
        Column("gap", "gap", ".1g", "between our two best logits there"),
    ),
    "step": (
        Column("attention", "form", "", "masked: unselected keys are masked; sparse: selected ones are gathered; "
               "dense: all keys, and no indexers"),
        Column("tokens", "length", ",", "length of the one sequence"),
        Column("s", "seconds", ",.4g", "forward and backward with the indexers' KL (dense: without); on a CPU each in "
               "its own process"),
        *_SPREAD,
        Column("tokens/s", "rate", ",.0f", "of those"),
        Column("peak GB", "peak_gb", ",.2f", "most memory a process ever held; on a GPU, in tensors"),
        Column("speed-up", "speed_up", ".2f", "masked over this"),
    ),
    "curve": (
        Column("step", "step", ",", "of training"),
        Column("stage", "stage", "", "dense: all keys; indexer_warmup: the indexers alone; long: under Selections"),
        Column("loss", "loss", ".4f", "nats a token, next tokens"),
        Column("KL", "kl", ".4f", "of the indexers"),
        Column("s", "seconds", ",.1f", "since the beginning"),
        Column("tokens/s", "rate", ",.0f", "since the beginning"),
    ),
    "decode": (
        Column("tokens", "length", ",", "tokens in the cache"),
        Column("layers", "pattern", "", "all-Full: every layer runs its indexer; IndexShare: one in four"),
        Column("ms", "ms", ",.4g", "milliseconds a token, median"),
        *_SPREAD,
        *_PARTS,
        Column("limit", "limit", ",.4g", "milliseconds to read each needed byte once at the bandwidth measured in the "
               "same rounds; a share beyond 100 % means that caches held some of it"),
        Column("share", "share", ".0%", "limit over measured"),
        Column("speed-up", "speed_up", ".2f", "all-Full over IndexShare"),
    ),
}  # fmt: skip


def machine() -> dict[str, Any]:
    """What figures depend on."""
    best = cpu.best()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":")[::2] for line in reversed(lines))
    about = {name.strip(): value.strip() for name, value in pairs}  # of the first processor
    name, numbers = about.get("model name"), (about.get("cpu family"), about.get("model"))
    kind = f"{name} (family {numbers[0]}, model {numbers[1]})" if name and all(numbers) else name
    return {
        "cpu": kind or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": best.name if best else "none (PyTorch)",
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


@dataclass
class Result:
    """Rows by table (see COLUMNS). ``fit``: constants of the cost model. ``notes``: what is missing, and why."""

    bench: str
    rounds: int
    shape: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    fit: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)
    command: str = ""

    def save(self, file: Path) -> None:
        """Raises InputError if the file cannot be written; nothing half-written is left."""
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"out is {file}, which cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, file: Path) -> Result:
        """Raises InputError unless the file holds a Result with known tables."""
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            result = cls(**raw)
            known = all(name in COLUMNS for name in result.rows)
            for name, rows in result.rows.items() if known else ():
                for row in rows:
                    [column.cell(row) for column in COLUMNS[name]]
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}; expected JSON of nanoglm bench") from None
        except (ValueError, TypeError, AttributeError):
            known = False
        if not known:
            raise InputError(f"{file} holds something else; expected JSON of nanoglm bench")
        return result


def check_out(file: Path | None) -> None:
    """Before measuring for an hour: raises InputError if the file could not be written."""
    if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
        raise InputError(f"out is {file}, which cannot be written; expected a file in a folder that is there")
