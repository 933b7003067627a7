"""How many drafts pay: from what steps are measured to cost and what verification accepts, anew for every step.

A chain of k drafts yields 1 + a_1 + a_1 a_2 + ... tokens, a_i being the share of i-th drafts that are accepted behind
accepted ones, and costs the main model's pass over k + 1 rows a request and the MTP layer's k steps. The best ratio
wins; if that is k = 0, speculation is off until it pays again. What is known grows old, so now and then a step is spent
on a neighbouring depth. Greedy tokens do not depend on the depth, so all greedy requests have one. Sampled ones do:
such a request has a depth of its own, which follows from its tokens and nominal costs, never from a clock or company.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

MEMORY = 0.1  # weight of what was measured last
EVERY = 32  # steps between two that try a neighbour
MARGIN = 1.03  # by so much must drafts win


class Depth:
    """Chooses a depth up to ``most``, by the number of requests that decode."""

    def __init__(self, most: int) -> None:
        self.most, self._steps = most, 0
        self._rates = [0.75] * most  # of acceptance, behind accepted drafts; hopeful, or nothing would be tried
        self._verify: dict[int, dict[int, float]] = {}  # seconds by requests (in powers of 2) and drafts of each
        self._draft: dict[int, dict[int, float]] = {}  # seconds by requests and depth

    def accepted(self, drafted: int, accepted: int) -> None:
        """One chain's outcome."""
        for place in range(min(drafted, accepted + 1)):
            self._rates[place] += MEMORY / 2 * ((place < accepted) - self._rates[place])

    def took(self, requests: int, verified: int, verifying: float, depth: int, drafting: float) -> None:
        """Seconds of one step in which all ``requests`` decoded."""
        for table, key, seconds in ((self._verify, verified, verifying), (self._draft, depth, drafting)):
            known = table.setdefault(requests.bit_length(), {})
            known[key] = known[key] + MEMORY * (seconds - known[key]) if key in known else seconds

    def choose(self, requests: int) -> int:
        """The depth of the chains to propose now."""
        self._steps += 1
        values = self.values(requests)
        best = max(range(self.most + 1), key=lambda k: values[k] * (MARGIN if k == 0 else 1))
        if self._steps % EVERY == 0:
            return min(self.most, best + 1) if self._steps // EVERY % 2 or best == 0 else best - 1
        return best

    def values(self, requests: int) -> list[float]:
        """Tokens a second and request that each depth is expected to give, in units of what is known."""
        verify, draft = (table.get(requests.bit_length(), {}) for table in (self._verify, self._draft))
        tokens = accumulate(accumulate(self._rates, mul), initial=1.0)
        verify = verify or {0: 1.0}
        least = min(verify.values())
        return [n / (_at(verify, k, 0.02 * least) + _at(draft, k, 0.1 * least)) for k, n in enumerate(tokens)]


def _at(known: dict[int, float], k: int, slope: float) -> float:
    """Seconds at depth k: as measured, or from the nearest depth that was, with the slope of the furthest two."""
    if k in known:
        return known[k]
    if not known:
        return slope * k
    low, high = min(known), max(known)
    if high > low:
        slope = max(0.0, (known[high] - known[low]) / (high - low))
    nearest = min(known, key=lambda other: abs(other - k))
    return max(known[nearest] + slope * (k - nearest), known[nearest] / 2)  # two noisy points may lead anywhere
