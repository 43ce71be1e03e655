"""Variants of one chunk, and which fits a new prompt best (Cache-Craft, SIGMOD 2025).

A variant's KV was shaped by the chunks before it. In another prompt some of those are missing, in another order, or
joined by new ones: the fix overhead (CFO) says which share of its tokens would have to be computed again.
"""

from __future__ import annotations

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

    def overhead(self, before: Sequence[bytes], context: bytes) -> float:
        """CFO in a prompt with these chunks before it, whose tokens before it have the digest `context`."""
        if context == self.info.context:
            return 0.0
        return max(fix_overhead(self.info, before), NOT_EXACT)

    def used(self, overhead: float) -> None:
        """Count a use."""
        self.score += 1.0 / max(overhead, LEAST_CFO)


def fix_overhead(info: ChunkInfo, before: Sequence[bytes], alpha: float = 1.0) -> float:
    """Share of a chunk's tokens to compute again behind the chunks `before` it, in 0..1.

    alpha * CCI * max(1 - beta', novelty share): beta' is the part of the old context's influence that is still there,
    less what stands in another order. Without an old context nothing is known to fit, and beta' is 0. A chunk that
    stands twice in a context counts as two.
    """
    cci = info.cci or MEAN_CCI
    if not info.lineage:
        return min(alpha * cci, 1.0)
    old, new = _numbered(info.lineage), _numbered(before)
    weights = dict(zip(old, info.inter or [1.0] * len(old), strict=True))
    total = sum(weights.values())
    present = set(new)
    common = [one for one in old if one in present]
    beta = sum(weights[one] for one in common) / total if total > 0 else 0.0
    kept = beta * (1.0 - _disorder(common, new))
    novel = len(present - set(old)) / len(new) if new else 0.0
    return min(max(alpha * cci * max(1.0 - kept, NOVELTY * novel), 0.0), 1.0)


def nearness(variant: Variant) -> int:
    """Among equal overheads: the smaller the nearer is its context to one of a prompt."""
    return _NEAREST_FIRST[variant.info.capture]


def _numbered(ids: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Each id with how often it was there before."""
    seen: dict[bytes, int] = {}
    out = []
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
        out.append((one, seen[one]))
    return out


def _disorder(common: Sequence[tuple[bytes, int]], new: Sequence[tuple[bytes, int]]) -> float:
    """Normalized Kendall tau distance of the common ids' order, old against new."""
    if len(common) < 2:
        return 0.0
    place = {one: index for index, one in enumerate(new)}
    order = [place[one] for one in common]
    pairs = len(order) * (len(order) - 1) // 2
    return sum(a > b for i, a in enumerate(order) for b in order[i + 1 :]) / pairs
