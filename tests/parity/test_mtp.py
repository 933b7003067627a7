"""The MTP layer equals a composition of transformers' own modules (architecture spec 3.1, 3.3).

transformers has no MTP. Its decoder layer, attention, MoE and norms are put together as the spec says:
step 0 is the whole layer; later steps project queries one position further, attend to step 0's keys under
step 0's top-k, and take what came out of the final norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.model import GLM, BatchStore
from nanoglm.ops import Batch
from nanoglm.verify.oracle import ComposedMTP, pair

CONFIG = GLMConfig.preset("tiny")
LENGTH = 70
IDS = torch.randint(0, 256, (LENGTH + 3,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def composed() -> tuple[GLM, list[Tensor], Tensor]:
    """Our model, the oracle's m after each of three steps, and the main hidden states."""
    theirs, ours = pair(CONFIG, 3)
    oracle = ComposedMTP(CONFIG, 4)
    ours.load_state_dict(oracle.checkpoint(), strict=False)
    with torch.no_grad():
        hidden = ours(IDS[:LENGTH], Batch.contiguous([LENGTH]), BatchStore()).hidden
        steps, m = [], hidden
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
    before = [pool.clone() for pool in [*cache._keys, *cache._index_keys.values()]]
    ours.draft(IDS[2:7], m, output.step, depth=1, selection=selection)
    after = [*cache._keys, *cache._index_keys.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
