"""Cutting a small checkpoint out of a large one: some layers, experts and indexers, every tensor as it lies.

What comes out is a GLM of the same family that loads here, in transformers and in serving engines: to debug
with real weights on a small machine. Its text is nonsense; its shapes, names, dtypes and formats are real.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import InputError
from nanoglm.weights.hf import Checkpoint
from nanoglm.weights.names import EXPERTS, LAYER, SCALE, STACKED
from nanoglm.weights.write import SHARD_BYTES, ShardWriter, replacing

# What else engines want to find beside the weights.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def slice_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    mtp: bool = True,
    pattern: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[float], None] = lambda share: None,
) -> GLMConfig:
    """Writes the checkpoint that has only these layers and experts, renumbered from 0, and indexers by a pattern.

    Args:
        layers: decoder layers to keep; all if None. A Shared layer needs the Full layer it takes its
            Selection from. experts: routed experts to keep in every layer; all if None.
        mtp: keep the MTP layer, if there is one.
        pattern: F and S of the layers that are kept; the indexers of those that become Shared are left out.
        progress: called with the share of tensors done, 0 to 1.

    Returns:
        The new configuration.

    Raises:
        InputError: layers or experts that do not exist or do not make a model, F where there is no indexer, or an
            unwritable ``out``.
        ConfigError, CheckpointError: as :class:`Checkpoint`.
    """
    checkpoint = Checkpoint(source)
    checkpoint.report.check(checkpoint.directory)
    if Path(out).resolve() == checkpoint.directory.resolve():
        raise InputError(f"out {out} is the checkpoint that is read; expected another directory")
    config, old = checkpoint.config, checkpoint.config.num_hidden_layers
    layers = _numbers("layers", layers, old)
    experts = _numbers("experts", experts, config.n_routed_experts)
    _check_sources(config, layers)
    places = {layer: new for new, layer in enumerate(layers)}
    mtp = mtp and bool(config.num_nextn_predict_layers)
    if mtp:
        places[old] = len(layers)
    config = config.replace(
        num_hidden_layers=len(layers),
        indexer_types=tuple(config.indexer_types[i] for i in layers),
        mlp_layer_types=tuple(config.mlp_layer_types[i] for i in layers),
        n_routed_experts=len(experts),
        num_experts_per_tok=min(config.num_experts_per_tok, len(experts)),
        num_nextn_predict_layers=int(mtp),
    )
    had = config.full_layers
    if pattern is not None:
        config = config.with_pattern(pattern)
    if lacks := set(config.full_layers) - set(had):
        raise InputError(
            f"pattern {pattern} has F at layer {min(lacks)}; expected F where the checkpoint has an indexer"
        )
    keep, ignored = torch.tensor(experts), set(checkpoint.report.ignored)
    renamed = {name: _renamed(name, places, experts) for name in checkpoint.shards.shapes if name not in ignored}
    names = {  # what is left behind is not read
        name: new for name, new in renamed.items() if new is not None and not _without_indexer(new, config)
    }
    with replacing(out) as folder:
        writer = ShardWriter(folder, shard_bytes)
        for done, (name, tensor) in enumerate(checkpoint.shards.stream(names), 1):
            writer.add(names[name], _kept(name, tensor, keep))
            progress(done / len(names))
        writer.close()
        raw = config.to_dict()
        quantization = raw.get("quantization_config")
        if quantization is not None and "modules_to_not_convert" in quantization:
            listed = quantization["modules_to_not_convert"] or []
            moved = (_renamed(str(module) + ".", places, experts) for module in listed)
            kept = [m[:-1] for m in moved if m and not _without_indexer(m, config)]
            raw["quantization_config"] = quantization | {"modules_to_not_convert": kept}
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        copy_companions(checkpoint.directory, folder)
    return config


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what lies beside a checkpoint's weights for engines: tokenizer, chat template, generation defaults."""
    for companion in COMPANIONS:
        if (source / companion).is_file():
            shutil.copy(source / companion, folder / companion)


def _numbers(name: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    if chosen is None:
        return list(range(count))
    for i in chosen:
        if not 0 <= i < count:
            raise InputError(f"{name} holds {i}; expected 0 to {count - 1}")
    if not chosen or sorted(set(chosen)) != list(chosen):
        raise InputError(f"{name} is {list(chosen)}; expected at least one number, ascending, none twice")
    return list(chosen)


def _check_sources(config: GLMConfig, layers: list[int]) -> None:
    for layer in layers:
        source = max(i for i in range(layer + 1) if config.indexer_types[i] == FULL)
        if source not in layers:
            raise InputError(
                f"layers holds {layer}, which is Shared and takes its Selection from layer {source}; "
                f"expected {source} among them"
            )


def _renamed(name: str, places: dict[int, int], experts: list[int]) -> str | None:
    """The tensor's name in the new checkpoint, None if it is left behind."""
    layer = LAYER.match(name)
    if layer is None:
        return name
    place = places.get(int(layer["layer"]))
    if place is None:
        return None
    name = f"model.layers.{place}.{name[layer.end() :]}"
    expert = EXPERTS.fullmatch(name.removesuffix(SCALE))
    if expert is None:
        return name
    if int(expert["expert"]) not in experts:
        return None
    begin, end = expert.span("expert")
    return f"{name[:begin]}{experts.index(int(expert['expert']))}{name[end:]}"


def _without_indexer(name: str, config: GLMConfig) -> bool:
    """Whether something is of the indexer of a layer that has none."""
    layer = LAYER.match(name)
    return layer is not None and ".indexer." in name and not config.has_indexer(int(layer["layer"]))


def _kept(name: str, tensor: Tensor, experts: Tensor) -> Tensor:
    """The rows of the kept experts, where a tensor has one for each."""
    by_expert = name.endswith((".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"))
    if not by_expert and not STACKED.fullmatch(name.removesuffix(SCALE)):
        return tensor
    if tensor.dtype.itemsize == 1:  # index_select knows no FP8
        return tensor.view(torch.uint8)[experts].view(tensor.dtype)
    return tensor[experts]
