"""nanoglm equals transformers 5.23.0 on 100 distinct drawn configurations, below and beyond k tokens.

Compared: hidden states after every layer, Selections, logits and greedy continuations, eager and fp32.
Where our Selection differs from transformers' the row must be a near tie (its k-th and next score within
1e-5); transformers' Selection is then replayed in that row and the row counted: at most 1 % of rows.
Exact ties, which ReLU makes in 2 to 3 % of rows, are no excuse: both sides resolve them by the same rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoglm.api import Model
from nanoglm.config import FULL, SHARED, GLMConfig
from nanoglm.engine import SamplingParams, generate
from nanoglm.model import GLM
from nanoglm.verify.oracle import Trace, first_flips, our_tie_rule, pair, run_ours, run_theirs

SHARDS, DISTINCT, EXAMPLES = 4, 25, 45  # hypothesis repeats some draws
LIMIT = 1e-5


@st.composite
def configs(draw: st.DrawFn, shard: int) -> GLMConfig:
    layers = draw(st.sampled_from([[2, 6], [3], [4], [5]][shard]))  # so no two shards draw the same
    rope = 2 * draw(st.integers(1, 6))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    experts = groups * draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    return GLMConfig(
        vocab_size=97,
        hidden_size=draw(st.integers(8, 48)),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.integers(4, 32)),
        kv_lora_rank=draw(st.integers(4, 32)),
        qk_nope_head_dim=draw(st.integers(1, 24)),
        qk_rope_head_dim=rope,
        v_head_dim=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(4, 64)),
        moe_intermediate_size=draw(st.integers(3, 32)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, kept * experts // groups)),
        n_shared_experts=draw(st.integers(1, 2)),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=draw(st.booleans()),
        index_n_heads=draw(st.integers(1, 24)),
        index_head_dim=rope + 2 * draw(st.integers(0, 6)),
        index_topk=draw(st.integers(2, 16)),
        indexer_types=(FULL, *(draw(st.sampled_from([FULL, SHARED])) for _ in range(layers - 1))),
        mlp_layer_types=tuple(draw(st.sampled_from(["dense", "sparse"])) for _ in range(layers)),
        num_nextn_predict_layers=0,
        rope_theta=draw(st.sampled_from([1e4, 1e6, 8e6])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
    )


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.fixture(scope="module")
def counted() -> Iterator[Counter[str]]:
    """Over the examples of this worker: configurations, rows and greedy tokens, compared and excused."""
    seen: Counter[str] = Counter()
    yield seen
    print(f"\n{dict(seen)}")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_equals_transformers(shard: int, counted: Counter[str]) -> None:
    drawn: set[str] = set()

    @hypothesis.seed(shard)  # repeatable, and other configurations in each shard
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(configs(shard), st.data())
    def compare(config: GLMConfig, data: st.DataObject) -> None:
        drawn.add(repr(config))
        k = config.index_topk
        lengths = data.draw(st.lists(st.integers(k - 1, 8 * k), min_size=1, max_size=3), label="lengths")
        seed = data.draw(st.integers(0, 2**20), label="seed") * SHARDS + shard
        generator = torch.Generator().manual_seed(seed)
        sequences = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
        theirs, ours = pair(config, seed)
        expected = [run_theirs(theirs, config, ids) for ids in sequences]
        forced: dict[tuple[int, int], torch.Tensor] = {}
        while True:
            found = run_ours(ours, sequences, forced)
            flips = near_ties(found, expected)
            if not flips:
                break
            forced |= flips
        counted["rows"] += sum(lengths) * len(config.full_layers)
        counted["replayed"] += len(forced)
        for mine, wanted in zip(found, expected, strict=True):
            worst = max(
                error(mine.logits, wanted.logits),
                *(error(a, b) for a, b in zip(mine.hidden, wanted.hidden, strict=True)),
            )
            assert worst <= LIMIT
            counted["largest error x 1e9"] = max(counted["largest error x 1e9"], int(worst * 1e9))
        replayed = Model(ours, None).logits(sequences, selections=[trace.selections for trace in expected])
        assert all(error(a, b.logits) <= LIMIT for a, b in zip(replayed, expected, strict=True))
        for ids in sequences:
            compare_greedy(theirs, ours, ids, counted)

    compare()
    assert len(drawn) >= DISTINCT
    counted["configurations"] += len(drawn)
    assert counted["replayed"] <= 0.01 * counted["rows"], counted
    assert counted["greedy near ties"] <= 0.01 * counted["greedy tokens"], counted


def near_ties(found: list[Trace], expected: list[Trace]) -> dict[tuple[int, int], torch.Tensor]:
    """Rows of the first layer where Selections differ, which must be near ties."""
    flips = first_flips(found, expected)
    for flip in flips:
        assert flip.gap <= 1e-5, f"layer {flip.layer} row {flip.row}: Selections differ with a gap of {flip.gap}"
    return {(flip.layer, flip.row): flip.wanted for flip in flips}


@torch.no_grad()
def compare_greedy(theirs: Any, ours: GLM, prompt: list[int], counted: Counter[str]) -> None:
    """Ours on the paged cache, theirs on its own cache. Theirs is fed our tokens, so all 8 are compared;
    where its two best logits lie within the limit the second is right too, and counted."""
    ids, cache = torch.tensor([prompt]), None
    for token in generate(ours, prompt, SamplingParams(max_tokens=8)):
        with our_tie_rule():
            out = theirs(ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        best = logits.topk(2)
        counted["greedy tokens"] += 1
        if token != int(best.indices[0]):
            assert token == int(best.indices[1])
            assert best.values[0] - best.values[1] <= LIMIT * max(1.0, float(logits.abs().max()))
            counted["greedy near ties"] += 1
        ids = torch.tensor([[token]])


def test_a_wrong_selection_is_no_near_tie() -> None:
    """The excuse is narrow: one position exchanged for another with a clearly lower score is refused."""
    config = GLMConfig.preset("tiny").replace(num_nextn_predict_layers=0)
    theirs, ours = pair(config, 1)
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, found = [run_theirs(theirs, config, ids)], run_ours(ours, [ids], {})
    assert not near_ties(found, expected)
    wrong = found[0].selections[0].clone()
    missing = next(s for s in range(59) if s not in wrong[59].tolist())
    wrong[59] = torch.tensor(sorted([missing, *wrong[59].tolist()[1:]]))
    found[0].selections[0] = wrong
    with pytest.raises(AssertionError, match="layer 0 row 59: Selections differ"):
        near_ties(found, expected)
    expected[0].scores[0][59] = 1.0  # were all scores equal, it would be excused, replayed and counted
    assert list(near_ties(found, expected)) == [(0, 59)]
    forced = {(0, 59): expected[0].selections[0][59]}
    assert not near_ties(run_ours(ours, [ids], forced), expected)
