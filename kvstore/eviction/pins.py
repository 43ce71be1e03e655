"""Pins of one tier: which blocks may not be evicted until when, and how many bytes they keep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from kvstore.eviction.partitions import Partitions
from kvstore.types import BlockId

LOOK_EVERY_S = 1.0
"""Where pins end one after the other, those that have ended are looked for so often."""


class Pins:
    """Pins, with a bound on the bytes that they keep.

    Parameters
    ----------
    order : Partitions
        Where pinned blocks are held.
    most : callable
        Bytes that pins may keep.

    Attributes
    ----------
    nbytes, refused : int
        Bytes kept; pins that had no room.
    """

    def __init__(self, order: Partitions, most: Callable[[], int]) -> None:
        self._order = order
        self._most = most
        self._pins: dict[BlockId, tuple[float, int]] = {}
        self._first_end = math.inf
        """No pin ends before this, as far as was looked."""
        self.nbytes = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, block: BlockId, nbytes: int, until: float) -> bool:
        """Pin a block of so many bytes until a monotonic time, or end its pin if that has passed.

        False if so many bytes are pinned already that the tier could no longer do its work.
        """
        if until <= time.monotonic():
            self.end(block)
            return True
        if block not in self._pins:
            if self.nbytes + nbytes > self._most():
                self.end_old()
            if self.nbytes + nbytes > self._most():
                self.refused += 1
                return False
            self.nbytes += nbytes
            self._order.hold(block)
        self._pins[block] = until, nbytes
        self._first_end = min(self._first_end, until)
        return True

    def end(self, block: BlockId) -> None:
        """End the pin of a block that is in the order, if it has one."""
        pin = self._pins.pop(block, None)
        if pin is not None:
            self.nbytes -= pin[1]
            self._order.release(block)

    def resize(self, block: BlockId, nbytes: int) -> None:
        """Note that a block is of another size now."""
        pin = self._pins.get(block)
        if pin is not None:
            self.nbytes += nbytes - pin[1]
            self._pins[block] = pin[0], nbytes

    def until(self, block: BlockId) -> float:
        """When the pin of a block ends, or ended; 0 without one."""
        pin = self._pins.get(block)
        return 0.0 if pin is None else pin[0]

    def end_due(self) -> None:
        """End the pins whose time is over, as far as they are looked for now. Called before something is evicted."""
        if self._pins and time.monotonic() >= self._first_end:
            self.end_old()

    def end_old(self) -> None:
        """End the pins whose time is over."""
        now = time.monotonic()
        for block in [block for block, (until, _) in self._pins.items() if until <= now]:
            self.end(block)
        first = min((until for until, _ in self._pins.values()), default=math.inf)
        self._first_end = max(first, now + LOOK_EVERY_S)

    def check(self) -> str:
        """What does not add up; empty if everything does."""
        kept = sum(nbytes for _, nbytes in self._pins.values())
        return "" if kept == self.nbytes else f"pins count {self.nbytes} bytes, they keep {kept}"
