"""Load, blend or recompute: how much of what the daemon has is worth fetching.

Nothing here is configured. What computing costs is learned from the engine's own steps, what loads cost from how long
they took, and what the daemon's lower tiers cost now the daemon tells with every lookup. For each prompt the matched
blocks are then split: the first so many are loaded, the rest is computed, so that the first token comes earliest. What
blending takes is learned from the steps that it was in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.fit import MovingFit
from kvstore.types import TierCode

Floats = NDArray[np.float64]
Speeds = Mapping[TierCode, tuple[float, float, float]]
"""What the daemon says of its tiers: seconds to wait, then for each block, and for each byte."""

MARGIN = 0.05
"""Loading must promise to be sooner by this share: estimates are not exact, and computing keeps its word better."""

SAME = 0.02
"""Splits this close to the best are as good; of those the one that computes least is taken."""

KNOWN_TOKENS = 256
"""Tokens that must have been computed under our eyes before a forecast is believed."""

SLOW_S = 0.1
"""While the engine's speed is unknown, of a load that takes longer a part is computed to learn it."""

SLACK_S = 0.05
PATIENCE = 0.25
"""A load that is made only to find out may take `SLACK_S`, and this share of the computing that it saves."""


@dataclass(slots=True)
class Blend:
    """What of a prompt is put together from chunks: tokens from `exact` to `end`, of which `computed` are computed."""

    exact: int
    end: int
    computed: float


class Prefill:
    """What computing prompt tokens costs: so much a step, a token, and a pair of a token and one before it.

    Parameters
    ----------
    chunk : int
        Tokens that the engine computes in one step at most.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = max(chunk, 1)
        self._fit = MovingFit(3, main=1, decay=0.95)
        self._tokens = 0

    @property
    def known(self) -> bool:
        """Whether enough was seen for a forecast."""
        return self._tokens >= KNOWN_TOKENS

    def learn(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step took so long; it computed spans of (first position, tokens)."""
        tokens = sum(count for _, count in spans)
        if tokens <= 0 or seconds <= 0:
            return
        expected = self.step_seconds(spans) if self.known else 0.0
        # Errors count by their share, and what is out of all proportion (the machine was busy elsewhere) counts less.
        self._fit.add(_parts(spans), seconds, 1.0 / (max(seconds, expected) ** 2 * _surprise(seconds, expected)))
        self._tokens += tokens

    def step_seconds(self, spans: Sequence[tuple[int, int]]) -> float:
        """Time of one step that computes spans of (first position, tokens)."""
        return self._fit(_parts(spans))

    def seconds(self, starts: NDArray[np.int64], end: int) -> Floats:
        """Time to compute a prompt up to `end`, from each of some positions on."""
        tokens = end - starts
        step_s, token_s, pair_s = self._fit.coefficients
        return step_s * -(-tokens // self._chunk) + token_s * tokens + pair_s * tokens * (starts + tokens / 2)


def _parts(spans: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Steps, tokens, and pairs of a token and one before it, of a step."""
    return 1.0, sum(count for _, count in spans), sum(count * (start + count / 2) for start, count in spans)


def _surprise(seconds: float, expected: float) -> float:
    """How many times longer something took than it should have, 1 if it did not."""
    return max(seconds / expected, 1.0) if expected > 0 else 1.0


class Blending:
    """What blending costs beside the computing of its tokens: so much a prompt (launches, choosing) and so much a token
    (loading, reading the question).
    """

    def __init__(self) -> None:
        # What all prompts of one size cost is blamed on each prompt, so that larger ones are tried.
        self._fit = MovingFit(2, main=0, decay=0.6)
        self._seen = 0

    @property
    def known(self) -> bool:
        """Whether enough was seen for a forecast."""
        return self._fit.count > 0

    def seconds(self, blend: Blend, computing_s: float) -> float:
        """Time to blend, of which so much is computing."""
        return computing_s + self._fit((1.0, blend.end - blend.exact))

    def learn(self, blend: Blend, computing_s: float, seconds: float) -> None:
        """It took so long."""
        self._seen += 1
        if self._seen == 1:  # in which kernels are compiled and memory is touched for the first time
            return
        # Nothing is quick by accident: what was quicker than expected counts for more than what was slower.
        expected = self.seconds(blend, computing_s) if self.known else 0.0
        weight = 1.0 / (max(seconds, 1e-6) ** 2 * _surprise(seconds, expected))
        self._fit.add((1.0, blend.end - blend.exact), max(seconds - computing_s, 0.0), weight)


class Loads:
    """What loads cost, from the engine's word to the last block in its cache.

    The part that is always there (the engine's rounds, copying out of the daemon's memory) is learned from loads that
    need nothing else. What lower tiers add the daemon forecasts; by how much that is off is learned for each tier.
    """

    def __init__(self) -> None:
        self._copy = MovingFit(2, main=1, decay=0.9)
        self._factor: dict[TierCode, float] = {}

    def seconds(self, tiers: Sequence[TierCode], speeds: Speeds, block_bytes: int, ahead_s: float = 0.0) -> Floats:
        """Time to load the first 0, 1, 2, ... blocks, given where each is, and how long this load must wait its turn.

        A tier whose speed is not known adds nothing.
        """
        fixed_s, block_s = self._copy.coefficients
        each = np.full(len(tiers), block_s)
        below = np.asarray(tiers, dtype=np.int64)
        for tier, (wait_s, tier_block_s, byte_s) in speeds.items():
            places = np.flatnonzero(below == tier)
            if len(places):
                factor = self._factor.get(tier, 1.0)
                each[places] += factor * (tier_block_s + byte_s * block_bytes)
                # What this connector has under way itself is both: ahead of it here and in the daemon's queue.
                each[places[0]] += max(factor * wait_s - ahead_s, 0.0)
        out = np.zeros(len(tiers) + 1)
        out[1:] = ahead_s + fixed_s + np.cumsum(each)
        return out

    def learn(self, tiers: Sequence[TierCode], forecast_s: float, seconds: float, *, at_least: bool = False) -> None:
        """A load of these blocks has ended; `forecast_s` was what `seconds` had said, `ahead_s` left out.

        With `at_least` it was given up: it would have taken longer, so nothing gets faster by it.
        """
        if not tiers:
            return
        lower = [tier for tier in tiers if tier != TierCode.HOST]
        if not lower:
            x = (1.0, len(tiers))
            if not at_least or seconds > self._copy(x):
                self._copy.add(x, seconds)
            return
        fixed_s, block_s = self._copy.coefficients
        memory_s = fixed_s + block_s * len(tiers)
        if forecast_s - memory_s > 0:
            tier = max(set(lower), key=lower.count)
            off = max((seconds - memory_s) / (forecast_s - memory_s), 1.0 if at_least else 0.0)
            before = self._factor.get(tier, 1.0)
            self._factor[tier] = min(max(before * (0.7 + 0.3 * off), 0.5), 4.0)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done with a prompt's matched blocks.

    Attributes
    ----------
    blocks : int
        The first so many are loaded.
    matched : int
        Of so many.
    load_s, total_s : float or None
        Forecast of the load, and of the first token. None where it was not known.
    other_s : float or None
        Forecast of the best way that was not taken: computing all if some is loaded, else the best load.
    deadline_s : float
        When a load that is made to find out what loads cost gives up what has not come; 0 for others.
    saves_s : tuple of float
        Of each block that is loaded, what computing it and those behind it that are loaded takes: the load goes on as
        long as it promises to be sooner. Empty where that is not known, or does not matter.
    """

    blocks: int
    matched: int
    load_s: float | None = None
    total_s: float | None = None
    other_s: float | None = None
    deadline_s: float = 0.0
    saves_s: tuple[float, ...] = ()


def choose(load_s: Floats, compute_s: Floats | None, *, measured: bool) -> Choice:
    """Split a prompt's matched blocks.

    Parameters
    ----------
    load_s : array
        Seconds to load the first 0, 1, ..., n blocks.
    compute_s : array or None
        Seconds to compute what is left after those; None while that is not known.
    measured : bool
        Whether the speed of every tier that holds some of them is known.
    """
    matched = len(load_s) - 1
    if compute_s is None:
        blocks = matched - matched // 4 if load_s[-1] > SLOW_S else matched
        return Choice(blocks, matched, load_s=float(load_s[blocks]) if measured else None)
    total = load_s + compute_s
    if not measured:
        return Choice(matched, matched, other_s=float(total[0]), saves_s=_saves(compute_s, matched))
    blocks = int(np.flatnonzero(total <= total.min() * (1 + SAME))[-1])
    if blocks and total[blocks] > total[0] * (1 - MARGIN):
        blocks = 0
    if not blocks:
        other = float(total[1:].min()) if matched else None
        return Choice(0, matched, 0.0, float(total[0]), other)
    saves = _saves(compute_s, blocks)
    return Choice(blocks, matched, float(load_s[blocks]), float(total[blocks]), float(total[0]), saves_s=saves)


def find_out(compute_s: Floats, blocks: int) -> Choice:
    """Load the first so many blocks though that seems not worth it, to see whether it still is so."""
    deadline = SLACK_S + PATIENCE * float(compute_s[0] - compute_s[blocks])
    total = deadline + float(compute_s[blocks])
    saves = _saves(compute_s, blocks)
    return Choice(blocks, len(compute_s) - 1, deadline, total, float(compute_s[0]), deadline, saves)


def _saves(compute_s: Floats, blocks: int) -> tuple[float, ...]:
    return tuple((compute_s[:blocks] - compute_s[blocks]).tolist())
