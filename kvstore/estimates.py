"""How fast a lower tier brings blocks up, and how much waits in front: measured from its own reads, never configured.

Reads run side by side, so what counts is not how long one takes but how far apart they end while the tier is busy: that
is what one more block costs. Clients are told with every lookup that finds blocks below host memory, and weigh a load
against computing the same tokens again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvstore.fit import MovingFit

WINDOW_S = 0.02
"""Reads that end within this time of each other are measured together: side by side they end in bursts."""

DECAY = 0.8
"""Weight that a window keeps when the next one comes: the last ten or so make the estimate."""
JUST_NOW = 0.3
"""The same for the last two. Where those say that it is slower they are believed: who loads from a tier that has become
slow is late, who computes instead for a moment loses little.

That a tier is faster is believed at once of reads from when it was idle until it is idle again. One that is not worth
loading from is hardly read any more, and being wrong costs the first look of the next load (`Tier.pace`)."""


class Speed(NamedTuple):
    """What a load from a tier costs now: ``wait_s``, then for each block ``block_s`` and ``byte_s`` for each byte."""

    wait_s: float
    block_s: float
    byte_s: float


class TierEstimate:
    """Moving estimate of one tier.

    Parameters
    ----------
    pace : callable
        What the block under way takes, as far as the tier can tell; see `Tier.pace`.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self, pace: Callable[[], float | None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pace = pace
        self._clock = clock
        self._fit = MovingFit(2, main=1, decay=DECAY)
        self._just_now = MovingFit(2, main=1, decay=JUST_NOW)
        self._window = (0, 0)
        """Blocks and bytes of the last window."""
        self._ahead_blocks = 0
        self._ahead_bytes = 0
        self._reading = 0
        self._mark = self._last = self._first = self._began = 0.0
        """When the open window of reads began, when its last read ended, and its first; and when the tier was idle."""
        self._blocks = 0
        self._bytes = 0

    def queued(self, nbytes: int) -> None:
        """A block is wanted."""
        self._ahead_blocks += 1
        self._ahead_bytes += nbytes

    def left(self, nbytes: int) -> None:
        """A block that was wanted has come, or will not come."""
        self._ahead_blocks -= 1
        self._ahead_bytes -= nbytes

    def begun(self) -> None:
        """A read begins."""
        if self._reading == 0:
            self._mark = self._last = self._began = self._clock()
        self._reading += 1

    def ended(self, nbytes: int) -> None:
        """A read has ended with so many bytes; 0 for one that failed, which tells nothing of speed."""
        self._reading -= 1
        now = self._clock()
        if self._blocks and now - self._first >= WINDOW_S:
            self._learn()
        if nbytes:
            self._first = self._first if self._blocks else now
            self._last = now
            self._blocks += 1
            self._bytes += nbytes
        if not self._reading:
            self._learn()
        if not nbytes:
            self._mark = self._last = now

    def _learn(self) -> None:
        """Close the window: so many blocks in the time until the last of them ended."""
        if self._blocks:
            self._window = self._blocks, self._bytes
            seconds = self._last - self._mark
            alone = self._mark == self._began and not self._reading
            for fit in (self._fit, self._just_now):
                if alone and 0 < seconds < fit(self._window):
                    fit.scale(seconds / fit(self._window))
                fit.add(self._window, seconds, 1 / self._blocks)
        self._mark, self._blocks, self._bytes = self._last, 0, 0

    def speed(self) -> Speed | None:
        """What a load costs now; None before anything was read."""
        under_way_s = self._under_way_s()
        if not self._fit.count:
            return Speed(under_way_s * self._ahead_blocks, under_way_s, 0.0) if under_way_s else None
        slower = max(self._fit, self._just_now, key=lambda fit: fit(self._window))
        block_s, byte_s = slower.coefficients
        wait_s = block_s * self._ahead_blocks + byte_s * self._ahead_bytes
        late = max(under_way_s * self._ahead_blocks / wait_s, 1.0) if wait_s > 0 else 1.0
        return Speed(late * wait_s, late * block_s, late * byte_s)

    def _under_way_s(self) -> float:
        """What a block takes at least, going by the reads under way; 0 without any.

        So a tier that has become slow is known for that before the first slow read ends, and one that stands still gets
        slower by the second.
        """
        if not self._reading:
            return 0.0
        # Side by side they may come all at once.
        return max((self._clock() - self._last) / self._reading, self._pace() or 0.0)
