"""Variants of one chunk, and which fits a new prompt best (Cache-Craft, SIGMOD 2025).

A variant's KV was shaped by the chunks before it. In another prompt some of those are missing, in another order, or
joined by new ones: the fix overhead (CFO) says which share of its tokens would have to be computed again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.types import ChunkInfo

MEAN_CCI = 0.62
"""Contextual influence of a chunk that has no measured one: the mean over 76 chunks of SmolLM2, range 0.57 to 0.66."""

NOVELTY = 0.5
"""How much a chunk before it that is new counts, against one that is gone."""

NOT_EXACT = 1e-6
"""Least overhead of a variant whose context is not this one token by token: its chunks may stand in other text."""

LEAST_CFO = 0.05
"""What a use counts at most is one over this."""

Numbered = dict[bytes | tuple[bytes, int], int]
"""Places of the chunks of a context (`numbered`)."""

_NEAREST_FIRST = {"live": 0, "system": 1, "isolated": 2}


@dataclass(slots=True, eq=False)
class Variant:
    """One stored KV of a chunk.

    Attributes
    ----------
    key : bytes
        Of its last block, whose header describes it.
    info : ChunkInfo
        Without the tokens, which its content keeps.
    nbytes : int
        What it costs in the index.
    score : float
        Cache-Craft's reusability: one over the fix overhead, summed over its uses.
    """

    key: bytes
    info: ChunkInfo
    nbytes: int
    score: float = 0.0

    def overhead(self, before: Numbered, context: bytes) -> float:
        """CFO in a prompt with these chunks before it, whose tokens before it have the digest `context`."""
        if context == self.info.context:
            return 0.0
        return max(fix_overhead(self.info, before), NOT_EXACT)

    def used(self, overhead: float) -> None:
        """Count a use."""
        self.score += 1.0 / max(overhead, LEAST_CFO)


def fix_overhead(info: ChunkInfo, before: Numbered, alpha: float = 1.0) -> float:
    """Share of a chunk's tokens to compute again behind the chunks `before` it, in 0..1.

    alpha * CCI * max(1 - beta', novelty share): beta' is the part of the old context's influence that is still there,
    less what stands in another order. Without an old context nothing is known to fit, and beta' is 0. A chunk that
    stands twice in a context counts as two.
    """
    cci = info.cci or MEAN_CCI
    if not info.lineage:
        return min(alpha * cci, 1.0)
    old, inter = numbered(info.lineage), info.inter or [1.0] * len(info.lineage)
    total = sum(inter)
    common = [one for one in old if one in before]
    beta = sum(inter[old[one]] for one in common) / total if total > 0 else 0.0
    kept = beta * (1.0 - _disorder([before[one] for one in common]))
    novel = (len(before) - len(common)) / len(before) if before else 0.0
    return min(max(alpha * cci * max(1.0 - kept, NOVELTY * novel), 0.0), 1.0)


def nearness(variant: Variant) -> int:
    """Among equal overheads: the smaller the nearer is its context to one of a prompt."""
    return _NEAREST_FIRST[variant.info.capture]


def numbered(ids: Sequence[bytes]) -> Numbered:
    """The place of each chunk; one that was there before is another, named by its number, too."""
    places: Numbered = {one: place for place, one in enumerate(ids)}
    if len(places) == len(ids):
        return places
    places, seen = {}, Counter[bytes]()
    for place, one in enumerate(ids):
        seen[one] += 1
        places[one if seen[one] == 1 else (one, seen[one])] = place
    return places


def _disorder(places: Sequence[int]) -> float:
    """Normalized Kendall tau distance of different places from their order."""
    if len(places) < 2:
        return 0.0
    before: list[int] = []
    swapped = 0
    for place in places:
        at = bisect_left(before, place)
        swapped += len(before) - at
        before.insert(at, place)
    return swapped / (len(places) * (len(places) - 1) // 2)
