"""Samples of generated conversations: reproducible, within their length, and what serving sees."""

import numpy as np
import pytest

from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.dialogues import LEVELS, arithmetic
from nanoglm.train.assistant import Assistant
from nanoglm.train.data import IGNORE
from nanoglm.train.sft import samples

TOKENIZER = byte_tokenizer()


def test_the_seed_decides_what_is_drawn() -> None:
    first, second = Assistant(TOKENIZER, 3), Assistant(TOKENIZER, 3)
    a, b = first.take(512, 4), second.take(512, 4)
    assert a.ids.tolist() == b.ids.tolist() and a.targets.tolist() == b.targets.tolist()
    assert first.take(512, 4).ids.tolist() != a.ids.tolist()
    third = Assistant(TOKENIZER, 3)
    third.load_state_dict({"drawn": 1})
    assert third.take(512, 4).ids.tolist() == second.take(512, 4).ids.tolist()
    assert Assistant(TOKENIZER, 4).take(512, 4).ids.tolist() != a.ids.tolist()


@pytest.mark.parametrize("length", [256, 1024, 2048])
def test_samples_fit_and_teach(length: int) -> None:
    sample = Assistant(TOKENIZER).take(length, 2048 // length)
    assert max(sample.counts) <= length and sum(sample.counts) == len(sample.ids)
    assert (sample.targets != IGNORE).float().mean() > 0.05


def test_what_is_learnt_is_what_serving_generates() -> None:
    """The prompt that serving writes is the sample's beginning, nothing of which is learnt."""
    template, rng = ChatTemplate(), np.random.default_rng(9)
    for level in LEVELS:
        switches = {"enable_thinking": level != "off"} | ({"reasoning_effort": "high"} if level == "high" else {})
        messages = arithmetic(rng, level)
        (sample,) = samples({"messages": messages, **switches}, TOKENIZER)
        prompt = template.encode(TOKENIZER, messages[:1], add_generation_prompt=True, **switches)
        assert sample.ids[: len(prompt)].tolist() == prompt and (sample.labels[: len(prompt)] == IGNORE).all()
        assert (sample.labels[len(prompt) :] != IGNORE).all()
