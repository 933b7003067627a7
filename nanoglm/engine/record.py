"""Recording what each token selected and which experts it visited, and replaying it.

A :class:`Trace` holds one sequence: its token ids, the Selection rows of each Full layer and the experts
chosen on each MoE layer, in positions of the sequence. So it does not matter in which chunks, batches or
pages a trace came to be: what decoding recorded replays over the whole sequence at once, with other weights
or another backend. A :class:`Recording` is a file of traces. The MTP layer is not recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoglm.config import GLMConfig
from nanoglm.errors import InputError

FORMAT = "nanoglm-recording-1"
# What decides which Selections and routes a model can have.
SHAPE = (
    "num_hidden_layers", "indexer_types", "mlp_layer_types", "index_topk", "n_routed_experts",
    "num_experts_per_tok", "vocab_size",
)  # fmt: skip


class Trace:
    """One sequence's token ids, Selections and routes, growing as tokens are run."""

    def __init__(self, config: GLMConfig) -> None:
        self.config = config
        self.ids: list[int] = []
        self._selections: dict[int, list[Tensor]] = {i: [] for i in config.full_layers}
        self._routes: dict[int, list[Tensor]] = {i: [] for i in _moe_layers(config)}

    def append(self, ids: Sequence[int], selections: Sequence[Tensor | None], routes: Mapping[int, Tensor]) -> None:
        """Adds rows: ``selections`` one int32 [t, K] a layer, ``routes`` int64 [t, k] per MoE layer."""
        chosen = {layer: selections[layer] for layer in self._selections}
        for layer, given in chosen.items():
            if given is None:
                raise InputError("attention is 'dense'; expected an attention that selects, to record it")
            if given.shape[1] != self.config.index_topk:
                raise InputError(
                    f"Selection of layer {layer} is {given.shape[1]} wide; expected index_topk "
                    f"({self.config.index_topk}), to record it"
                )
        self.ids += ids
        for layer, given in chosen.items():
            assert given is not None
            self._selections[layer].append(given.cpu())
        for layer, rows in self._routes.items():
            rows.append(routes[layer].to("cpu", torch.int32))

    def cut(self, length: int) -> None:
        """Keeps the first ``length`` tokens: the others were drafts that came to nothing, or are computed anew."""
        extra, self.ids = max(0, len(self.ids) - length), self.ids[:length]
        for rows in (*self._selections.values(), *self._routes.values()):
            left = extra
            while left:
                last = rows.pop()
                if len(last) > left:
                    rows.append(last[: len(last) - left])
                left -= min(left, len(last))

    @property
    def selections(self) -> dict[int, Tensor]:
        """Full layer -> int32 [n, K], logical positions ascending, -1 after the valid ones."""
        return {layer: _joined(rows) for layer, rows in self._selections.items()}

    @property
    def routes(self) -> dict[int, Tensor]:
        """MoE layer -> int32 [n, k], the experts in the order of their choice."""
        return {layer: _joined(rows) for layer, rows in self._routes.items()}

    def rows(self, begin: int, ids: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Any]:
        """``selections`` and ``routes`` of these tokens, as :class:`GLM` takes them.

        Raises:
            InputError: the tokens at ``begin`` and after are not those recorded.
        """
        for at, token in enumerate(ids, begin):
            recorded = self.ids[at] if at < len(self.ids) else None
            if token != recorded:
                found = f"token {recorded}" if recorded is not None else f"only {len(self.ids)} tokens"
                raise InputError(f"replayed sequence has token {token} at position {at}; the recording has {found}")
        end = begin + len(ids)
        chosen = {layer: rows[begin:end].to(device) for layer, rows in self.selections.items()}
        every, last = [], None
        for layer in range(self.config.num_hidden_layers):
            last = chosen.get(layer, last)  # a Shared layer's Selection is its source's object
            every.append(last)
        routes = {layer: rows[begin:end].to(device, torch.int64) for layer, rows in self.routes.items()}
        return {"selections": every, "routes": routes}


class Recording:
    """Traces of several sequences, in the order in which they began.

    Attributes:
        config: of the model they are meant for. traces: the sequences.
    """

    def __init__(self, config: GLMConfig) -> None:
        self.config = config
        self.traces: list[Trace] = []

    def begin(self) -> Trace:
        """A new, empty trace at the end."""
        self.traces.append(Trace(self.config))
        return self.traces[-1]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with hashes of configuration and tokens; all or nothing.

        Raises:
            InputError: the file cannot be written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        traces = [trace for trace in self.traces if trace.ids]  # a stream that was never drawn from has none
        for i, trace in enumerate(traces):
            tensors[f"{i}.ids"] = torch.tensor(trace.ids, dtype=torch.int32)
            tensors |= {f"{i}.selections.{layer}": rows for layer, rows in trace.selections.items()}
            tensors |= {f"{i}.routes.{layer}": rows for layer, rows in trace.routes.items()}
        shape = _shape(self.config)
        metadata = {
            "format": FORMAT,
            "config": shape,
            "config_sha256": _sha256(shape.encode()),
            "tokens_sha256": json.dumps([_sha256(_ids_bytes(trace.ids)) for trace in traces]),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                save_file(tensors, Path(folder) / path.name, metadata)
                os.replace(Path(folder) / path.name, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"recording {path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | Path, config: GLMConfig) -> Recording:
        """Reads a recording for a model of this configuration.

        Raises:
            InputError: the file is damaged, or was made with a model of another shape.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"recording {path} cannot be read: {str(error).splitlines()[0]}") from None
        if metadata.get("format") != FORMAT:
            raise InputError(f"recording {path} has format {metadata.get('format')!r}; expected {FORMAT!r}")
        _check_shape(path, metadata.get("config", ""), metadata.get("config_sha256"), config)
        try:
            hashes = json.loads(metadata["tokens_sha256"])
            recording = cls(config)
            for i, sha256 in enumerate(hashes):
                _read(tensors, i, recording.begin(), sha256)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"recording {path} is damaged: {error}; expected what record() wrote") from None
        return recording

    def difference(self, other: Recording) -> str | None:
        """The first place where two recordings differ, as a sentence; None if they are equal.

        Layers are compared in the model's order, for what differs in one layer moves all later ones.
        """
        if [t.ids for t in self.traces] != [t.ids for t in other.traces]:
            return "the recordings hold different tokens"
        for layer in range(self.config.num_hidden_layers):
            for i, (a, b) in enumerate(zip(self.traces, other.traces, strict=True)):
                for kind, ours, theirs in (
                    ("Selections", a.selections.get(layer), b.selections.get(layer)),
                    ("routes", a.routes.get(layer), b.routes.get(layer)),
                ):
                    if ours is None or theirs is None or torch.equal(ours, theirs):
                        continue
                    row = int((ours != theirs).any(-1).nonzero()[0])
                    mine, wanted = set(ours[row].tolist()) - {-1}, set(theirs[row].tolist()) - {-1}
                    return (
                        f"layer {layer}, sequence {i}, position {row}: {kind} differ; "
                        f"only here {sorted(mine - wanted)}, only there {sorted(wanted - mine)}"
                    )
        return None


def _read(tensors: Mapping[str, Tensor], i: int, trace: Trace, sha256: Any) -> None:
    """Fills a trace from the file's tensors, checked: what no model can have recorded is damage."""
    config, ids = trace.config, tensors[f"{i}.ids"]
    if ids.dtype != torch.int32 or ids.ndim != 1 or not ids.numel():
        raise ValueError(f"{i}.ids is no list of tokens")
    if _sha256(_ids_bytes(ids.tolist())) != sha256:
        raise ValueError(f"tokens of sequence {i} do not match their hash")
    rows = torch.arange(len(ids))[:, None]
    selections: list[Tensor | None] = [None] * config.num_hidden_layers
    for layer in config.full_layers:
        chosen = selections[layer] = tensors[f"{i}.selections.{layer}"]
        wanted = (len(ids), config.index_topk)
        if chosen.dtype != torch.int32 or chosen.shape != wanted:
            raise ValueError(f"{i}.selections.{layer} is not int32 {list(wanted)}")
        if ((chosen > rows) | (chosen < -1)).any() or (chosen[:, 0] < 0).any():
            raise ValueError(f"{i}.selections.{layer} holds a position no row may see")
        following, before = chosen[:, 1:], chosen[:, :-1]
        if ((following <= before) & (following >= 0)).any() or ((following >= 0) & (before < 0)).any():
            raise ValueError(f"{i}.selections.{layer} is not ascending with -1 behind")
    routes = {}
    for layer in _moe_layers(config):
        routes[layer] = tensors[f"{i}.routes.{layer}"]
        wanted = (len(ids), config.num_experts_per_tok)
        if routes[layer].dtype != torch.int32 or routes[layer].shape != wanted:
            raise ValueError(f"{i}.routes.{layer} is not int32 {list(wanted)}")
        if ((routes[layer] < 0) | (routes[layer] >= config.n_routed_experts)).any():
            raise ValueError(f"{i}.routes.{layer} holds an expert that is none")
    trace.append(ids.tolist(), selections, routes)


def _check_shape(path: str | Path, text: str, sha256: str | None, config: GLMConfig) -> None:
    if _sha256(text.encode()) != sha256:
        raise InputError(f"recording {path} is damaged: its config does not match its hash")
    recorded, wanted = json.loads(text), json.loads(_shape(config))
    for name in SHAPE:
        if recorded.get(name) != wanted[name]:
            raise InputError(
                f"recording {path} was made with {name} {recorded.get(name)!r}; this model has {wanted[name]!r}"
            )


def _shape(config: GLMConfig) -> str:
    return json.dumps({name: getattr(config, name) for name in SHAPE}, sort_keys=True)


def _moe_layers(config: GLMConfig) -> list[int]:
    return [i for i in range(config.num_hidden_layers) if config.is_moe(i)]


def _joined(rows: list[Tensor]) -> Tensor:
    """The rows as one tensor, joined once."""
    if len(rows) != 1:
        rows[:] = [torch.cat(rows)]
    return rows[0]


def _ids_bytes(ids: Sequence[int]) -> bytes:
    return torch.tensor(ids, dtype=torch.int32).numpy().tobytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
