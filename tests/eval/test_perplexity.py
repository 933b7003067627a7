"""Nats and bits per byte, against sums spelled out position by position."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from nanoglm.api import Model
from nanoglm.chat.tokenizer import Tokenizer, byte_tokenizer
from nanoglm.config import FULL, GLMConfig
from nanoglm.errors import InputError
from nanoglm.eval.perplexity import Row, all_full, evaluate
from nanoglm.model import GLM, Attention
from nanoglm.weights import SHARED_INDEXERS, save

TEXT = "The café was nearly empty — naïve, she thought, to come so early. 深い夜。" * 2


def build(tokenizer: Tokenizer | None = None, **changes: object) -> Model:
    config = GLMConfig.preset("tiny").replace(initializer_range=0.15, **changes)
    return Model(GLM(config).initialise(4), tokenizer or byte_tokenizer())


@pytest.fixture(scope="module")
def model() -> Model:
    return build()


def nats_by_hand(model: Model, windows: list[list[int]], attention: Attention) -> tuple[float, int]:
    """-log p of every token but the first of each window, from one sequence at a time, in double precision."""
    total, count = 0.0, 0
    for window in windows:
        (logits,) = model.logits([window], attention=attention)
        for t in range(len(window) - 1):
            values = logits[t].double().tolist()
            highest = max(values)
            total += highest + math.log(sum(math.exp(x - highest) for x in values)) - values[window[t + 1]]
            count += 1
    return total, count


@pytest.mark.parametrize("tokens", [None, 70])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_nats_by_hand(model: Model, batch: int, tokens: int | None) -> None:
    ids = model.tokenizer.encode(TEXT)[:tokens]
    windows = [ids[i : i + 24] for i in range(0, len(ids), 24)]
    rows = evaluate(model, TEXT, context=24, batch=batch, tokens=tokens)
    assert [row.name for row in rows] == ["dense", "IndexShare"]
    for row, attention in zip(rows, ("dense", "sparse"), strict=True):
        total, count = nats_by_hand(model, windows, attention)
        assert row.nats_per_token == pytest.approx(total / count, rel=1e-5)
        assert row.bits_per_byte == pytest.approx(row.nats_per_byte / math.log(2))
    assert abs(rows[0].nats_per_token - rows[1].nats_per_token) > 1e-4  # selection bites: 24 > 16


def test_a_last_window_of_one_token_scores_nothing(model: Model) -> None:
    rows = [evaluate(model, TEXT, context=24, tokens=tokens) for tokens in (48, 49)]
    assert rows[0] == rows[1]
    assert rows[0] != evaluate(model, TEXT, context=24, tokens=50)


def test_work_is_counted(model: Model) -> None:
    """FSFS: two indexers score every visible pair; four layers attend to at most 16 rows a token."""
    dense, sparse = evaluate(model, TEXT, context=24, tokens=70)
    assert (dense.pairs_scored, dense.rows_attended) == (0, 0)
    lengths = [24, 24, 22]
    assert sparse.pairs_scored == 2 * sum(n * (n + 1) // 2 for n in lengths)
    assert sparse.rows_attended == 4 * sum(min(t + 1, 16) for n in lengths for t in range(n))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1.0), (torch.int8, 0.9)], ids=str)
def test_index_keys_of_another_dtype(model: Model, dtype: torch.dtype, least: float) -> None:
    """From a paged cache: the same in fp32; in int8 nearly, and the row says how nearly."""
    _, sparse, row = evaluate(model, TEXT, context=24, batch=3, tokens=70, index_dtype=dtype)
    assert sparse.overlap is None and row.overlap is not None and least <= row.overlap <= 1
    assert (row.pairs_scored, row.rows_attended) == (sparse.pairs_scored, sparse.rows_attended)
    exact = dtype is torch.float32
    assert (abs(row.nats_per_token - sparse.nats_per_token) < 1e-6) == exact == (row.overlap == 1)


def test_short_windows_are_dense(model: Model) -> None:
    dense, sparse = evaluate(model, TEXT, context=16)
    assert dense.nats_per_token == pytest.approx(sparse.nats_per_token, rel=1e-5)


# ------------------------------------------------------------------------------- bytes and tokens
def test_a_byte_tokenizer_has_one_byte_a_token(model: Model) -> None:
    """Also where a character is two or three bytes."""
    for row in evaluate(model, TEXT, context=32):
        assert row.nats_per_byte == pytest.approx(row.nats_per_token, rel=1e-12)


def kanji_tokenizer() -> Tokenizer:
    """Bytes, and one token for the three bytes of 深."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("深")[0][0]
    first, second, third = whole
    vocab = {c: i for i, c in enumerate([*alphabet, first + second, whole])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(first, second), (first + second, third)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def test_nats_per_byte_counts_the_bytes_that_were_predicted() -> None:
    model = build(kanji_tokenizer())
    text = "plain words " + "深" * 20
    assert len(model.tokenizer.encode(text)) == 32
    for row in evaluate(model, text, context=64):  # all but the first token: 11 bytes and 20 times three
        assert row.nats_per_byte == pytest.approx(row.nats_per_token * 31 / (11 + 60), rel=1e-9)
    for row in evaluate(model, text, context=64, tokens=12):  # the ASCII part alone
        assert row.nats_per_byte == pytest.approx(row.nats_per_token, rel=1e-9)
    for row in evaluate(model, text, context=16):  # the second window's first token is a 深 that nobody predicts
        assert row.nats_per_byte == pytest.approx(row.nats_per_token * 30 / (11 + 57), rel=1e-9)


# ------------------------------------------------------------------------------- all-Full
def test_an_all_full_model_has_two_rows() -> None:
    rows = evaluate(build(indexer_types=(FULL,) * 4), TEXT, context=24, tokens=48)
    assert [row.name for row in rows] == ["dense", "all-Full sparse"]
    assert rows[1].pairs_scored == 4 * 2 * (24 * 25 // 2)


def test_all_full_beside_index_share(tmp_path: Path, model: Model) -> None:
    model.save(tmp_path, dtype=torch.float32)
    assert all_full(tmp_path) is None
    everywhere = build(indexer_types=(FULL,) * 4).module
    extra = {n: t.detach() for n, t in everywhere.named_parameters() if ".indexer." in n and n[13] in "13"}
    save_file(extra, tmp_path / SHARED_INDEXERS)
    full = all_full(tmp_path)
    assert full is not None and full.config.pattern == "FFFF"
    seen: list[float] = []
    rows = evaluate(model, TEXT, context=24, tokens=70, full=full, progress=seen.append)
    assert [row.name for row in rows] == ["dense", "all-Full sparse", "IndexShare"]
    assert rows[1].pairs_scored == 2 * rows[2].pairs_scored
    assert rows[1].rows_attended == rows[2].rows_attended
    assert rows[1].nats_per_token != rows[2].nats_per_token
    ids = model.tokenizer.encode(TEXT)[:70]
    total, count = nats_by_hand(full, [ids[i : i + 24] for i in range(0, 70, 24)], "sparse")
    assert rows[1].nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert rows[::2] == evaluate(model, TEXT, context=24, tokens=70)  # the others as without it
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) == 3


def test_all_full_in_the_dtype_of_its_neighbours(tmp_path: Path) -> None:
    """A row in another precision would compare two things at once."""
    save(build(indexer_types=(FULL,) * 4).module, tmp_path)
    save_file({}, tmp_path / SHARED_INDEXERS)
    full = all_full(tmp_path, dtype=torch.bfloat16)
    assert full is not None and full.module.lm_head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("text", ["", "A"])
def test_a_text_too_short(model: Model, text: str) -> None:
    with pytest.raises(InputError, match=f"text holds {len(text)} tokens; expected at least 2"):
        evaluate(model, text)


@pytest.mark.parametrize("context", [-1, 1, 2**20 + 1])
def test_a_context_out_of_range(model: Model, context: int) -> None:
    with pytest.raises(InputError, match=f"context is {context}; expected 2 to 1048576"):
        evaluate(model, TEXT, context=context)


@pytest.mark.parametrize("tokens", [-5, 0, 1])
def test_too_few_tokens(model: Model, tokens: int) -> None:
    with pytest.raises(InputError, match=f"tokens is {tokens}; expected at least 2"):
        evaluate(model, TEXT, tokens=tokens)


def test_a_model_without_tokenizer() -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        evaluate(Model(build().module, None), TEXT)


def test_bits() -> None:
    assert Row("x", 1.0, math.log(2) * 3, 0, 0).bits_per_byte == pytest.approx(3)
