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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanoglm.chat.template import ChatTemplate, normalise
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.errors import InputError
from nanoglm.train.data import IGNORE, Sample

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
class Document(NamedTuple):
    """One document: ids and labels, int64 [n] both. A label is the id itself where it is learned, else -100."""

    ids: np.ndarray
    labels: np.ndarray


def samples(
    conversation: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> list[Document]:
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
) -> Document:  # fmt: skip
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
    return Document(np.array(ids, np.int64), labels)


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


class Conversations:
    """A source of packed documents: a row holds whole ones side by side, each a sequence of its own, so nothing is
    padded and none sees another. Packed once for each length; rows come in an order that is drawn anew each epoch.

    A document longer than a row loses its end: each token that is left has its whole context still, so nothing wrong is
    learned, and one long conversation does not stop a run. It goes if nothing to learn is left. A warning counts both.
    """

    def __init__(self, documents: Sequence[Document], seed: int = 0) -> None:
        self.documents, self.seed = documents, seed
        self.at: dict[int, tuple[int, int]] = {}  # by length: epoch, and rows of it that were given out
        self._packed: dict[int, list[list[Document]]] = {}
        self._drawn: tuple[int, int, np.ndarray] | None = None

    def take(self, length: int, count: int) -> Sample:
        """The next ``count`` rows of at most ``length`` tokens. Raises InputError if none teaches anything."""
        found: list[Document] = []
        for _ in range(count):
            epoch, position = self.at.get(length, (0, 0))
            rows = self._rows(length)
            found += rows[self._order(length, epoch, len(rows))[position]]
            self.at[length] = (epoch, position + 1) if position + 1 < len(rows) else (epoch + 1, 0)
        ids, targets = np.concatenate([d.ids[:-1] for d in found]), np.concatenate([d.labels[1:] for d in found])
        return Sample(torch.from_numpy(ids), torch.from_numpy(targets), tuple(len(d.ids) - 1 for d in found))

    def state_dict(self) -> dict[str, Any]:
        return {str(length): list(at) for length, at in self.at.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = {int(length): (epoch, position) for length, (epoch, position) in state.items()}

    def _rows(self, length: int) -> list[list[Document]]:
        if length not in self._packed:
            width = length + 1  # the last id of a document is a target only
            kept = [Document(d.ids[:width], d.labels[:width]) for d in self.documents]
            kept = [d for d in kept if (d.labels[1:] != IGNORE).any()]
            cut, gone = sum(len(d.ids) > width for d in self.documents), len(self.documents) - len(kept)
            if cut:
                warnings.warn(
                    f"{cut} of {len(self.documents)} samples are longer than {width} tokens: {cut - gone} were cut, "
                    f"{gone} had nothing to learn within",
                    stacklevel=3,
                )
            if not kept:
                raise InputError(
                    f"no sample teaches anything within {width} tokens; expected longer rows or other data"
                )
            rows = best_fit([len(d.ids) - 1 for d in kept], length)
            self._packed[length] = [[kept[i] for i in row] for row in rows]
        return self._packed[length]

    def _order(self, length: int, epoch: int, rows: int) -> np.ndarray:
        if self._drawn is None or self._drawn[:2] != (length, epoch):
            self._drawn = length, epoch, np.random.default_rng((self.seed, length, epoch)).permutation(rows)
        return self._drawn[2]
