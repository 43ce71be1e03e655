"""What is counted of the calls of all connections: how many, how long, which errors, and the slowest of late."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.errors import KVStoreError

BOUNDS_S = (
    10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3,
    10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
"""Upper bounds of the buckets of request times."""

SLOW_S = 0.05
"""A call that takes longer is remembered."""

WAITING = frozenset({"events"})
"""Verbs that wait for something to happen; their time says nothing."""


class Slow(NamedTuple):
    """A call that took long: when it ended (seconds since the epoch), and the code of its error if it failed."""

    at: float
    verb: str
    seconds: float
    error: str


@dataclass(slots=True)
class VerbStats:
    """Counts of one verb; `buckets` holds the calls between two bounds, the last those above all."""

    count: int = 0
    errors: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def below(self) -> list[tuple[float, int]]:
        """(bound, calls at or below it) for each bound."""
        total, found = 0, []
        for bound, count in zip(BOUNDS_S, self.buckets, strict=False):
            total += count
            found.append((bound, total))
        return found


@dataclass(slots=True)
class Traffic:
    """Counts of all connections of a server."""

    verbs: dict[str, VerbStats] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    refused_connections: int = 0
    slow: deque[Slow] = field(default_factory=lambda: deque(maxlen=32))
    recorder: Callable[[str, float, KVStoreError | None], None] | None = None
    """Told of each call, if there is one (`kvstore.obs.trace`)."""

    def calls(self) -> int:
        """How many calls there have been."""
        return sum(stats.count for stats in self.verbs.values())

    def record(self, method: str, started: float, failed: KVStoreError | None = None) -> None:
        """Count a finished call."""
        stats = self.verbs.get(method)
        if stats is None:
            stats = self.verbs[method] = VerbStats()
        seconds = time.perf_counter() - started
        stats.count += 1
        stats.seconds += seconds
        stats.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        if failed is not None:
            stats.errors += 1
            self.errors[failed.code] += 1
        if self.recorder is not None:
            self.recorder(method, seconds, failed)
        if seconds > SLOW_S and method not in WAITING:
            self.slow.append(Slow(time.time(), method, seconds, "" if failed is None else failed.code))
