"""The bundled model on text it has not seen. The texts lie beside the checkout and are no part of it."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import nanoglm
from nanoglm import SamplingParams
from nanoglm.api import DEFAULT_MODEL
from nanoglm.eval.perplexity import all_full, evaluate
from nanoglm.verify.oracle import hf, our_tie_rule, silent

NOVELS = Path(__file__).parents[2] / "shared" / "data" / "english-novels"
HELD_OUT = NOVELS / "val" / "Gissing_Women_1893.txt"
needs_novels = pytest.mark.skipif(not HELD_OUT.is_file(), reason=f"the novels are not at {NOVELS}")


@needs_novels
def test_bits_per_byte_of_an_unseen_novel() -> None:
    """Dense, all-Full and IndexShare lie within 0.02 of each other, under 2.05 bits per byte."""
    assert hashlib.sha256(HELD_OUT.read_bytes()).hexdigest().startswith("f86baa546dda")
    text = HELD_OUT.read_text(encoding="utf-8-sig")
    rows = evaluate(nanoglm.load(), text, tokens=20_480, full=all_full(DEFAULT_MODEL))
    assert [row.name for row in rows] == ["dense", "all-Full sparse", "IndexShare"]
    bits = [row.bits_per_byte for row in rows]
    assert max(bits) < 2.05 and max(bits) - min(bits) < 0.02
    assert rows[1].pairs_scored == 3 * rows[2].pairs_scored  # 12 indexers against 4


@torch.no_grad()
def test_transformers_finds_the_same_loss_on_ten_thousand_tokens() -> None:
    """The trained checkpoint, read by both from its directory: 20 sequences of eight times k tokens."""
    ids = nanoglm.load().tokenizer.encode(inspect.getsource(argparse))[:10_240]
    windows = torch.tensor(ids).view(20, 512)
    with silent():
        theirs = hf.GlmMoeDsaForCausalLM.from_pretrained(
            DEFAULT_MODEL, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        ).eval()
    with our_tie_rule():
        expected = torch.stack([theirs(window[None], use_cache=False).logits[0] for window in windows])
    found = torch.stack(nanoglm.load(latent_norm_eps=1e-6).logits(windows.tolist()))
    assert loss(found, windows) == pytest.approx(loss(expected, windows), abs=1e-5)


def loss(logits: torch.Tensor, windows: torch.Tensor) -> float:
    """Nats a token."""
    return float(F.cross_entropy(logits[:, :-1].double().flatten(0, 1), windows[:, 1:].flatten()))


@needs_novels
@pytest.mark.slow
def test_sampled_words_are_words() -> None:
    """Of 1,000 words sampled at temperature 0.8 at least 90 % occur in the training text."""
    known: set[str] = set()
    for file in (NOVELS / "train").glob("*.txt"):
        known |= set(words(file.read_text(encoding="utf-8-sig")))
    model, sampled, seed = nanoglm.load(), [], 0
    while len(sampled) < 1000:
        params = SamplingParams(max_tokens=400, temperature=0.8, seed=seed)
        sampled += words(model.generate("It was a dark evening in November, and", params)[0])[1:-1]  # whole words
        seed += 1
    share = sum(word in known for word in sampled) / len(sampled)
    print(f"{share:.1%} of {len(sampled)} sampled words occur in the training text")
    assert share >= 0.9


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
