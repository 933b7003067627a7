"""A source of samples for training: generated conversations, tokenised as they are served."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nanoglm.chat.template import ChatTemplate
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.dialogues import conversation
from nanoglm.train.data import Sample
from nanoglm.train.sft import Document, samples


class Assistant:
    """A source of conversations; its state is how many samples it drew."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer, self.seed, self.drawn, self.template = tokenizer, seed, 0, ChatTemplate()

    def take(self, length: int, count: int) -> Sample:
        """Documents of at most ``length`` tokens, about ``length * count`` together: no document is turned away for its
        length but one that is too long, so the last one may reach beyond."""
        rng = np.random.default_rng((self.seed, self.drawn))
        self.drawn += 1
        found = list[Document]()
        while sum(len(d.ids) for d in found) < length * (count - 0.4):
            drawn = samples(conversation(rng, length), self.tokenizer, self.template)
            found += [d for d in drawn if len(d.ids) - 1 <= length]
        ids, targets = np.concatenate([d.ids[:-1] for d in found]), np.concatenate([d.labels[1:] for d in found])
        return Sample(torch.from_numpy(ids), torch.from_numpy(targets), tuple(len(d.ids) - 1 for d in found))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
