"""GLMConfig: the real config.json of the family, the schedule, presets, and every bad value in words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoglm.config import FULL, PRESETS, SHARED, GLMConfig, types_from_rule
from nanoglm.errors import ConfigError
from nanoglm.model import GLM

FULL_LAYERS_52 = [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 66, 70, 74]

# The file of zai-org/GLM-5.2, every field of architecture spec 1.1.
GLM_52: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "dtype": "bfloat16",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 192,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 256,
    "v_head_dim": 256,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_router_dtype": "float32",
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "indexer_types": ["full" if i in FULL_LAYERS_52 else "shared" for i in range(78)],
    "index_share_for_mtp_iteration": True,
    "indexer_rope_interleave": True,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-05,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
    "initializer_range": 0.02,
    "use_cache": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "transformers_version": "5.12.0",
}


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in raw.items() if k not in names}


# Spec 1.2. GLM-5 and 5.1 are field for field identical and know no schedule: every layer is Full.
GLM_5 = without(
    GLM_52, "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset",
    "index_share_for_mtp_iteration", "moe_router_dtype",
) | {
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "max_position_embeddings": 202752,
    "head_dim": 64,
}  # fmt: skip
GLM_53 = GLM_52 | {
    "transformers_version": "5.14.0",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.indexers_proj"],
    },
}
FAMILY = {"glm-5": GLM_5, "glm-5.2": GLM_52, "glm-5.3": GLM_53}
SCHEDULE_KEYS = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
PATTERNS = st.text("FS", min_size=0, max_size=11).map(lambda rest: "F" + rest)


def tiny(**changes: Any) -> dict[str, Any]:
    """The tiny preset's config.json with some keys changed; a value of ... drops the key."""
    raw = GLMConfig.preset("tiny").to_dict() | changes
    return {k: v for k, v in raw.items() if v is not ...}


def unscheduled(layers: int, **schedule: Any) -> dict[str, Any]:
    """A config.json of so many dense layers with exactly the schedule keys that are given."""
    raw = tiny(num_hidden_layers=layers, first_k_dense_replace=layers, mlp_layer_types=...)
    return without(raw, *SCHEDULE_KEYS) | schedule


def spelled(pattern: str) -> list[str]:
    return [{"F": "full", "S": "shared"}[letter] for letter in pattern]


def fault(raw: dict[str, Any]) -> str:
    """The one sentence that refuses ``raw``."""
    with pytest.raises(ConfigError) as error:
        GLMConfig.from_dict(raw)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# ------------------------------------------------------------------------------- real files
def test_glm_52_is_read_field_by_field() -> None:
    config = GLMConfig.from_dict(GLM_52)
    for name in GLM_52.keys() & GLMConfig.__dataclass_fields__.keys():
        value = getattr(config, name)
        assert (list(value) if isinstance(value, tuple) else value) == GLM_52[name], name
    assert config.rope_theta == 8e6
    assert config.qk_head_dim == 256
    assert config.latent_norm_eps == 1e-5
    assert config.extra == {
        "dtype": "bfloat16", "use_cache": True, "ep_size": 1, "pretraining_tp": 1, "transformers_version": "5.12.0",
    }  # fmt: skip


def test_glm_5_and_51_have_an_indexer_on_every_layer() -> None:
    config = GLMConfig.from_dict(GLM_5)
    assert config.pattern == "F" * 78
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 202752)
    same = GLMConfig.from_dict(GLM_52).replace(
        indexer_types=(FULL,) * 78, rope_theta=1e6, max_position_embeddings=202752
    )
    assert config == same


def test_glm_53_is_glm_52_with_quantisation_metadata() -> None:
    config = GLMConfig.from_dict(GLM_53)
    assert config.extra["quantization_config"] == GLM_53["quantization_config"]
    assert config.replace(extra={}) == GLMConfig.from_dict(GLM_52).replace(extra={})


def test_a_router_dtype_that_only_later_files_carry_changes_nothing() -> None:
    assert GLMConfig.from_dict(without(GLM_52, "moe_router_dtype")) == GLMConfig.from_dict(GLM_52)


@pytest.mark.parametrize("name", FAMILY)
def test_round_trip_keeps_every_key(name: str) -> None:
    raw = FAMILY[name]
    before = copy.deepcopy(raw)
    config = GLMConfig.from_dict(raw)
    written = json.loads(json.dumps(config.to_dict()))
    assert GLMConfig.from_dict(written) == config
    assert raw == before  # reading leaves the caller's dict alone
    assert written["head_dim"] == 64  # what transformers makes of it; the file's 192 misleads
    for key in raw.keys() - {"head_dim", "index_topk_pattern"}:
        assert written[key] == raw[key], key


@pytest.mark.parametrize("name", [*FAMILY, *PRESETS, "irregular"])
def test_transformers_reads_what_we_write(name: str) -> None:
    from transformers import GlmMoeDsaConfig

    if name == "irregular":  # no freq and offset describe it
        config = GLMConfig.from_dict(unscheduled(7, index_topk_pattern="FSFFSSF"))
    else:
        config = GLMConfig.from_dict(FAMILY.get(name) or PRESETS[name])
    written = json.loads(json.dumps(config.to_dict()))
    theirs = GlmMoeDsaConfig(**copy.deepcopy(written)).to_dict()
    assert theirs["indexer_types"] == list(config.indexer_types)
    assert theirs["mlp_layer_types"] == list(config.mlp_layer_types)
    # A constructor stamps its own version, and spreads a quantization_config over its defaults.
    for key in written.keys() - {"transformers_version", "quantization_config"}:
        assert theirs[key] == written[key], key
    assert GLMConfig.from_dict(theirs).replace(extra={}) == config.replace(extra={})


@settings(deadline=None)
@given(extra=st.dictionaries(st.text(min_size=1).map("x_".__add__), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
), max_size=4))  # fmt: skip
def test_unknown_keys_survive(extra: dict[str, Any]) -> None:
    config = GLMConfig.from_dict(tiny(**extra))
    assert config.extra == extra
    assert config.to_dict().items() >= extra.items()


# ------------------------------------------------------------------------------- schedule
def test_the_21_full_layers_of_glm_52() -> None:
    spellings: list[dict[str, Any]] = [
        {"indexer_types": GLM_52["indexer_types"]},
        {"index_topk_pattern": "FFF" + "SSSF" * 18 + "SSS"},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
    ]
    for schedule in spellings:
        config = GLMConfig.from_dict(without(GLM_52, *SCHEDULE_KEYS) | schedule)
        assert list(config.full_layers) == FULL_LAYERS_52
        assert config.pattern == "FFF" + "SSSF" * 18 + "SSS"
        assert [i for i in range(79) if config.has_indexer(i)] == [*FULL_LAYERS_52, 78]  # 78: MTP, its own
    assert [i for i in range(79) if not config.is_moe(i)] == [0, 1, 2]


def test_a_list_or_a_pattern_overrides_the_defaults_of_the_rule() -> None:
    assert GLMConfig.from_dict(unscheduled(5)).pattern == "FFFFF"
    assert GLMConfig.from_dict(unscheduled(5, indexer_types=spelled("FSSFS"))).pattern == "FSSFS"
    assert GLMConfig.from_dict(unscheduled(5, index_topk_pattern="FSSFS")).pattern == "FSSFS"
    # Half a rule is the rule with the other half's default (freq 1, offset 2).
    assert GLMConfig.from_dict(unscheduled(5, index_topk_freq=3)).pattern == "FFSSF"
    assert GLMConfig.from_dict(unscheduled(5, index_skip_topk_offset=4)).pattern == "FFFFF"
    # null is absent.
    assert GLMConfig.from_dict(unscheduled(2, indexer_types=None, index_topk_freq=None)).pattern == "FF"


def test_three_spellings_that_agree_are_one_schedule() -> None:
    schedule = {"indexer_types": spelled("FFSSF"), "index_topk_pattern": "FFSSF", "index_topk_freq": 3}
    assert GLMConfig.from_dict(unscheduled(5, **schedule)).pattern == "FFSSF"


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        ({"indexer_types": spelled("FFSS"), "index_topk_pattern": "FSFS"}, ("indexer_types", "index_topk_pattern")),
        (
            {"indexer_types": spelled("FFSS"), "index_topk_freq": 2, "index_skip_topk_offset": 1},
            ("indexer_types", "index_topk_freq"),
        ),
        (
            {"index_topk_pattern": "FFSS", "index_topk_freq": 2, "index_skip_topk_offset": 1},
            ("index_topk_pattern", "index_skip_topk_offset"),
        ),
    ],
)
def test_spellings_that_disagree_are_both_named(schedule: dict[str, Any], names: tuple[str, str]) -> None:
    message = fault(unscheduled(4, **schedule))
    assert "disagree" in message
    for name in names:
        assert name in message
    assert "FFSS" in message and "FSFS" in message


@pytest.mark.parametrize(
    "schedule",
    [
        {"indexer_types": spelled("SFFF")},
        {"index_topk_pattern": "SFFF"},
        {"index_topk_freq": 2, "index_skip_topk_offset": 0},
    ],
)
def test_a_pattern_beginning_with_shared_is_refused(schedule: dict[str, Any]) -> None:
    message = fault(unscheduled(4, **schedule))
    assert "begins with S" in message and "expected" in message


@pytest.mark.parametrize("pattern", ["FSF", "FSFSF", ""])
def test_a_pattern_of_wrong_length_is_refused(pattern: str) -> None:
    for schedule in ({"index_topk_pattern": pattern}, {"indexer_types": spelled(pattern)}):
        message = fault(unscheduled(4, **schedule))
        assert next(iter(schedule)) in message and str(len(pattern)) in message and "(4)" in message


@settings(deadline=None)
@given(layers=st.integers(1, 40), freq=st.integers(1, 9), offset=st.integers(1, 12))
def test_the_rule_against_counting(layers: int, freq: int, offset: int) -> None:
    """Layers below the offset are Full; from there on freq - 1 Shared ones stand before each Full one."""
    expected, waited = [], 0
    for layer in range(layers):
        waited = 0 if layer < offset else waited + 1
        full = layer < offset or waited == freq
        expected.append(FULL if full else SHARED)
        waited = 0 if full else waited
    assert types_from_rule(layers, freq, offset) == tuple(expected)
    schedule = {"index_topk_freq": freq, "index_skip_topk_offset": offset}
    assert GLMConfig.from_dict(unscheduled(layers, **schedule)).indexer_types == tuple(expected)


@settings(deadline=None)
@given(pattern=PATTERNS)
def test_every_pattern_survives_a_round_trip(pattern: str) -> None:
    config = GLMConfig.from_dict(unscheduled(len(pattern), index_topk_pattern=pattern))
    written = config.to_dict()
    assert config.pattern == pattern
    assert written["indexer_types"] == spelled(pattern)
    assert GLMConfig.from_dict(written) == config
    # An engine that knows only freq and offset must not be told another schedule.
    rules = [(f, o) for f in range(1, 13) for o in range(1, 13)]
    fitting = [rule for rule in rules if types_from_rule(len(pattern), *rule) == config.indexer_types]
    if fitting:
        assert (written["index_topk_freq"], written["index_skip_topk_offset"]) in fitting
    else:
        assert "index_topk_freq" not in written and "index_skip_topk_offset" not in written


@pytest.mark.parametrize(("kinds", "count"), [("DSSS", 1), ("DDDD", 4), ("SSSS", 0), ("SDSD", None)])
def test_dense_layers_from_a_list_or_a_count(kinds: str, count: int | None) -> None:
    types = tuple({"D": "dense", "S": "sparse"}[kind] for kind in kinds)
    by_list = GLMConfig.from_dict(tiny(mlp_layer_types=list(types), first_k_dense_replace=...))
    assert by_list.mlp_layer_types == types
    assert by_list.to_dict().get("first_k_dense_replace") == count  # written only if it says the same
    if count is not None:
        assert GLMConfig.from_dict(tiny(mlp_layer_types=..., first_k_dense_replace=count)) == by_list


def test_the_list_of_dense_layers_wins_over_the_count() -> None:
    """transformers writes its default first_k_dense_replace 3 beside any list, and reads the list."""
    from transformers import GlmMoeDsaConfig

    types = ["dense", "sparse", "sparse", "sparse"]
    theirs = GlmMoeDsaConfig(num_hidden_layers=4, mlp_layer_types=types).to_dict()
    assert theirs["first_k_dense_replace"] == 3
    assert GLMConfig.from_dict(theirs).mlp_layer_types == tuple(types)


# ------------------------------------------------------------------------------- derived values
@pytest.mark.parametrize("head_dim", [192, 64, 1, "nonsense", None])
def test_head_dim_is_derived_not_believed(head_dim: Any) -> None:
    config = GLMConfig.from_dict(GLM_52 | {"head_dim": head_dim})
    assert config == GLMConfig.from_dict(GLM_52)
    assert config.qk_head_dim == config.qk_nope_head_dim + config.qk_rope_head_dim == 256


def test_latent_norm_eps_argument_then_key_then_rms_norm_eps() -> None:
    raw = tiny(rms_norm_eps=3e-5, latent_norm_eps=...)
    assert GLMConfig.from_dict(raw).latent_norm_eps == 3e-5
    assert GLMConfig.from_dict(raw | {"latent_norm_eps": 2e-6}).latent_norm_eps == 2e-6
    assert GLMConfig.from_dict(raw | {"latent_norm_eps": 2e-6}, latent_norm_eps=1e-6).latent_norm_eps == 1e-6
    assert GLMConfig.from_dict(raw, latent_norm_eps=1e-6).rms_norm_eps == 3e-5
    # What was used is written, so that nobody has to repeat the argument.
    written = GLMConfig.from_dict(raw, latent_norm_eps=1e-6).to_dict()
    assert GLMConfig.from_dict(written).latent_norm_eps == 1e-6


def test_a_single_end_token_is_a_tuple_of_one() -> None:
    assert GLMConfig.from_dict(tiny(eos_token_id=7)).eos_token_id == (7,)
    assert GLMConfig.from_dict(tiny(eos_token_id=None)).eos_token_id == ()
    # Written as null: where the key is absent, transformers stops at its default, token 1.
    assert GLMConfig.from_dict(tiny(eos_token_id=...)).to_dict()["eos_token_id"] is None


# ------------------------------------------------------------------------------- presets
# Training spec 4; glm-5 from issue 2. Name: pattern, rms_norm_eps, parameters with MTP.
TABLE = {
    "tiny": ("FSFS", 1e-6, 403_344),
    "nano": ("FFSSSFSSSFSS", 1e-6, 3_850_272),
    "recall": ("FFSS", 1e-6, 763_308),
    "assistant": ("FFSSFS", 1e-6, 1_168_680),
    "mini": ("FFFSSSFSSSFS", 1e-6, 185_865_216),
    "small": ("FFFSSSFSSSFSSSFSSSF", 1e-6, 1_111_946_368),
    "glm-5": ("F" * 78, 1e-5, 753_864_139_008),
    "glm-5.2": ("FFF" + "SSSF" * 18 + "SSS", 1e-5, 753_329_940_480),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_pattern_eps_and_parameter_count(name: str) -> None:
    pattern, eps, parameters = TABLE[name]
    config = GLMConfig.preset(name)
    assert config.pattern == pattern
    assert config.rms_norm_eps == config.latent_norm_eps == eps
    with torch.device("meta"):
        model = GLM(config)
    # The router's bias is a buffer here and a tensor of the checkpoint, so it counts.
    assert sum(t.numel() for t in [*model.parameters(), *model.buffers()]) == parameters
    if name == "glm-5.2":
        mtp = sum(t.numel() for t in [*model.mtp.parameters(), *model.mtp.buffers()])
        assert parameters - mtp == 743_377_019_904


def test_presets_of_published_models_are_their_files() -> None:
    for name in ("glm-5", "glm-5.2"):
        assert GLMConfig.preset(name) == GLMConfig.from_dict(FAMILY[name]).replace(extra={})


def test_table_names_every_preset() -> None:
    assert TABLE.keys() == PRESETS.keys()


# ------------------------------------------------------------------------------- bad values
NOT_POSITIVE = [0, -1, 2.0, "8", True, [8], float("nan")]
NOT_A_NUMBER = [0.0, -1e-6, "1e-5", True, [], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
        "n_routed_experts", "num_experts_per_tok", "index_n_heads", "index_head_dim", "index_topk", "n_group",
        "topk_group", "max_position_embeddings",
    ],
)  # fmt: skip
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    raw = tiny(**{name: value, "num_key_value_heads": ...})
    message = fault(raw)
    assert name in message and repr(value) in message and "expected a positive integer" in message


@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", ["rms_norm_eps", "latent_norm_eps", "routed_scaling_factor", "rope_theta"])
def test_factors_are_positive_numbers(name: str, value: Any) -> None:
    raw = tiny(rope_parameters={"rope_theta": value}) if name == "rope_theta" else tiny(**{name: value})
    message = fault(raw)
    assert name in message and repr(value) in message and "expected" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_shared_experts", -1), ("n_shared_experts", 1.5),
        ("num_nextn_predict_layers", -1), ("num_nextn_predict_layers", 3), ("num_nextn_predict_layers", True),
        ("qk_rope_head_dim", 7), ("index_head_dim", 15), ("index_head_dim", 4), ("num_experts_per_tok", 9),
        ("norm_topk_prob", "yes"), ("norm_topk_prob", 1), ("tie_word_embeddings", "false"),
        ("initializer_range", "wide"), ("initializer_range", -0.02), ("initializer_range", True),
        ("pad_token_id", "<pad>"), ("pad_token_id", [1]), ("pad_token_id", True),
        ("eos_token_id", 1.5), ("eos_token_id", "256"), ("eos_token_id", [True]), ("eos_token_id", [[1]]),
        ("eos_token_id", {}),
        ("index_topk_freq", 0), ("index_topk_freq", "4"), ("index_skip_topk_offset", -1),
        ("index_skip_topk_offset", True), ("index_topk_pattern", "FXFX"), ("index_topk_pattern", ["F"] * 4),
        ("indexer_types", "FSFS"), ("indexer_types", 4), ("first_k_dense_replace", -1),
        ("first_k_dense_replace", "1"), ("mlp_layer_types", 4),
        # What the family never varies: the model would run and be silently wrong.
        ("model_type", "deepseek_v3"), ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True),
        ("attention_dropout", 0.1), ("moe_layer_freq", 2), ("scoring_func", "softmax"), ("topk_method", "greedy"),
        ("rope_interleave", False), ("indexer_rope_interleave", False), ("index_share_for_mtp_iteration", False),
        ("num_key_value_heads", 1), ("num_key_value_heads", "2"),
        ("rope_parameters", "default"), ("rope_parameters", [8e6]),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_bad_value_is_named_with_its_field(name: str, value: Any) -> None:
    message = fault(tiny(**{name: value}))
    assert name in message and repr(value) in message
    assert "expected" in message or "this model family has" in message or "the family has" in message


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear"}])
def test_only_plain_rope(rope: dict[str, Any]) -> None:
    message = fault(tiny(rope_parameters=rope | {"rope_theta": 8e6}))
    assert "rope_type" in message and repr(rope["rope_type"]) in message and "'default'" in message
    message = fault(tiny(rope_scaling={"type": "yarn", "factor": 4.0}))
    assert "rope_scaling" in message and "yarn" in message  # the old spelling


def test_rope_base_in_either_place() -> None:
    assert GLMConfig.from_dict(tiny(rope_parameters=..., rope_theta=5e5)).rope_theta == 5e5
    assert "rope_theta" in fault(tiny(rope_parameters=...))
    assert "rope_theta" in fault(tiny(rope_parameters={}))


@pytest.mark.parametrize("kinds", [["full", "half", "full", "full"], ["full", None, "full", "full"], [[1]] * 4])
def test_unknown_kind_of_layer(kinds: list[Any]) -> None:
    message = fault(without(tiny(), *SCHEDULE_KEYS) | {"indexer_types": kinds})
    assert "indexer_types" in message and "expected" in message
    assert "indexer_types" in fault(tiny(indexer_types=kinds))  # a rule is there too and disagrees
    kinds = ["sparse" if kind == "full" else kind for kind in kinds]
    assert "mlp_layer_types" in fault(tiny(mlp_layer_types=kinds, first_k_dense_replace=...))


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ({"n_group": 3}, ("n_group", "n_routed_experts")),
        ({"n_group": 2, "topk_group": 3}, ("topk_group", "n_group")),
        ({"n_group": 8, "topk_group": 1}, ("num_experts_per_tok", "groups")),
    ],
)
def test_expert_groups_must_fit(groups: dict[str, int], names: tuple[str, str]) -> None:
    message = fault(tiny(**groups))
    assert all(name in message for name in names)


@pytest.mark.parametrize(
    "name", ["vocab_size", "num_attention_heads", "q_lora_rank", "index_topk", "num_hidden_layers"]
)
def test_missing_field_is_named(name: str) -> None:
    message = fault(tiny(**{name: ...}))
    assert name in message and "expected" in message
    assert "missing" in message or "None" in message


def test_null_is_absent() -> None:
    """transformers writes null for what is not set."""
    assert GLMConfig.from_dict(tiny(num_key_value_heads=None, pad_token_id=None, n_group=None)).n_group == 1
    assert "q_lora_rank is missing" in fault(tiny(q_lora_rank=None))


def test_an_absurd_number_of_layers_is_refused_at_once() -> None:
    assert "num_hidden_layers" in fault(tiny(num_hidden_layers=2**70, index_topk_freq=..., index_skip_topk_offset=...))


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'huge' is unknown; expected one of tiny, nano, .*glm-5\.2"):
        GLMConfig.preset("huge")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "holds a list"), (b'"glm"', "holds a str"), (b"null", "holds a NoneType"),
        (b"{}", "num_hidden_layers"),
    ],
)  # fmt: skip
def test_damaged_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match=words) as error:
            GLMConfig.from_file(path)
        assert len(str(error.value).splitlines()) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        GLMConfig.from_file(tmp_path)


def test_file_and_argument(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GLM_52), encoding="utf-8")
    assert GLMConfig.from_file(tmp_path) == GLMConfig.from_dict(GLM_52)
    assert GLMConfig.from_file(str(tmp_path), latent_norm_eps=1e-6).latent_norm_eps == 1e-6


def test_replace_validates_again() -> None:
    config = GLMConfig.preset("tiny")
    assert config.replace(q_lora_rank=8).q_lora_rank == 8
    with pytest.raises(ConfigError, match="q_lora_rank is -8"):
        config.replace(q_lora_rank=-8)


# Values a careless hand could leave in a config.json; 2**31 and more only where no list gets that long.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=5),
    st.sampled_from(["full", "shared", "dense", "default", "FSFS", "silu", "glm_moe_dsa"]),
)  # fmt: skip
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "x"]), inner)
    ),
    max_leaves=6,
)
KNOWN = sorted(GLM_52.keys() | GLMConfig.preset("tiny").to_dict().keys() | {"rope_theta", "rope_scaling", "mlp_bias"})
HUGE = st.sampled_from([2**31, 2**70, -(2**70)])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_junk_is_a_config_error_or_a_config(data: st.DataObject) -> None:
    raw = tiny()
    for key in data.draw(st.sets(st.sampled_from(KNOWN), min_size=1, max_size=4)):
        raw[key] = data.draw(JUNK if key == "num_hidden_layers" else JUNK | HUGE, label=key)
    for key in data.draw(st.sets(st.sampled_from(KNOWN), max_size=3)):
        raw.pop(key, None)
    try:
        config = GLMConfig.from_dict(raw)
    except ConfigError as error:
        assert str(error).startswith("config field") and len(str(error).splitlines()) == 1
    else:
        again = GLMConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert repr(again) == repr(config)  # a field that nobody knows may be NaN, which equals nothing


# ------------------------------------------------------------------------------- the dial
@pytest.mark.parametrize("depth", [2, 4, 12, 64])
def test_the_dial_keeps_the_proportions_of_mini(depth: int) -> None:
    config = GLMConfig.preset(f"d{depth}")
    assert config.num_hidden_layers == depth and config.num_attention_heads * 64 == config.hidden_size
    assert abs(config.hidden_size - 48 * depth) <= 32 or config.hidden_size == 128
    assert config.pattern == types_letters(depth)
    assert (config.q_lora_rank, config.kv_lora_rank) == (config.hidden_size // 2, config.hidden_size // 4)
    assert (config.moe_intermediate_size, config.intermediate_size) == (config.hidden_size // 2, 3 * config.hidden_size)


def types_letters(depth: int) -> str:
    """Three Full layers, then one in four."""
    return "".join("F" if i < 3 or (i - 2) % 4 == 0 else "S" for i in range(depth))


@pytest.mark.parametrize("name", ["d1", "d65", "d", "dx", "d-4"])
def test_beyond_the_dial_is_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"preset '{name}' is unknown; expected one of tiny, .*, or d2 to d64"):
        GLMConfig.preset(name)


def test_a_preset_at_another_depth() -> None:
    assert GLMConfig.preset("nano", num_hidden_layers=4).pattern == "FFSS"
