"""How much the Selections of a model's layers have in common, and how alike attention is under each other's.

Shape legend: T tokens, N layers, K selected, S keys.

Source: indexcache spec 2, 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglm.errors import InputError
from nanoglm.indexcache.calibration import Calibration
from nanoglm.indexcache.evaluate import BATCH_TOKENS
from nanoglm.indexcache.stack import GLMStack, Stack, run
from nanoglm.model import BatchStore
from nanoglm.train.data import Sample

ELEMENTS = 1 << 22  # of the sets that are compared at once, as masks


@dataclass(frozen=True)
class Band:
    """Overlap among the queries of a range of positions.

    Attributes:
        begin, end: positions, from ``begin`` to ``end`` - 1; they see ``begin`` + 1 keys and more.
        queries: how many there were. overlap: fp64 [N, N], mean share of the k selected that two layers have in common.
        chance: what sets drawn at random would have in common, k over the keys seen.
        corrected: (overlap - chance) / (1 - chance): 0 by chance, 1 if alike.
    """

    begin: int
    end: int
    queries: int
    overlap: Tensor
    chance: float

    @property
    def corrected(self) -> Tensor:
        return (self.overlap - self.chance) / (1 - self.chance)


@torch.no_grad()
def overlap(stack: Stack, data: Calibration) -> list[Band]:
    """All pairs of layers under the model's own pattern, in bands of positions that double, from 2 k on: where a query
    sees hardly more than it selects, all sets are alike.

    Raises:
        InputError: no sequence is longer than 2 k.
    """
    sums: dict[int, tuple[Tensor | float, int, float]] = {}
    k = 0
    for part in data.sample.split(BATCH_TOKENS):
        selections, positions = _selections(stack, part), part.batch.positions
        k = selections[0].shape[1]
        begin = 2 * k
        while begin < max(part.counts):
            rows = ((positions >= begin) & (positions < 2 * begin)).nonzero()[:, 0]
            common, n, chance = sums.get(begin, (0.0, 0, 0.0))
            chance += float((k / (positions[rows] + 1)).sum())
            sums[begin] = common + _common([s[rows] for s in selections], 2 * begin), n + len(rows), chance
            begin *= 2
    if not sums:
        raise InputError(f"sequences have at most {max(data.sample.counts)} tokens; expected more than 2 k ({2 * k})")
    return [
        Band(begin, 2 * begin, n, torch.as_tensor(common) / (k * n), chance / n)
        for begin, (common, n, chance) in sorted(sums.items())
    ]


def merged(bands: list[Band], least: int = 0) -> Band:
    """All queries from position ``least`` on as one band."""
    some = [band for band in bands if band.begin >= least] or bands[-1:]
    n = sum(band.queries for band in some)
    total = torch.stack([band.overlap * band.queries for band in some]).sum(0)
    return Band(some[0].begin, some[-1].end, n, total / n, sum(band.chance * band.queries for band in some) / n)


def _selections(stack: Stack, part: Sample) -> list[Tensor]:
    x_TD, step = stack.begin(part.ids, part.batch)
    selection: Tensor | None = None
    found: list[Tensor] = []
    for i, letter in enumerate(stack.pattern):
        x_TD, selection = run(stack.layer(i), x_TD, step, selection if letter == "S" else None)
        assert selection is not None
        found.append(selection)
    return found


def _common(selections: list[Tensor], keys: int) -> Tensor:
    """By pair of layers, how many positions both selected, over all rows: fp64 [N, N]."""
    total = torch.zeros(len(selections), len(selections), dtype=torch.float64)
    rows = max(1, ELEMENTS // (len(selections) * keys))
    for begin in range(0, len(selections[0]), rows):
        chosen_TNK = torch.stack([s[begin : begin + rows] for s in selections], 1).long()
        held_TNS = torch.zeros(*chosen_TNK.shape[:2], keys + 1, device=chosen_TNK.device)
        held_TNS.scatter_(-1, torch.where(chosen_TNK < 0, keys, chosen_TNK), 1.0)
        held_TNS = held_TNS[..., :keys]
        total += (held_TNS @ held_TNS.mT).double().sum(0).cpu()
    return total


@torch.no_grad()
def similarity(stack: GLMStack, data: Calibration) -> Tensor:
    """fp64 [N, N]: of layer i (row) the mean cosine between what its attention adds under its own Selection and under
    that of an earlier layer j (column), the rest of the model being its own (spec 3.3)."""
    n = len(stack.pattern)
    total = torch.zeros(n, n, dtype=torch.float64)
    for part in data.sample.split(BATCH_TOKENS):
        x_TD, step = stack.begin(part.ids, part.batch)
        chosen: list[Tensor] = []
        for i in range(n):
            layer = stack.layer(i)
            normed_TD = layer.input_layernorm(x_TD)
            outputs = [layer.self_attn(normed_TD, replace(step, replay=True, store=BatchStore()), s)[0] for s in chosen]
            received = chosen[-1] if stack.pattern[i] == "S" else None
            own_TD, selection = layer.self_attn(
                normed_TD, replace(step, replay=received is not None, store=BatchStore()), received
            )
            for j, output_TD in enumerate(outputs):
                total[i, j] += F.cosine_similarity(own_TD.double(), output_TD.double(), dim=-1).sum().cpu()
            chosen.append(selection)
            x_TD, _ = run(layer, x_TD, step, selection)
    return total / len(data.sample.ids)
