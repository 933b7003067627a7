"""What a run does and when: stages, rates and weights, as plain values that a recipe returns and the command line
overrides. Shares are of all steps, so a run of other steps keeps its form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from nanoglm.errors import InputError
from nanoglm.model import Attention

Data = Literal["text", "conversations", "recall", "assistant"]
Drafts = Literal["likelihood", "rejection", "total_variation"]  # what MTP learns, see losses.DRAFTS


@dataclass(frozen=True)
class Stage:
    """A stretch of a run: what is trained, on what, and how attention goes. Made by the functions below."""

    name: Literal["dense", "indexer_warmup", "sparse", "long", "sft"]
    share: float  # of all steps
    length: int  # tokens a sequence, at the same tokens a step
    attention: Attention
    backbone: bool = True  # whether it learns, from the language model's terms
    indexer_every: int = 1  # steps between two of the indexers' own, which learn from their KL; 0: they rest
    rope_theta: float | None = None  # the base of the rotation from here on; None: as before
    data: Data = "text"
    rate: float = 1.0  # times the recipe's
    topk: int | None = None  # tokens that each selects, if not the model's own number
    kl_of: Literal["selected", "visible"] = "selected"  # keys over which indexers learn, where a stage selects


def dense(share: float, length: int = 256) -> Stage:
    """All keys are visible, indexers rest: pre-training."""
    return Stage("dense", share, length, "dense", indexer_every=0)


def indexer_warmup(share: float, length: int = 256) -> Stage:
    """Indexers alone learn, from dense attention over all keys (training spec 1.3)."""
    return Stage("indexer_warmup", share, length, "dense", backbone=False)


def sparse(share: float, length: int = 512, indexer_every: int = 4) -> Stage:
    """Attention under Selections; indexers learn from what is selected, all else from the language model's loss.

    At lengths of some k, masking what is not selected is cheaper than gathering what is (docs/log.md).
    """
    return Stage("sparse", share, length, "masked", indexer_every=indexer_every)


def long(share: float, length: int, rope_theta: float | None = None, rate: float = 1.0) -> Stage:
    """As ``sparse``, at lengths where selected rows are gathered and the rotation may get another base."""
    return Stage("long", share, length, "sparse", rope_theta=rope_theta, rate=rate)


def sft(share: float, length: int, rate: float = 1.0) -> Stage:
    """As ``sparse``, on conversations, of which what the assistant says is learnt."""
    return Stage("sft", share, length, "masked", indexer_every=4, data="conversations", rate=rate)


def tasks(*stages: Stage, topk: int | None = None) -> tuple[Stage, ...]:
    """The stages on the tasks of long context, selecting ``topk``. Their indexers learn over all that is visible: of
    what they missed, the selected keys alone would tell them nothing (training spec 6)."""
    return tuple(replace(stage, data="recall", topk=topk, kl_of="visible") for stage in stages)


def assistant(*stages: Stage) -> tuple[Stage, ...]:
    """The stages on generated conversations. Their indexers learn over all that is visible, as those of ``tasks``."""
    return tuple(replace(stage, data="assistant", kl_of="visible") for stage in stages)


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. Rates are peaks.

    Raises:
        InputError: a value out of range, or stages whose shares are not 1 together.
    """

    preset: str = "nano"  # or d2 to d64, the dial: so many layers and all else in proportion
    depth: int | None = None  # layers, if not the preset's; all else stays, the schedule goes on by its rule
    pattern: str | None = None  # which layers are Full and which Shared, letters F and S, if not by that rule
    steps: int = 4000
    tokens: int = 2048  # a step
    pass_tokens: int | None = None  # of one forward pass at most; the rest of a step is accumulated. None: all
    stages: tuple[Stage, ...] = (dense(0.75), indexer_warmup(0.07), sparse(0.18))
    dtype: Literal["float32", "bfloat16"] = "float32"  # of forward and backward; optimisers always move fp32 weights
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: for the matrices it is for, see optim.groups
    rate: float = 8e-3  # of AdamW alone less, about 3e-3
    indexer_rate: float = 5e-3  # of a stage in which the backbone rests; elsewhere both have one rate
    warmup: int = 50  # steps in which the rate rises
    floor: float = 0.1  # of the rate, at the end of its cosine
    weight_decay: float = 0.1
    sharpen: float = 1.0  # times all attention's scores at the end, for sequences longer than those of training
    skip_positions: bool = True  # in sequences of the tasks, see train/recall.py
    hops: float = 0.0  # share of chains of several hops among the tasks
    shared: float = 0.0  # of all embeddings at the start, see GLM.initialise
    own_layer_kl: bool = False  # an indexer learns from its own layer alone, not from all that it serves
    mtp_depths: int = 2
    mtp_weight: float = 0.3
    balance_rate: float = 3e-3  # step of the routers' bias
    balance_weight: float = 1e-4  # of the loss that evens experts within a sequence
    late: float = 0.65  # from here on the bias rests and MTP weighs ``late_mtp_weight``
    late_mtp_weight: float = 0.1
    late_drafts: Drafts = "likelihood"  # what MTP learns from there on
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "warmup", "mtp_depths", "depth", "pass_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        if not self.sharpen > 0:
            raise InputError(f"sharpen is {self.sharpen}; expected more than 0")
        if not 0 <= self.hops <= 1:
            raise InputError(f"hops is {self.hops}; expected a share, 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected 0 to 2**63 - 1")
        if not math.isclose(total := sum(stage.share for stage in self.stages), 1.0, rel_tol=1e-6):
            raise InputError(f"shares of the stages are {total:g} together; expected 1")
        for stage in self.stages:
            if stage.share < 0 or stage.length < 2 or self.tokens % stage.length:
                raise InputError(
                    f"stage {stage.name} has share {stage.share:g} and length {stage.length}; expected a share of 0 or "
                    f"more and a length that divides tokens ({self.tokens})"
                )
            if stage.topk is not None and stage.topk < 1:
                raise InputError(f"stage {stage.name} has topk {stage.topk}; expected at least 1")
            if stage.indexer_every < 0 or (not stage.backbone and stage.indexer_every != 1):
                raise InputError(
                    f"stage {stage.name} has indexer_every {stage.indexer_every}; expected 0 or more, and 1 where the "
                    "backbone rests, or a step would learn nothing"
                )

    def stage(self, step: int) -> Stage:
        """The one that this step is in."""
        done, border = step / self.steps, 0.0
        for stage in self.stages:
            border += stage.share
            if done < border - 1e-9:
                return stage
        return self.stages[-1]

    def reads(self, data: Data) -> bool:
        """Whether a stage learns from such data."""
        return any(stage.data == data for stage in self.stages)

    def rope_theta(self, step: int) -> float | None:
        """The base that holds at this step: its stage's or the last one that an earlier stage set."""
        found, reached = None, self.stage(step)
        for stage in self.stages:
            found = stage.rope_theta or found
            if stage is reached:
                break
        return found

    def is_late(self, step: int) -> bool:
        """Whether balance rests and MTP weighs less."""
        return step / self.steps >= self.late

    def drafts(self, step: int) -> Drafts:
        """What MTP learns at this step: to be likely or, late, what the recipe says."""
        return self.late_drafts if self.is_late(step) and self.stage(step).backbone else "likelihood"

    def rates(self, step: int) -> tuple[float, float]:
        """(backbone, indexers): ``warmup`` steps up, cosine to ``floor``; where the backbone rests, it pauses."""
        stage, done = self.stage(step), step / self.steps
        if not stage.backbone:
            return 0.0, self.indexer_rate * stage.rate
        begin, paused, resting = 0.0, 0.0, 0.0
        for other in self.stages:
            if not other.backbone:
                resting += other.share
                paused += other.share * (begin < done)
            begin += other.share
        cosine = math.cos(math.pi * (done - paused) / (1 - resting))
        shape = (1 + self.floor) / 2 + (1 - self.floor) / 2 * cosine
        rate = self.rate * stage.rate * min(1.0, (step + 1) / self.warmup) * shape
        return rate, rate
