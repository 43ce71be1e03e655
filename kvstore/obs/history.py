"""The last minutes: counters sampled once a second, so that a page that was just opened can already show a curve.

Kept are the counters as they were, not differences of them: a late sample then stretches its interval and loses
nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.obs import Snapshot, count, number, numbers, part

SECONDS = 900
"""Length of the history at one sample a second."""
MAX_SERIES = 64


def series(snapshot: Snapshot) -> dict[str, float]:
    """The counters of a snapshot that are worth a curve, under flat names such as ``hit.disk``."""
    found = {"asked": count(snapshot, "asked_blocks"), "tokens": count(snapshot, "hit_tokens")}
    for tier, value in numbers(snapshot, "hit_blocks").items():
        found[f"hit.{tier}"] = value
    for tier, state in part(snapshot, "tiers").items():
        found[f"read.{tier}"] = count(state, "bytes_read")
        found[f"written.{tier}"] = count(state, "bytes_written")
    wanted = number(snapshot, "reuse", "wanted")
    found["wanted"] = found["asked"] if wanted is None else wanted
    found["reusable"] = count(snapshot, "reuse", "reusable")
    found["requests"] = sum(count(state, "count") for state in part(snapshot, "requests").values())
    return found


@dataclass(frozen=True, slots=True)
class Span:
    """What was counted between two samples.

    Attributes
    ----------
    start, seconds : float
        Monotonic time of the first sample, and how long the span was.
    grown : dict
        Growth of each counter.
    """

    start: float
    seconds: float
    grown: Mapping[str, float]

    def total(self, prefix: str) -> float:
        """Growth of the counters whose name starts with `prefix`."""
        return sum(value for name, value in self.grown.items() if name.startswith(prefix))

    def rate(self, name: str) -> float:
        """Growth a second; 0 in an empty span."""
        return self.grown.get(name, 0.0) / self.seconds if self.seconds > 0 else 0.0


class History:
    """Ring of samples.

    Parameters
    ----------
    length : int
        Samples kept.
    """

    def __init__(self, length: int = SECONDS + 1) -> None:
        self._length = length
        self._at = array("d")
        self._values: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._at)

    def add(self, at: float, values: Mapping[str, float]) -> None:
        """Note the counters at monotonic time `at`. A name that is new counts as 0 before."""
        if self._at and at <= self._at[-1]:
            return
        for name in values:
            if name not in self._values and len(self._values) < MAX_SERIES:
                self._values[name] = array("d", bytes(8 * len(self._at)))
        self._at.append(at)
        for name, ring in self._values.items():
            ring.append(values.get(name, ring[-1] if ring else 0.0))
        if len(self._at) > self._length:
            del self._at[0]
            for ring in self._values.values():
                del ring[0]

    def last(self, seconds: float) -> Span:
        """The newest `seconds`, or what there is of them."""
        if not self._at:
            return Span(0.0, 0.0, {})
        return self._between(self._at[-1] - seconds, self._at[-1])

    def buckets(self, width: float, number: int) -> list[Span | None]:
        """The newest `number` spans of `width` seconds, oldest first; None where nothing was sampled.

        Spans begin at multiples of `width`, so that a bar keeps its height while it moves. The last may be short.
        """
        if not self._at:
            return [None] * number
        first = self._at[-1] // width * width - (number - 1) * width
        spans = [self._between(first + i * width, first + (i + 1) * width) for i in range(number)]
        return [span if span.seconds > 0 else None for span in spans]

    def _between(self, start: float, end: float) -> Span:
        i = max(0, bisect_right(self._at, start) - 1)
        j = max(i, bisect_right(self._at, end) - 1)
        grown = {name: max(0.0, ring[j] - ring[i]) for name, ring in self._values.items()}
        return Span(self._at[i], self._at[j] - self._at[i], grown)
