"""GLMConfig: Hugging Face's ``config.json`` of the GLM-5 family <-> one frozen dataclass.

Field names are Hugging Face's. What the family never varies (interleaved RoPE, sigmoid routing,
SiLU, no biases) is not a field: a file that says otherwise is refused, because the model would
run and be silently wrong. Everything unknown is kept in ``extra`` and written back.

Source: architecture spec 1.1 to 1.3; presets from training spec 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nanoglm.errors import ConfigError

FULL, SHARED = "full", "shared"

# Keys whose only legal value is fixed by the architecture. Read, checked, written back.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "index_share_for_mtp_iteration": True,
}
# Fixed keys that GLM-5.2's file carries; the others are only checked when present.
_FIXED_WRITTEN = tuple(k for k in _FIXED if k != "mlp_bias")
# Keys derived from other fields: their value in a file is ignored (spec 1.1: head_dim misleads).
_DERIVED = {"head_dim", "qk_head_dim", "architectures", "model_type", "moe_router_dtype", "layer_types"}
_SCHEDULE = {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"}


@dataclass(frozen=True)
class GLMConfig:
    """A GLM-5-family model's shape. Immutable; see :meth:`from_dict` and :meth:`preset`.

    Raises:
        ConfigError: a value is missing, of the wrong kind, or inconsistent with another.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    rope_theta: float = 8_000_000.0
    max_position_embeddings: int = 1_048_576
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    # ---------------------------------------------------------------- derived values
    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: nope first, rope last."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Decoder layers that run the lightning indexer (the MTP layer is not among them)."""
        return tuple(i for i, kind in enumerate(self.indexer_types) if kind == FULL)

    @property
    def pattern(self) -> str:
        """The schedule as a string of F and S, one letter a layer."""
        return _letters(self.indexer_types)

    def has_indexer(self, layer: int) -> bool:
        """Whether ``layer`` owns an indexer. The MTP layer (index num_hidden_layers) always does."""
        return layer >= self.num_hidden_layers or self.indexer_types[layer] == FULL

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` has experts. The MTP layer always does."""
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == "sparse"

    # ---------------------------------------------------------------- validation
    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"config field {name} is {value!r}; expected a positive integer")
            if value > _LARGEST.get(name, 1 << 20):
                raise ConfigError(f"config field {name} is {value}; expected at most {_LARGEST.get(name, 1 << 20)}")
        for name in ("n_shared_experts", "num_nextn_predict_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"config field {name} is {value!r}; expected an integer >= 0")
        if self.n_shared_experts > _LARGEST["n_routed_experts"]:
            raise ConfigError(f"config field n_shared_experts is {self.n_shared_experts}; expected at most 4096")
        for name in _FACTORS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1 << 62:
                raise ConfigError(f"config field {name} is {value!r}; expected a positive number")
        for name in ("norm_topk_prob", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"config field {name} is {getattr(self, name)!r}; expected true or false")
        if self.pad_token_id is not None and (
            not isinstance(self.pad_token_id, int) or isinstance(self.pad_token_id, bool)
        ):
            raise ConfigError(f"config field pad_token_id is {self.pad_token_id!r}; expected an integer")
        if self.num_nextn_predict_layers > 1:
            raise ConfigError(
                f"config field num_nextn_predict_layers is {self.num_nextn_predict_layers}; "
                "the family has one physical MTP layer, used several times (0 or 1 expected)"
            )
        for name in ("qk_rope_head_dim", "index_head_dim"):
            if getattr(self, name) % 2:
                raise ConfigError(
                    f"config field {name} is {getattr(self, name)}; RoPE rotates pairs, so an even number is expected"
                )
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ConfigError(
                f"config field index_head_dim is {self.index_head_dim}; expected at least "
                f"qk_rope_head_dim ({self.qk_rope_head_dim}), whose dims the indexer rotates first"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"config field num_experts_per_tok is {self.num_experts_per_tok}; expected at most "
                f"n_routed_experts ({self.n_routed_experts})"
            )
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ConfigError(
                f"config fields n_group {self.n_group} and topk_group {self.topk_group} do not fit "
                f"n_routed_experts {self.n_routed_experts}: n_group must divide it and topk_group "
                "must not exceed n_group"
            )
        if self.topk_group * (self.n_routed_experts // self.n_group) < self.num_experts_per_tok:
            raise ConfigError(
                f"config field num_experts_per_tok is {self.num_experts_per_tok}; the {self.topk_group}"
                f" chosen groups hold only {self.topk_group * self.n_routed_experts // self.n_group}"
            )
        for name, allowed in (("indexer_types", (FULL, SHARED)), ("mlp_layer_types", ("dense", "sparse"))):
            value = getattr(self, name)
            if len(value) != self.num_hidden_layers:
                raise ConfigError(
                    f"config field {name} has {len(value)} entries; expected num_hidden_layers "
                    f"({self.num_hidden_layers})"
                )
            for kind in value:
                if kind not in allowed:
                    raise ConfigError(f"config field {name} holds {kind!r}; expected one of {allowed}")
        if self.indexer_types[0] != FULL:
            raise ConfigError(
                f"the Full/Shared pattern {self.pattern} begins with S; layer 0 has no earlier layer to "
                "share a Selection with, so F is expected first"
            )

    # ---------------------------------------------------------------- config.json
    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, latent_norm_eps: float | None = None) -> GLMConfig:
        """Reads a Hugging Face config (GLM-5, 5.1, 5.2, 5.3 and our own).

        ``latent_norm_eps``: argument, else the key of that name, else ``rms_norm_eps``
        (spec 2.2: transformers hard-codes 1e-6, vLLM, SGLang and the authors use rms_norm_eps).

        Raises:
            ConfigError: with the field, the value found and what was expected.
        """
        raw = dict(raw)
        if raw.get("model_type", "glm_moe_dsa") != "glm_moe_dsa":
            raise ConfigError(f"config field model_type is {raw['model_type']!r}; expected 'glm_moe_dsa'")
        for key, expected in _FIXED.items():
            if raw.get(key) is not None and raw[key] != expected:
                raise ConfigError(f"config field {key} is {raw[key]!r}; this model family has {expected!r}")
        layers = raw.get("num_hidden_layers")
        if not isinstance(layers, int) or isinstance(layers, bool) or layers <= 0:
            raise ConfigError(f"config field num_hidden_layers is {layers!r}; expected a positive integer")
        if layers > _LARGEST["num_hidden_layers"]:
            raise ConfigError(
                f"config field num_hidden_layers is {layers}; expected at most {_LARGEST['num_hidden_layers']}"
            )
        heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
        if heads is not None and kv_heads is not None and kv_heads != heads:
            raise ConfigError(
                f"config field num_key_value_heads is {kv_heads!r}; MLA has one key and "
                f"value head per query head, so num_attention_heads ({heads}) is expected"
            )
        known = {f.name for f in fields(cls)} - {"extra", "rope_theta"}
        values: dict[str, Any] = {k: raw[k] for k in known if raw.get(k) is not None}
        values["indexer_types"] = _schedule(raw, layers)
        values["mlp_layer_types"] = _mlp_layer_types(raw, layers)
        values["rope_theta"] = _rope_theta(raw)
        values["eos_token_id"] = _token_ids(raw.get("eos_token_id"))
        if latent_norm_eps is not None:
            values["latent_norm_eps"] = latent_norm_eps
        elif "latent_norm_eps" not in values:
            values["latent_norm_eps"] = values.get("rms_norm_eps", cls.rms_norm_eps)
        consumed = known | _FIXED.keys() | _DERIVED | _SCHEDULE
        consumed |= {"first_k_dense_replace", "num_key_value_heads", "rope_parameters", "rope_theta"}
        values["extra"] = {k: v for k, v in raw.items() if k not in consumed}
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise ConfigError(f"config field {missing[0]} is missing; expected a value for {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` that transformers, vLLM and SGLang accept; inverse of :meth:`from_dict`."""
        out: dict[str, Any] = {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
        out |= {k: v for k, v in asdict(self).items() if k not in ("extra", "rope_theta", "eos_token_id")}
        out |= {k: _FIXED[k] for k in _FIXED_WRITTEN}
        out["indexer_types"] = list(self.indexer_types)
        out["mlp_layer_types"] = list(self.mlp_layer_types)
        dense = self.mlp_layer_types.index("sparse") if "sparse" in self.mlp_layer_types else self.num_hidden_layers
        if "dense" not in self.mlp_layer_types[dense:]:
            out["first_k_dense_replace"] = dense
        out |= _schedule_keys(self.indexer_types)
        out["num_key_value_heads"] = self.num_attention_heads
        out["head_dim"] = self.qk_rope_head_dim  # what transformers makes of it; 192 in GLM-5.2's file
        out["qk_head_dim"] = self.qk_head_dim
        out["moe_router_dtype"] = "float32"
        out["rope_parameters"] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        out["eos_token_id"] = list(self.eos_token_id) or None  # absent, transformers would take 1
        if self.pad_token_id is None:
            out.pop("pad_token_id")
        return out | dict(self.extra)

    @classmethod
    def from_file(cls, path: str | Path, *, latent_norm_eps: float | None = None) -> GLMConfig:
        """Reads ``config.json`` (or the directory that holds it). Raises ConfigError."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}; expected a config.json") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config file {path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"config file {path} holds a {type(raw).__name__}; expected a JSON object")
        return cls.from_dict(raw, latent_norm_eps=latent_norm_eps)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GLMConfig:
        """One of ``tiny nano recall assistant mini small glm-5 glm-5.2`` (training spec 4), or ``d2`` to ``d64``: so
        many layers, all else in proportion. ``changes`` are keys of config.json.

        Raises:
            ConfigError: no such preset, or changes that do not go together.
        """
        depth = int(name[1:]) if name[:1] == "d" and name[1:].isdecimal() else 0
        if name not in PRESETS and not 2 <= depth <= 64:
            raise ConfigError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}, or d2 to d64")
        return cls.from_dict((PRESETS[name] if name in PRESETS else dial(depth)) | changes)

    def replace(self, **changes: Any) -> GLMConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def with_pattern(self, pattern: str) -> GLMConfig:
        """A copy whose layers are Full and Shared as the letters F and S say.

        Raises:
            ConfigError: other letters, another number of them, or S first.
        """
        return self.replace(indexer_types=_types_from_pattern(pattern, self.num_hidden_layers))


# fmt: off
_SIZES = (  # positive integers that every file must give
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
    "n_routed_experts", "num_experts_per_tok", "index_n_heads", "index_head_dim", "index_topk",
)
# fmt: on
_POSITIVE = (*_SIZES, "n_group", "topk_group", "max_position_embeddings")
_FACTORS = ("rope_theta", "rms_norm_eps", "latent_norm_eps", "routed_scaling_factor", "initializer_range")
# A typing error must not fill the memory; any other size may be 2**20, so that no tensor's size overflows.
_LARGEST = {
    "num_hidden_layers": 1000, "num_attention_heads": 1 << 16, "index_n_heads": 1 << 16, "n_routed_experts": 4096,
    "n_group": 4096, "topk_group": 4096, "index_topk": (1 << 31) - 1, "max_position_embeddings": (1 << 31) - 1,
}  # fmt: skip


def _types_from_pattern(pattern: Any, layers: int) -> tuple[str, ...]:
    letters = {"F": FULL, "S": SHARED}
    if not isinstance(pattern, str) or any(letter not in letters for letter in pattern):
        raise ConfigError(f"config field index_topk_pattern is {pattern!r}; expected a string of F and S")
    if len(pattern) != layers:
        raise ConfigError(
            f"config field index_topk_pattern has {len(pattern)} letters; expected num_hidden_layers ({layers})"
        )
    return tuple(letters[letter] for letter in pattern)


def types_from_rule(layers: int, freq: int, offset: int) -> tuple[str, ...]:
    """Layer i is Full iff max(i - offset + 1, 0) mod freq == 0 (spec 1.3)."""
    return tuple(FULL if max(i - offset + 1, 0) % freq == 0 else SHARED for i in range(layers))


def _schedule(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """``indexer_types``, else ``index_topk_pattern``, else freq/offset; all that are present must agree."""
    found: dict[str, tuple[str, ...]] = {}
    types = raw.get("indexer_types")
    if types is not None:
        if not isinstance(types, Sequence) or isinstance(types, str):
            raise ConfigError(f"config field indexer_types is {types!r}; expected a list of 'full' and 'shared'")
        for kind in types:
            if kind not in (FULL, SHARED):
                raise ConfigError(f"config field indexer_types holds {kind!r}; expected 'full' or 'shared'")
        found["indexer_types"] = tuple(types)
    if raw.get("index_topk_pattern") is not None:
        found["index_topk_pattern"] = _types_from_pattern(raw["index_topk_pattern"], layers)
    freq, offset = raw.get("index_topk_freq"), raw.get("index_skip_topk_offset")
    if freq is not None or offset is not None or not found:
        freq, offset = 1 if freq is None else freq, 2 if offset is None else offset
        for name, value, least in (("index_topk_freq", freq, 1), ("index_skip_topk_offset", offset, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"config field {name} is {value!r}; expected an integer >= {least}")
        found["index_topk_freq/index_skip_topk_offset"] = types_from_rule(layers, freq, offset)
    first, *others = found.items()
    for name, value in others:
        if value != first[1]:
            raise ConfigError(
                f"config fields {first[0]} and {name} disagree on the Full/Shared schedule: "
                f"{_letters(first[1])} against {_letters(value)}; expected one schedule"
            )
    return first[1]


def _letters(types: Sequence[Any]) -> str:
    return "".join("F" if kind == FULL else "S" for kind in types)


def _schedule_keys(types: tuple[str, ...]) -> dict[str, Any]:
    """The second spelling beside ``indexer_types``, for engines that read no list: freq/offset where they
    describe it exactly, else the F/S string."""
    if SHARED not in types:
        return {"index_topk_freq": 1, "index_skip_topk_offset": 2}
    offset = types.index(SHARED)  # the first layer that waits
    freq = next((i for i in range(offset, len(types)) if types[i] == FULL), len(types)) - offset + 1
    if types_from_rule(len(types), freq, offset) != types:
        return {"index_topk_pattern": _letters(types)}
    return {"index_topk_freq": freq, "index_skip_topk_offset": offset}


def _mlp_layer_types(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """``mlp_layer_types``, else ``first_k_dense_replace``. The list wins, as in transformers, which writes
    its default count of 3 beside any list."""
    types, dense = raw.get("mlp_layer_types"), raw.get("first_k_dense_replace")
    dense = 3 if dense is None else dense
    if not isinstance(dense, int) or isinstance(dense, bool) or dense < 0:
        raise ConfigError(f"config field first_k_dense_replace is {dense!r}; expected an integer >= 0")
    if types is None:
        return ("dense",) * min(dense, layers) + ("sparse",) * max(layers - dense, 0)
    if not isinstance(types, Sequence) or isinstance(types, str):
        raise ConfigError(f"config field mlp_layer_types is {types!r}; expected a list of 'dense' and 'sparse'")
    return tuple(types)


def _rope_theta(raw: Mapping[str, Any]) -> float:
    rope = raw.get("rope_parameters")
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config field rope_parameters is {rope!r}; expected an object with rope_theta")
    if rope.get("rope_type") not in (None, "default"):
        raise ConfigError(
            f"config field rope_parameters.rope_type is {rope['rope_type']!r}; the family has 'default' (plain RoPE)"
        )
    if raw.get("rope_scaling"):
        raise ConfigError(
            f"config field rope_scaling is {raw['rope_scaling']!r}; the family has 'default' (plain RoPE)"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError("config field rope_parameters.rope_theta is missing; expected the RoPE base")
    return theta


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"config field eos_token_id is {value!r}; expected an integer or a list of integers")
    return tuple(ids)


# ------------------------------------------------------------------------------- presets
def _preset(
    vocab: int, hidden: int, layers: int, dense: int, heads: int, ranks: tuple[int, int],
    dims: tuple[int, int, int], indexer: tuple[int, int, int], schedule: tuple[int, int],
    experts: tuple[int, int, int, int], dense_width: int, **rest: Any,
) -> dict[str, Any]:  # fmt: skip
    """One column of training spec 4's table, in its row order."""
    return {
        "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "first_k_dense_replace": dense, "num_attention_heads": heads,
        "q_lora_rank": ranks[0], "kv_lora_rank": ranks[1],
        "qk_nope_head_dim": dims[0], "qk_rope_head_dim": dims[1], "v_head_dim": dims[2],
        "index_n_heads": indexer[0], "index_head_dim": indexer[1], "index_topk": indexer[2],
        "index_topk_freq": schedule[0], "index_skip_topk_offset": schedule[1],
        "n_routed_experts": experts[0], "num_experts_per_tok": experts[1],
        "n_shared_experts": experts[2], "moe_intermediate_size": experts[3],
        "intermediate_size": dense_width, "rope_parameters": {"rope_theta": 8_000_000, "rope_type": "default"},
        "max_position_embeddings": 1_048_576, "rms_norm_eps": 1e-6, **rest,
    }  # fmt: skip


def dial(depth: int) -> dict[str, Any]:
    """The shape of ``mini`` at any depth: 48 of width a layer, in heads of 64."""
    hidden = 64 * max(2, round(depth * 48 / 64))
    return _preset(
        16_384, hidden, depth, 1, hidden // 64, (hidden // 2, hidden // 4), (48, 16, 64), (8, 64, 256), (4, 3),
        (32, 4, 1, hidden // 2), 3 * hidden,
    )  # fmt: skip


# End ids of the byte tokenizer: <|endoftext|>, <|user|>, <|observation|> (serving spec 1.1).
# A width of 64 to 128 learns faster from a wider start than GLM's 0.02 (docs/log.md).
_BYTES: dict[str, Any] = {"eos_token_id": [256, 263, 265], "pad_token_id": 256, "initializer_range": 0.06}
_GLM: dict[str, Any] = {"eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820, "rms_norm_eps": 1e-5}
_GLM_SHAPE = (154_880, 6144, 78, 3, 64, (2048, 512), (192, 64, 256), (32, 128, 2048))

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _preset(320, 64, 4, 1, 2, (48, 32), (24, 8, 32), (8, 16, 16), (2, 1), (8, 2, 1, 32), 128, **_BYTES),
    "nano": _preset(320, 128, 12, 1, 4, (96, 64), (24, 8, 32), (8, 16, 64), (4, 2), (8, 2, 1, 64), 384, **_BYTES),
    "recall": _preset(
        2048, 96, 4, 1, 4, (64, 48), (16, 16, 32), (4, 64, 64), (4, 2), (4, 1, 1, 64), 256, initializer_range=0.06,
        tie_word_embeddings=True, num_nextn_predict_layers=0,
    ),
    "assistant": _preset(
        320, 128, 6, 1, 4, (64, 48), (16, 16, 32), (8, 32, 64), (3, 2), (4, 2, 1, 48), 256, **_BYTES | {
            "rope_parameters": {"rope_theta": 10_000, "rope_type": "default"}, "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "mini": _preset(16_384, 512, 12, 1, 8, (256, 128), (48, 16, 64), (8, 64, 256), (4, 3), (32, 4, 1, 256), 1536),
    "small": _preset(
        32_768, 1024, 19, 2, 16, (512, 256), (96, 32, 128), (16, 64, 512), (4, 3), (64, 6, 1, 256), 3072
    ),
    "glm-5": _preset(*_GLM_SHAPE, (1, 2), (256, 8, 1, 2048), 12_288, **_GLM) | {
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
        "max_position_embeddings": 202_752,
    },
    "glm-5.2": _preset(*_GLM_SHAPE, (4, 3), (256, 8, 1, 2048), 12_288, **_GLM),
}  # fmt: skip
