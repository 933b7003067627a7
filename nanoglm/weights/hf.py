"""Hugging Face checkpoint directories read into a model: config.json and safetensors, plain or block FP8.

Reading streams one tensor at a time into a model that was built without storage, so nothing is held
twice. Every name is accounted for: what is missing or unexpected is an error, what is tolerated is
reported. Whether a tensor is FP8 is decided by its scales being there, never by the configuration's list.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import CheckpointError, ConfigError, InputError
from nanoglm.model import GLM
from nanoglm.model.block import DecoderLayer
from nanoglm.model.mtp import MTPLayer
from nanoglm.weights import fp8
from nanoglm.weights.files import Shards
from nanoglm.weights.names import EXPERTS, INDEXER, LAYER, SCALE, STACKED, disk_tensors, place, stored_dtype

# Indexers for the Shared layers, in a file of their own: no engine needs them, comparisons with all-Full do.
SHARED_INDEXERS = "shared_indexers.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights, plain
FP8, SCALE_DTYPES = "F8_E4M3", ("F32", "F8_E8M0", "U8")  # of weights in blocks and their scales


@dataclass
class Report:
    """What loading found beside the tensors it placed."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # copied indexers on Shared layers

    def check(self, directory: Path) -> None:
        """Raises CheckpointError unless every name fits."""
        for kind, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(
                    f"checkpoint {directory} has {len(names)} {kind} tensors: {', '.join(names[:3])}{more}; "
                    "expected exactly the names that its config.json describes"
                )


class Checkpoint:
    """A checkpoint directory, opened: configuration and headers, no weights yet.

    Args:
        latent_norm_eps: see :meth:`GLMConfig.from_dict`.
        all_full: every layer Full, with the Shared layers' indexers from ``shared_indexers.safetensors``.

    Attributes:
        config: num_nextn_predict_layers is 0 if the files hold no MTP layer (transformers writes none).
        shards: the tensors by name.

    Raises:
        ConfigError, CheckpointError: files missing, damaged or of a wrong kind.
    """

    def __init__(self, directory: str | Path, *, latent_norm_eps: float | None = None, all_full: bool = False) -> None:
        self.directory = Path(directory)
        config = GLMConfig.from_file(self.directory, latent_norm_eps=latent_norm_eps)
        extra: tuple[Path, ...] = ()
        if all_full:
            config = config.replace(indexer_types=(FULL,) * config.num_hidden_layers)
            extra = (self.directory / SHARED_INDEXERS,)
        _check_quantization(config)
        self.shards = Shards(self.directory, *extra)
        prefix = f"model.layers.{config.num_hidden_layers}."
        if not any(name.startswith(prefix) for name in self.shards.shapes):
            config = config.replace(num_nextn_predict_layers=0)
        check_counts(config, self.shards.shapes)
        self.config = config

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: Collection[int] | None = None,
    ) -> tuple[GLM, Report]:
        """The model with its weights.

        Args:
            layers: only these decoder layers get weights (``num_hidden_layers`` is the MTP layer), the
                others stay on the meta device; see also :meth:`layer`.

        Raises:
            CheckpointError: a name, shape, dtype or scale that does not fit.
            InputError: more than this machine's memory.
        """
        with torch.device("meta"):
            model = GLM(self.config)
        self.report.check(self.directory)
        if torch.device(device).type != "meta":
            every = range(len(model.model.layers))
            skipped = tuple(f"model.layers.{i}." for i in every if layers is not None and i not in layers)
            materialise(model, dtype, device, skipped=skipped)
            self._fill(model, "", skipped)
        return model, self.report

    def layer(
        self, index: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> DecoderLayer:
        """One decoder layer with its weights and nothing else (``num_hidden_layers`` is the MTP layer).

        Raises:
            InputError: there is no such layer. CheckpointError: as :meth:`load`.
        """
        last = self.config.num_hidden_layers
        if index == last and not self.config.num_nextn_predict_layers:
            raise InputError(f"checkpoint {self.directory} has no MTP layer; expected tensors model.layers.{last}.*")
        if not 0 <= index <= last:
            raise InputError(f"layer is {index}; expected 0 to {last - 1}, or {last} for the MTP layer")
        self.report.check(self.directory)
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index) if index < last else MTPLayer(self.config)
        prefix = f"model.layers.{index}."
        materialise(layer, dtype, device, prefix=prefix)
        self._fill(layer, prefix)
        return layer

    @cached_property
    def report(self) -> Report:
        """Every name accounted for. Raises CheckpointError if a shape or dtype does not fit."""
        expected, report = account(self.config, self.shards.shapes)
        for name, shape in expected.items():
            found, dtype = self.shards.shapes[name], self.shards.dtypes[name]
            allowed = SCALE_DTYPES if name.endswith(SCALE) else (FP8,) if name + SCALE in expected else DTYPES
            if found != shape:
                raise CheckpointError(f"tensor {name} has shape {list(found)}; expected {list(shape)}")
            if dtype not in allowed:
                beside = f" with {name}{SCALE} beside it" if allowed == (FP8,) else ""
                raise CheckpointError(f"tensor {name} has dtype {dtype}; expected one of {', '.join(allowed)}{beside}")
        return report

    @torch.no_grad()
    def _fill(self, module: nn.Module, prefix: str, skipped: tuple[str, ...] = ()) -> None:
        """Copies every tensor under ``prefix`` into the module's parameter of that name."""
        parameters = dict(named_tensors(module))
        ignored = set(self.report.ignored)
        names = (n for n in self.shards.shapes if n.startswith(prefix) and not n.startswith(skipped or "\0"))
        for name, tensor in self.shards.stream(n for n in names if n not in ignored and not n.endswith(SCALE)):
            where = place(name)
            target = where.view(parameters[where.parameter.removeprefix(prefix)])
            if self.shards.dtypes[name] != FP8:
                target.copy_(tensor)
                continue
            try:
                fp8.dequantise(tensor, self.shards.read(name + SCALE), target)
            except ValueError as error:
                raise CheckpointError(f"tensor {name}{SCALE}: {error}; expected finite scales") from None


def account(config: GLMConfig, names: Collection[str]) -> tuple[dict[str, tuple[int, ...]], Report]:
    """Every name against what the configuration describes.

    Returns:
        The shapes that the names which belong there must have (scales included), and what is left over.
    """
    with torch.device("meta"):
        model = GLM(config)
    wanted = {name: tuple(t.shape) for name, t in checkpoint_tensors(model).items()}
    known = wanted | {name: tuple(t.shape) for name, t in named_tensors(model) if STACKED.fullmatch(name)}
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[str] = set()
    report = Report()
    for name in names:
        weight = name.removesuffix(SCALE)
        shape = known.get(weight)
        if shape is not None and weight == name:
            shapes[name] = shape
            seen.update(disk for disk, _ in disk_tensors(name, torch.empty(shape, device="meta")))
        elif shape is not None and len(shape) > 1 and weight in names:
            shapes[name] = fp8.scale_shape(shape)
        else:
            match = INDEXER.fullmatch(name)
            copied = match is not None and not config.has_indexer(int(match["layer"]))
            (report.ignored if copied else report.unexpected).append(name)
    report.missing = [name for name in wanted if name not in seen]
    return shapes, report


def _check_quantization(config: GLMConfig) -> None:
    """Plain or block FP8; other formats would be refused tensor by tensor, less clearly."""
    raw = config.extra.get("quantization_config")
    if raw is None:
        return
    if not isinstance(raw, dict) or raw.get("quant_method") != "fp8":
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        raise ConfigError(f"config field quantization_config.quant_method is {method!r}; expected 'fp8' or none")
    block = raw.get("weight_block_size")
    if block is not None and block != [fp8.BLOCK, fp8.BLOCK]:
        raise ConfigError(f"config field quantization_config.weight_block_size is {block!r}; expected [128, 128]")


def check_counts(config: GLMConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Layers and experts of the files against the configuration, before a model of its size is laid out."""
    layers = {int(match["layer"]) for match in map(LAYER.match, shapes) if match}
    if config.num_hidden_layers > len(layers):
        raise CheckpointError(
            f"checkpoint holds tensors of {len(layers)} layers; expected num_hidden_layers ({config.num_hidden_layers})"
        )
    experts = max((shape[0] for name, shape in shapes.items() if STACKED.fullmatch(name) and shape), default=0)
    experts = max(experts, len({match["expert"] for match in map(EXPERTS.fullmatch, shapes) if match}))
    routed = any(config.is_moe(i) for i in range(config.num_hidden_layers + config.num_nextn_predict_layers))
    if routed and config.n_routed_experts > experts:
        raise CheckpointError(
            f"checkpoint holds {experts} experts a layer; expected n_routed_experts ({config.n_routed_experts})"
        )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under their in-memory names; tied weights once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def checkpoint_tensors(model: GLM) -> dict[str, Tensor]:
    """The checkpoint's tensors: disk names with views of the model's (works on meta)."""
    return {disk: view for name, value in named_tensors(model) for disk, view in disk_tensors(name, value)}


def check_dtype(dtype: torch.dtype) -> None:
    """Raises InputError unless weights can be held in ``dtype``."""
    if dtype not in DTYPES.values():
        raise InputError(f"dtype is {dtype}; expected torch.float32, torch.bfloat16 or torch.float16")


def materialise(
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    prefix: str = "",
    skipped: tuple[str, ...] = (),
) -> None:
    """Gives a module built on meta its storage, uninitialised, in the dtype each tensor is kept in.

    Args:
        prefix: the module's place in the model. skipped: names that begin so stay on meta.

    Raises:
        InputError: a dtype that is not fp32, bf16 or fp16, or more than this machine's memory.
    """
    check_dtype(dtype)
    wanted = [(n, t) for n, t in named_tensors(module) if not n.startswith(skipped or "\0")]
    needed = sum(t.numel() * stored_dtype(prefix + n, dtype).itemsize for n, t in wanted)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cpu" and needed > memory:
        raise InputError(
            f"model needs {needed / 1e9:,.0f} GB in {dtype}; expected at most this machine's {memory / 1e9:,.0f} GB"
        )
    for name, tensor in wanted:
        path, _, leaf = name.rpartition(".")
        empty = torch.empty(tensor.shape, dtype=stored_dtype(prefix + name, dtype), device=device)
        owner = module.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(empty))
        else:
            owner.register_buffer(leaf, empty)
    if isinstance(module, GLM) and module.config.tie_word_embeddings:
        module.lm_head.weight = cast(nn.Parameter, module.model.embed_tokens.weight)
