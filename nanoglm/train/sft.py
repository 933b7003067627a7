"""Conversations in, rows for supervised fine-tuning out: loss on the assistant's own tokens and on nothing else.

Its own are the tokens that it would generate: thinking, text, tool calls, and the token that ends its turn (<|user|>,
or <|observation|> behind tool calls: generation stops there). Not its own is what the generation prompt supplies
(<|assistant|><think>), nor anything of system, user and tools. An assistant's message is learned once, in the context
in which it is generated:

- With thinking and cleared reasoning, the template's default, each user turn is a sample of its own. Its prompt shows
  the earlier turns without their reasoning, as it will when served; only what follows the last user is learned.
- With preserved reasoning (``"clear_thinking": false``) or without thinking, earlier turns stand as they were
  generated: the conversation is one sample and every turn is learned.

Shape legend: B rows, L length.  Source: serving spec 1.1, 2.3; training spec 1.6.
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanoglm.chat.template import ChatTemplate, normalise
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.errors import InputError
from nanoglm.train.losses import IGNORE

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # the tokens that generation ends with
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SWITCHES = ("enable_thinking", "reasoning_effort", "clear_thinking")


# ------------------------------------------------------------------------------- conversations
def conversations(path: str | Path) -> Iterator[dict[str, Any]]:
    """The conversations of a JSONL file: objects with ``messages`` and, where wanted, ``tools`` and the template's
    switches; or with ``question`` and ``answer``, as GSM8K has them.

    Raises:
        InputError: the file cannot be read, or a line is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"conversations {path} cannot be read as UTF-8: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            yield value
        elif isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("question", "answer")):
            yield _gsm8k(value["question"], value["answer"])
        else:
            raise InputError(f"conversations {path} line {number} has neither messages nor question and answer")


def _gsm8k(question: str, answer: str) -> dict[str, Any]:
    """The way to the answer becomes reasoning, without its calculator calls (<<1+1=2>>); the answer is the text."""
    reasoning, _, result = answer.rpartition("####")
    reply = {
        "role": "assistant",
        "reasoning_content": re.sub("<<.*?>>", "", reasoning).strip(),
        "content": result.strip(),
    }
    return {"messages": [{"role": "user", "content": question}, reply]}


# ------------------------------------------------------------------------------- samples
class Sample(NamedTuple):
    """One document: ids and labels, int64 [n] both. A label is the id itself where it is learned, else -100."""

    ids: np.ndarray
    labels: np.ndarray


def samples(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> list[Sample]:
    """What is learned from one conversation.

    Args:
        conversation: ``messages``, ``tools`` and the template's switches. Without ``enable_thinking`` thinking is on if
            some message has reasoning: data that has none shall not teach to skip it. Where it is off, reasoning is
            left out and the answers are learned without.
        template: GLM-5.2's if left out.

    Raises:
        InputError: nothing to learn, or messages or tools that the template or the tokenizer refuses.
    """
    template, messages = template or ChatTemplate(), normalise(conversation.get("messages", ()))
    switches = {name: conversation[name] for name in SWITCHES if name in conversation}
    if not switches.setdefault("enable_thinking", any(message.get("reasoning_content") for message in messages)):
        messages = [message | {"reasoning_content": ""} for message in messages]
    by_turn = bool(switches["enable_thinking"] and switches.get("clear_thinking", True))
    users = [i for i, message in enumerate(messages) if message["role"] == "user"] if by_turn else []
    found = []
    for end in [*users, len(messages)]:
        sample = _sample(messages[:end], conversation.get("tools"), switches, by_turn, tokenizer, template)
        if (sample.labels != IGNORE).any():
            found.append(sample)
    if not found:
        raise InputError("conversation teaches nothing; expected a message of the assistant")
    return found


def _sample(
    messages: list[dict[str, Any]], tools: Any, switches: dict[str, Any], last_turn: bool, tokenizer: Tokenizer,
    template: ChatTemplate,
) -> Sample:  # fmt: skip
    """The conversation so far, with what ends the assistant's last message; learned from the last user on, or all."""
    ids = template.encode(tokenizer, messages, tools, **switches)
    prompt = template.encode(tokenizer, messages, tools, add_generation_prompt=True, **switches)[len(ids) :]
    if not prompt:
        raise InputError("chat template writes no generation prompt; expected what an assistant's turn begins with")
    user = _id(tokenizer, "<|user|>")
    begin = len(ids) - 1 - ids[::-1].index(user) if last_turn and user in ids else 0
    if messages and messages[-1]["role"] == "assistant":  # what would come next in a longer conversation
        ids.append(_id(tokenizer, "<|observation|>") if messages[-1]["tool_calls"] else user)
    stops = {_id(tokenizer, token) for token in STOPS}
    others = {_id(tokenizer, token) for token in ROLES} - stops
    labels, at = np.full(len(ids), IGNORE, np.int64), begin
    while at < len(ids):
        if ids[at : at + len(prompt)] != prompt:
            at += 1
            continue
        at += len(prompt)
        while at < len(ids) and ids[at] not in others:
            labels[at] = ids[at]
            at += 1
            if ids[at - 1] in stops:
                break
    return Sample(np.array(ids, np.int64), labels)


def _id(tokenizer: Tokenizer, token: str) -> int:
    ids = tokenizer.encode(token)
    if len(ids) != 1:
        raise InputError(f"tokenizer has no {token}; expected one of GLM's")
    return ids[0]


# ------------------------------------------------------------------------------- rows
def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Packs whole documents into rows of ``width``: the longest first, each where it leaves the least room.

    Args:
        lengths: of the documents, none above ``width``.

    Returns:
        Per row the documents' numbers.
    """
    rows, spaces = list[list[int]](), list[tuple[int, int]]()  # spaces: (room, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, (lengths[i], 0))
        if at == len(spaces):
            rows.append([])
            room, row = width, len(rows) - 1
        else:
            room, row = spaces.pop(at)
        rows[row].append(i)
        if room > lengths[i]:
            insort(spaces, (room - lengths[i], row))
    return rows


class Rows(NamedTuple):
    """Packed samples, int64 [B, L + 1] each.

    Attributes:
        ids: of whole samples side by side, then padding.
        labels: the ids that are learned, -100 elsewhere. The target of token t is label t + 1; the first label of a
            document is -100, so the last token of one learns nothing of the next.
        documents: 0, 1, ... within a row; padding counts as one more.
    """

    ids: Tensor
    labels: Tensor
    documents: Tensor


@dataclass
class PackedLoader:
    """Rows of ``length`` + 1 tokens in an order that is drawn anew each epoch; samples are packed once.

    A sample longer than a row loses its end: each token that is left has its whole context still, so nothing wrong is
    learned, and one long conversation does not stop a run. It goes if nothing to learn is left. A warning counts both.

    The state is (epoch, position), as that of :class:`nanoglm.train.data.Loader`. All samples are held in memory.

    Args:
        pad: id behind the last sample of a row; the configuration's ``pad_token_id``, <|endoftext|>.

    Raises:
        InputError: no sample is left.
    """

    samples: Sequence[Sample]
    length: int
    pad: int
    seed: int = 0
    epoch: int = 0
    position: int = 0  # rows of this epoch that were given out

    def __post_init__(self) -> None:
        width = self.length + 1
        kept = [Sample(s.ids[:width], s.labels[:width]) for s in self.samples]
        kept = [s for s in kept if (s.labels != IGNORE).any()]
        cut, gone = sum(len(s.ids) > width for s in self.samples), len(self.samples) - len(kept)
        if cut:
            warnings.warn(
                f"{cut} of {len(self.samples)} samples are longer than {width} tokens: {cut - gone} were cut, "
                f"{gone} had nothing to learn within",
                stacklevel=3,
            )
        if not kept:
            raise InputError(f"no sample teaches anything within {width} tokens; expected a longer row or other data")
        self.samples = kept
        self.rows = best_fit([len(s.ids) for s in kept], width)
        self._drawn: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> Rows:
        """The next ``count`` rows."""
        ids = np.full((count, self.length + 1), self.pad, np.int64)
        labels, documents = np.full_like(ids, IGNORE), np.zeros_like(ids)
        for b in range(count):
            at = 0
            for sample in (self.samples[i] for i in self.rows[self._order()[self.position]]):
                end = at + len(sample.ids)
                ids[b, at:end], labels[b, at:end] = sample
                labels[b, at] = IGNORE
                documents[b, end:] += 1
                at = end
            self.position += 1
            if self.position == len(self.rows):
                self.epoch, self.position = self.epoch + 1, 0
        return Rows(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(documents))

    def state_dict(self) -> dict[str, int]:
        """What to make a loader with that goes on from here."""
        return {"epoch": self.epoch, "position": self.position}

    def _order(self) -> np.ndarray:
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))
        return self._drawn[1]
