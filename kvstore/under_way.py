"""How much has come of the reads that a tier is at, and so how long a block of them takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 0.02
"""So long a host may stand still for other reasons, before that is taken for slowness of the tier."""


class UnderWay:
    """The reads that are under way in one tier.

    Parameters
    ----------
    grain : int
        Bytes of each read that may have come without being told, beside what was asked for.
    clock : callable
        Monotonic seconds.
    """

    def __init__(self, grain: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._grain = grain
        self._clock = clock
        self._lock = threading.Lock()
        self._reads = self._wanted = self._asked = self._came = 0
        """Reads under way, bytes of them, bytes that were asked for and have not come, and have come since `_since`."""
        self._since = 0.0
        """When the last read ended, or the first began."""

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """While a block of so many bytes is read."""
        if not self._reads:
            self._begin()
        self._reads += 1
        self._wanted += nbytes
        try:
            yield
        finally:
            self._reads -= 1
            self._wanted -= nbytes
            self._begin()

    def _begin(self) -> None:
        with self._lock:
            self._came, self._since = 0, self._clock()

    def came(self, nbytes: int) -> None:
        """Some bytes have come. For any thread."""
        with self._lock:
            self._came += nbytes

    @contextmanager
    def asking(self, nbytes: int) -> Iterator[None]:
        """While so many bytes are asked for, of which any may have come; then all have. For any thread."""
        with self._lock:
            self._asked += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._asked -= nbytes
                self._came += nbytes

    def pace(self) -> float | None:
        """Seconds that a block takes at least; None while none is read."""
        most = self._came + self._asked + self._grain * self._reads
        if not self._reads or not most:
            return None
        block, took_s = self._wanted / self._reads, self._clock() - self._since - GRACE_S
        return max(took_s, 0.0) * block / most
