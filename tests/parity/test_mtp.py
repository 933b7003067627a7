"""The MTP layer equals a composition of transformers' own modules (architecture spec 3.1, 3.3).

transformers has no MTP. Its decoder layer, attention, MoE and norms are put together as the spec says:
step 0 is the whole layer; later steps project queries one position further, attend to step 0's keys under
step 0's top-k, and take what came out of the final norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.oracle import hf, hf_config, our_tie_rule, pair
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.config import FULL, GLMConfig
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch

CONFIG = GLMConfig.preset("tiny")
LENGTH = 70
IDS = torch.randint(0, 256, (LENGTH + 3,), generator=torch.Generator().manual_seed(2))


class Composed:
    """The MTP layer of transformers' parts, over one sequence; remembers step 0's keys and top-k."""

    def __init__(self, ours: GLM) -> None:
        config = CONFIG.replace(
            num_hidden_layers=5, indexer_types=(FULL,) * 5, mlp_layer_types=(*CONFIG.mlp_layer_types, "sparse")
        )
        self.config = hf_config(config)
        self.layer = hf.GlmMoeDsaDecoderLayer(self.config, 4).eval()
        state = ours.mtp.state_dict()
        own = ("enorm", "hnorm", "eh_proj", "shared_head")
        self.layer.load_state_dict({k: v for k, v in state.items() if not k.startswith(own)})
        self.norms = {}
        for name, key in (("e", "enorm"), ("h", "hnorm"), ("m", "shared_head.norm")):
            self.norms[name] = hf.GlmMoeDsaRMSNorm(64, CONFIG.rms_norm_eps)
            self.norms[name].load_state_dict({"weight": state[f"{key}.weight"]})
        self.project = state["eh_proj.weight"]
        self.rope = hf.GlmMoeDsaRotaryEmbedding(self.config)

    def step(self, embedding: Tensor, hidden: Tensor, depth: int) -> Tensor:
        z = torch.cat([self.norms["e"](embedding), self.norms["h"](hidden)], -1) @ self.project.T
        angles = self.rope(z[None], torch.arange(len(z))[None] + depth)
        causal = torch.full((1, 1, len(z), len(z)), torch.finfo(torch.float32).min).triu(1)
        with our_tie_rule():
            if depth == 0:
                self.angles = angles
                self.first_input = self.layer.input_layernorm(z[None])
                y, self.chosen = self.layer(z[None], attention_mask=causal, position_embeddings=angles)
                return self.norms["m"](y[0])
            attended = self._attend(self.layer.input_layernorm(z[None]), angles, causal)
            y = z[None] + attended
            return self.norms["m"]((y + self.layer.mlp(self.layer.post_attention_layernorm(y)))[0])

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], causal: Tensor) -> Tensor:
        attention = self.layer.self_attn
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
        q = q.view(1, len(x[0]), -1, attention.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = q.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], -1)
        q_rot, _ = hf.apply_rotary_pos_emb_interleave(q_rot, q_rot, *angles)
        latent, k_rot = attention.kv_a_proj_with_mqa(self.first_input).split([32, 8], -1)
        _, k_rot = hf.apply_rotary_pos_emb_interleave(k_rot[:, None], k_rot[:, None], *self.angles)
        keys, values = attention.expand_kv(attention.kv_a_layernorm(latent)[:, None], k_rot)
        hidden = torch.ones_like(causal[:, 0], dtype=torch.bool).scatter(-1, self.chosen.long(), False)[:, None]
        mask = causal.masked_fill(hidden, torch.finfo(torch.float32).min)
        out, _ = hf.eager_attention_forward(
            attention, torch.cat([q_pass, q_rot], -1), keys, values, mask, attention.scaling
        )
        return attention.o_proj(out.reshape(1, len(x[0]), -1))


@pytest.fixture(scope="module")
def composed() -> tuple[GLM, list[Tensor], Tensor]:
    """Our model, the oracle's m after each of three steps, and the main hidden states."""
    theirs, ours = pair(CONFIG, 3)
    with torch.no_grad():
        hidden = ours(IDS[:LENGTH], Batch.contiguous([LENGTH]), BatchStore()).hidden
        oracle, steps, m = Composed(ours), [], hidden
        for depth in range(3):
            embedding = theirs.model.embed_tokens(IDS[1 + depth : 1 + depth + LENGTH])
            m = oracle.step(embedding, m, depth)
            steps.append(m)
    return ours, steps, hidden


def check(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sparse", "masked"])
def test_step_0_and_two_recycled_steps(composed: Any, attention: Any) -> None:
    ours, steps, _ = composed
    output = ours(IDS[:LENGTH], Batch.contiguous([LENGTH]), BatchStore(), attention=attention)
    m, selection = output.hidden, None
    for depth, expected in enumerate(steps):
        following = IDS[1 + depth : 1 + depth + LENGTH]
        m, selection = ours.draft(following, m, output.step, depth=depth, selection=selection)
        check(m, expected)


@torch.no_grad()
def test_drafting_on_the_paged_cache(composed: Any) -> None:
    """As in decoding: step 0 over verified tokens in chunks, later steps for the last row alone."""
    ours, steps, hidden = composed
    cache = PagedCache(CONFIG, 4)
    request = cache.open()
    for begin, end in ((0, 33), (33, LENGTH)):
        output = ours(IDS[begin:end], cache.extend([request], [end - begin]), cache)
        m, selection = ours.draft(IDS[begin + 1 : end + 1], output.hidden, output.step)
        check(m, steps[0][begin:end])
    m, selection = m[-1:], selection[-1:]
    last = Batch.build([1], [LENGTH], output.step.batch.table, output.step.batch.page_size)
    step = type(output.step)(last, output.step.rotary, cache)
    for depth in (1, 2):
        m, selection = ours.draft(IDS[LENGTH + depth : LENGTH + depth + 1], m, step, depth=depth, selection=selection)
        check(m, steps[depth][-1:])


@torch.no_grad()
def test_mtp_recycles_post_norm(composed: Any) -> None:
    """Trap 11: recycling the state before shared_head.norm gives another second step."""
    ours, steps, hidden = composed
    output = ours(IDS[:LENGTH], Batch.contiguous([LENGTH]), BatchStore())
    kept: list[Tensor] = []
    hook = ours.mtp.shared_head.norm.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    _, selection = ours.draft(IDS[1 : 1 + LENGTH], output.hidden, output.step)
    hook.remove()
    wrong, _ = ours.draft(IDS[2 : 2 + LENGTH], kept[0], output.step, depth=1, selection=selection)
    assert (wrong - steps[1]).abs().max() > 1e-2


@torch.no_grad()
def test_mtp_later_steps_reuse_the_own_selection(composed: Any) -> None:
    """Trap 11: the last layer's Selection is not the MTP layer's; using it changes the draft."""
    ours, steps, _ = composed
    output = ours(IDS[:LENGTH], Batch.contiguous([LENGTH]), BatchStore())
    m, selection = ours.draft(IDS[1 : 1 + LENGTH], output.hidden, output.step)
    assert not torch.equal(selection, output.selections[-1])
    wrong, _ = ours.draft(IDS[2 : 2 + LENGTH], m, output.step, depth=1, selection=output.selections[-1])
    assert (wrong - steps[1]).abs().max() > 1e-2


@torch.no_grad()
def test_mtp_draft_keys_are_never_read(composed: Any) -> None:
    """KVShare, also below k tokens: a later step writes nothing, so its own key cannot be attended."""
    ours, _, _ = composed
    cache = PagedCache(CONFIG, 2)
    request = cache.open()
    output = ours(IDS[:5], cache.extend([request], [5]), cache)  # 5 < k
    m, selection = ours.draft(IDS[1:6], output.hidden, output.step)
    before = [pool.clone() for pool in [*cache._latent, *cache._rope, *cache._index_keys.values()]]
    ours.draft(IDS[2:7], m, output.step, depth=1, selection=selection)
    after = [*cache._latent, *cache._rope, *cache._index_keys.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
