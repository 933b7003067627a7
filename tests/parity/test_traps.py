"""The traps of architecture spec 8, one test each: parity holds, and the mistake others made breaks it.

``caught(name)`` plants a fault of :mod:`nanoglm.verify.faults` and demands that a row against transformers
turns red, on sequences several times longer than k. Short ones hide most mistakes: that is how they went
unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanoglm.config import FULL, GLMConfig
from nanoglm.model import GLM, BatchStore, block, glm, indexer, mla, moe, mtp
from nanoglm.ops import Batch, select
from nanoglm.verify.external import LENGTH, K, Oracle
from nanoglm.verify.faults import FAULTS
from nanoglm.verify.oracle import pair, silent
from nanoglm.weights import Checkpoint, fp8, save

Caught = Callable[..., None]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    with silent():
        made = Oracle()
        red = [row for row in made.rows() if not row.ok]
    assert not red, red
    return made


@pytest.fixture
def caught(oracle: Oracle) -> Caught:
    """Plants a fault; ``by`` is (part of) the name of a row that must be among those that turn red."""

    def plant(name: str, by: str) -> None:
        fault = next(f for f in FAULTS if f.name == name)
        with fault.planted(), silent():
            red = [row.name for row in oracle.rows() if not row.ok]
        assert any(by in row for row in red), red

    return plant


SELECTIONS, LOGITS = "Selections: rows that differ", f"logits at {LENGTH} tokens"


# ------------------------------------------------------------------------------- 1, 3, 7, 8, 16: RoPE
def test_indexer_rope_is_interleaved(caught: Caught) -> None:
    caught("indexer RoPE half-split", SELECTIONS)


def test_indexer_rope_is_on_the_first_dims(caught: Caught) -> None:
    caught("indexer RoPE on the last dims", SELECTIONS)


def test_main_rope_is_interleaved(caught: Caught) -> None:
    caught("main RoPE half-split", LOGITS)


def test_head_dim_of_the_config_is_ignored(caught: Caught) -> None:
    """The published file says 192; RoPE has the width of qk_rope_head_dim."""
    caught("RoPE width from config's head_dim", LOGITS)
    config = GLMConfig.preset("tiny")
    raw = config.to_dict()
    assert GLMConfig.from_dict(raw | {"head_dim": 192}) == GLMConfig.from_dict(raw | {"head_dim": 64}) == config


def test_rope_is_fp32_at_large_positions(caught: Caught) -> None:
    caught("RoPE positions in bf16", "RoPE angles up to position 1,048,575")


# ------------------------------------------------------------------------------- 2, 5, 6, 18: the indexer
def test_k_norm_is_a_layernorm_with_bias(caught: Caught) -> None:
    caught("k_norm as RMSNorm", SELECTIONS)
    caught("k_norm without its bias", SELECTIONS)


def test_k_norm_eps_is_1e_6(caught: Caught) -> None:
    caught("k_norm with eps 1e-5", "small latents and index keys: Selections")


def test_indexer_has_its_relu(caught: Caught) -> None:
    caught("indexer without ReLU", SELECTIONS)


def test_indexer_weights_are_scaled_and_may_be_negative(caught: Caught) -> None:
    """A positive factor moves no Selection: only the scores tell."""
    caught("head weights without n_heads^-0.5", "indexer scores")
    caught("softmax over head weights", SELECTIONS)


def test_indexer_weights_are_fp32(caught: Caught) -> None:
    caught("head weights in bf16", SELECTIONS)


def test_indexer_heads_are_summed_before_the_choice(caught: Caught) -> None:
    """Trap 18: the indexer is replicated under tensor parallelism; a rank with its heads alone chooses wrong."""
    caught("indexer heads sharded, not summed", SELECTIONS)


def test_indexer_reads_the_normed_query_latent(caught: Caught) -> None:
    caught("indexer reads the un-normed query latent", SELECTIONS)


def test_latent_norm_eps_is_switchable(caught: Caught) -> None:
    """Trap 5: 1e-6 equals transformers, 1e-5 is what vLLM, SGLang and the authors use; they differ."""
    caught("latent norms with another eps", "small latents and index keys: logits")


def test_self_can_be_selected(caught: Caught) -> None:
    caught("self not selectable", SELECTIONS)
    caught("newest key written after scoring", SELECTIONS)


def test_a_short_prefill_writes_its_index_keys(caught: Caught) -> None:
    """Nothing needs scoring below k tokens, but later rows look for those keys."""
    caught("short prefill leaves index keys unwritten", "prefill and decoding on the paged cache")


# ------------------------------------------------------------------------------- 9: sharing
def test_schedule_offset_counts_layers(caught: Caught) -> None:
    caught("schedule off by one", "schedule of freq 4, offset 3")


def test_shared_layers_run_no_indexer(caught: Caught) -> None:
    caught("Shared layers run a random indexer of their own", SELECTIONS)


def test_shared_layers_take_the_last_full_layers_selection(caught: Caught) -> None:
    caught("Shared layers take an older Selection", SELECTIONS)


# ------------------------------------------------------------------------------- attention
def test_absorbed_scale_is_that_of_the_expanded_head(caught: Caught) -> None:
    caught("scale 576^-0.5 in the absorbed form", LOGITS)


def test_the_normed_latent_is_cached(caught: Caught) -> None:
    caught("un-normed latent cached", LOGITS)


def test_unselected_tokens_are_not_attended(caught: Caught) -> None:
    caught("attention to every token", LOGITS)


# ------------------------------------------------------------------------------- 4: the router
def test_router_bias_is_for_choice_only(caught: Caught) -> None:
    caught("router bias in the gate value", "hidden state after layer 3 (Shared MoE)")


def test_router_bias_is_fp32(caught: Caught) -> None:
    """Near 6.9 bf16 has a step of 0.03, and other experts are chosen."""
    caught("router bias in bf16", LOGITS)


def test_routed_weights_are_normalised_and_scaled(caught: Caught) -> None:
    caught("routed scaling 2.5 missing", LOGITS)
    caught("gate values not normalised", LOGITS)


def test_router_is_a_sigmoid(caught: Caught) -> None:
    caught("softmax router", LOGITS)


def test_shared_expert_is_not_scaled(caught: Caught) -> None:
    caught("shared expert scaled by 2.5", LOGITS)


def test_gate_rows_come_first(caught: Caught) -> None:
    caught("expert files with up before gate", "transformers' checkpoint here")


# ------------------------------------------------------------------------------- 10, 14, 15, 17: top-k
def test_topk_is_exact_and_deterministic_at_ties() -> None:
    """Trap 10: equal scores go to the lower position, whatever the chunking; -0.0 equals +0.0."""
    keys, count = torch.zeros(300, 16), 300
    q, weights = torch.randn(count, 2, 16), torch.tensor([[1.0, -1.0]]).repeat(count, 1)
    batch = Batch.contiguous([count])
    chosen = select(q, weights, keys, batch, 8)
    assert torch.equal(chosen[299], torch.arange(8, dtype=torch.int32))
    assert torch.equal(chosen, select(q, -weights, keys, batch, 8))


def test_scores_are_blocked_and_masked_in_fp32() -> None:
    """Trap 14: no T x S tensor, and a bf16 model's masked scores stay below every real one."""
    count = 3000
    generator = torch.Generator().manual_seed(0)
    q, weights, keys = (torch.randn(s, generator=generator) for s in ((count, 2, 16), (count, 2), (count, 16)))
    weights = -weights.abs() * 1e30  # every score at or far below zero, beyond fp16's and near bf16's range
    peak = _largest_allocation(lambda: select(q.bfloat16(), weights, keys.bfloat16(), Batch.contiguous([count]), 16))
    assert peak < count * count * 4 / 8
    chosen = select(q.bfloat16(), weights, keys.bfloat16(), Batch.contiguous([count]), 16)
    rows = torch.arange(count)[:, None]
    assert bool((chosen <= rows).all()) and bool(((chosen >= 0).sum(-1) == (rows[:, 0] + 1).clamp(max=16)).all())


def _largest_allocation(run: Callable[[], object]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_topk_beyond_the_context_turns_the_indexer_off() -> None:
    """Trap 15: how to isolate the indexer; the model then equals dense attention."""
    config = GLMConfig.preset("tiny")
    model, ids = pair(config, 5)[1], torch.arange(60) % 300
    wide = GLM(config.replace(index_topk=64, latent_norm_eps=1e-6))
    wide.load_state_dict(model.state_dict())
    sparse, dense = (
        wide(ids, Batch.contiguous([60]), BatchStore(), attention=form).hidden for form in ("sparse", "dense")
    )
    assert torch.allclose(sparse, dense, atol=1e-4)
    assert not torch.allclose(model(ids, Batch.contiguous([60]), BatchStore()).hidden, dense, atol=1e-2)


def test_lengths_below_at_and_above_k_are_compared(oracle: Oracle) -> None:
    """Trap 17."""
    assert oracle.main.lengths == (LENGTH, K - 1, K, K + 1) and LENGTH >= 4 * K
    assert set(oracle.main.theirs.config.indexer_types) == {"full", "shared"}
    with silent():
        names = {row.name for row in oracle.rows()}
    assert {f"logits at {n} tokens (k is {K})" for n in oracle.main.lengths} <= names


# ------------------------------------------------------------------------------- 11, 12: MTP
def test_mtp_recycles_post_norm(caught: Caught) -> None:
    caught("MTP recycles before the norm", "MTP draft step 1")


def test_mtp_selects_with_its_own_indexer(caught: Caught) -> None:
    caught("MTP step 0 uses the last layer's Selection", "MTP draft step 0")
    caught("MTP later steps use the last layer's Selection", "MTP draft step 1")


def test_mtp_attention_is_sparse(caught: Caught) -> None:
    """Trap 12: dense drafts are valid and worse; below k tokens a dense shortcut attends to the draft itself."""
    caught("MTP attends densely", "MTP draft step 0")


def test_mtp_drafts_attend_to_verified_tokens_only(caught: Caught) -> None:
    caught("MTP drafts attend to drafts", "MTP draft step 1 below k tokens")


def test_mtp_advances_one_position_a_step(caught: Caught) -> None:
    caught("MTP later steps at the same position", "MTP draft step 1")


def test_mtp_takes_embedding_first_and_the_normed_state(caught: Caught) -> None:
    caught("MTP concatenates hidden state first", "MTP draft step 0")
    caught("MTP takes the state before the final norm", "MTP draft step 0")


# ------------------------------------------------------------------------------- 13: FP8
def test_fp8_keeps_the_fifth_scale_row_of_576(caught: Caught) -> None:
    caught("FP8: fifth scale row of 576 dropped", "FP8 checkpoint, kv_a of 576 rows: values")


def test_fp8_multiplies_by_weight_scale_inv(caught: Caught) -> None:
    caught("FP8: divided by weight_scale_inv", "FP8 blocks of transformers")
    caught("FP8: blocks transposed", "FP8 checkpoint, kv_a of 576 rows: values")


def test_fp8_kv_b_is_dequantised_before_absorption(caught: Caught) -> None:
    caught("FP8: kv_b absorbed without its scales", "FP8 checkpoint, kv_a of 576 rows: logits")


def test_fp8_list_name_indexers_proj_means_weights_proj(tmp_path: Path) -> None:
    """No tensor is called so; weights_proj is bf16 in the file, and the scales decide."""
    save(GLM(GLMConfig.preset("tiny")).initialise(), tmp_path, dtype=fp8.DTYPE)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.layers.0.self_attn.indexers_proj"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.indexer.weights_proj.weight"
    assert stored[name].dtype == torch.bfloat16 and name + "_scale_inv" not in stored
    loaded, _ = Checkpoint(tmp_path).load()
    assert torch.equal(loaded.state_dict()[name], stored[name].float())


# ------------------------------------------------------------------------------- the receipt itself
def test_every_fault_is_planted_in_what_runs(oracle: Oracle) -> None:
    """The replaced attributes exist and are those that the model really calls."""
    assert mla.Indexer is indexer.Indexer and block.MoE is moe.MoE and glm.MTPLayer is mtp.MTPLayer
    assert oracle.main.config.indexer_types.count(FULL) == 4 and len({f.name for f in FAULTS}) == len(FAULTS) >= 14
    for fault in FAULTS:
        for target, attribute, mistake in fault.patches:
            assert getattr(target, attribute) is not mistake
