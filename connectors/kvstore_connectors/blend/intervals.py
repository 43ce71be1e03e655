"""95 % intervals: Wilson's for shares of trials, the percentile bootstrap for means of anything else."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

TIMES = 1000
"""Resamplings of a bootstrap."""


def wilson(hits: float, trials: int) -> tuple[float, float]:
    """Interval of a share (Wilson 1927).

    Parameters
    ----------
    hits : float
        Successes among the trials.
    trials : int
        At least 1.
    """
    share, z = hits / trials, 1.96
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (middle - half) / (1 + z * z / trials), (middle + half) / (1 + z * z / trials)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Interval of a mean (Efron 1979); the same values always give the same interval."""
    chance = random.Random(0)
    means = sorted(sum(chance.choices(values, k=len(values))) / len(values) for _ in range(TIMES))
    return means[int(0.025 * TIMES)], means[int(0.975 * TIMES) - 1]
