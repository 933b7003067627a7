"""What a checkpoint is, told without loading it: those in formats that nanoglm does not load too, and GGUF.

Traps it looks for: an MTP layer that is not there, or that the index file forgot (serving spec 4.6).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from nanoglm.config import FULL, SHARED, GLMConfig, types_from_rule
from nanoglm.errors import CheckpointError
from nanoglm.weights.files import INDEX_FILE, SINGLE_FILE, read_header, read_index
from nanoglm.weights.gguf import read_gguf
from nanoglm.weights.hf import SHARED_INDEXERS

ARCHITECTURE = "glm-dsa"  # GGUF's name for the family
_EXPERTS = re.compile(r"blk\.(?P<layer>\d{1,6})\.ffn_\w+_exps\.weight")


class Published(NamedTuple):
    """A checkpoint to other engines.

    Attributes:
        format: bf16 (any that is not quantised), fp8, nvfp4, mxfp4, int4, w4afp8, gguf; else the method's own name.
        nbytes: of all weights, None where neither files nor index say; source: where that is from.
        mtp: whether there are tensors of the MTP layer; None where no names are to be had.
        unnamed: weight files that the index does not name.
        experts: GGUF only: bytes of routed experts by layer.
    """

    config: GLMConfig
    format: str
    nbytes: int | None = None
    source: str = ""
    mtp: bool | None = None
    unnamed: tuple[str, ...] = ()
    experts: tuple[tuple[int, float], ...] = ()


def published(path: Path) -> Published:
    """A directory, of which config.json and the index file are enough (config.json alone says less), or a GGUF file.

    Raises:
        ConfigError, CheckpointError: no config.json, or a damaged file.
    """
    if path.is_file():
        return _gguf(path)
    config = GLMConfig.from_file(path)
    kind, index, single = _format(path, config), path / INDEX_FILE, path / SINGLE_FILE
    if index.is_file():
        names = read_index(index)
        files = {path / file for file in names.values()}
        beside = {file.name for file in path.glob("*.safetensors")} - set(names.values()) - {SHARED_INDEXERS}
        nbytes, source = _total(index), "by the index"
        if all(file.is_file() for file in files):
            nbytes, source = sum(file.stat().st_size for file in files), "in files"
        return Published(config, kind, nbytes, source, _has_mtp(config, names), tuple(sorted(beside)))
    if single.is_file():
        mtp = _has_mtp(config, read_header(single))
        return Published(config, kind, single.stat().st_size, "in files", mtp)
    return Published(config, kind)


def _has_mtp(config: GLMConfig, names: Any) -> bool:
    return any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in names)


def _total(index: Path) -> int | None:
    metadata = json.loads(index.read_text(encoding="utf-8")).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if type(total) is int and total > 0 else None


def _format(directory: Path, config: GLMConfig) -> str:
    """By quantization_config; ModelOpt may keep its own in a file beside it."""
    raw = config.extra.get("quantization_config")
    if raw is None:
        try:
            raw = json.loads((directory / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
        except OSError:
            return "bf16"
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError(f"{directory / 'hf_quant_config.json'} is damaged; expected quantization") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"config field quantization_config is {raw!r}; expected an object with quant_method")
    groups = raw.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    method = str(raw.get("quant_method", "modelopt")).lower()
    words = " ".join(str(part.get("format")) for part in (raw, *groups)).lower()
    words += f" {method} {raw.get('quant_algo')}".lower()
    if method == "quark":  # its scheme lies deeper
        words = json.dumps(raw).lower().replace('"fp4"', "mxfp4")
    for kind in ("w4afp8", "nvfp4", "mxfp4"):
        if kind in words or (kind == "nvfp4" and "fp4" in words and "mxfp4" not in words):
            return kind
    if method == "fp8" or "float-quantized" in words or (method == "modelopt" and "fp8" in words):
        return "fp8"
    bits = raw.get("bits", raw.get("w_bit"))
    for group in groups:
        weights = group.get("weights")
        bits = weights.get("num_bits", bits) if isinstance(weights, dict) else bits
    integer = ("awq", "gptq", "auto-round", "pack-quantized", "int-quantized", "int4")
    return f"int{bits or 4}" if any(word in words for word in integer) else method


def _gguf(file: Path) -> Published:
    header = read_gguf(file)
    if header.metadata.get("general.architecture") != ARCHITECTURE:
        found = header.metadata.get("general.architecture")
        raise CheckpointError(f"GGUF file {file} has general.architecture {found!r}; expected {ARCHITECTURE!r}")

    def key(name: str) -> Any:
        return header.metadata.get(f"{ARCHITECTURE}.{name}")

    def number(name: str, otherwise: int | None = None) -> int:
        value = otherwise if key(name) is None else key(name)
        if type(value) is not int:
            raise CheckpointError(f"GGUF file {file} has {ARCHITECTURE}.{name} {value!r}; expected a number")
        return value

    layers, length = number("block_count") - number("nextn_predict_layers", 0), number("context_length")
    if not 1 <= layers <= 1000:
        raise CheckpointError(f"GGUF file {file} has {ARCHITECTURE}.block_count {layers}; expected 1 to 1000 layers")
    types = key("attention.indexer.types")
    if types is None:  # as llama.cpp: before GLM-5.2 none was shared, then its own schedule
        kinds = (FULL,) * layers if length < 1 << 20 else types_from_rule(layers, 4, 3)
    else:
        kinds = tuple(FULL if value else SHARED for value in types)
    # Only what the cache's size follows from is read; the rest is the preset's and not used.
    config = GLMConfig.preset("glm-5.2", **{
        "num_hidden_layers": layers, "first_k_dense_replace": min(number("leading_dense_block_count", 0), layers),
        "kv_lora_rank": number("attention.kv_lora_rank"), "qk_rope_head_dim": number("rope.dimension_count"),
        "index_head_dim": number("attention.indexer.key_length"), "max_position_embeddings": length,
        "indexer_types": kinds, "index_topk_freq": None, "index_skip_topk_offset": None,
    })  # fmt: skip
    experts: Counter[int] = Counter()
    for name, size in header.sizes.items():
        match = _EXPERTS.fullmatch(name)
        if match:
            experts[int(match["layer"])] += size
    mtp = any(name.startswith(f"blk.{layers}.nextn.") for name in header.sizes)
    return Published(config, "gguf", header.nbytes, "in files", mtp, (), tuple(sorted(experts.items())))
