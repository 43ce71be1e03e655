"""Whose turn it is: first come, first served, but what matters more overtakes what matters less, so far and no further.

A block of weight w goes ahead of one of weight v that came at most ``(w - v) * reach`` bytes before it. Unless somebody
waits for it to be written (`first`) it never goes ahead of its parent: without that it could not be found. Weights have
bounds (`kvstore.eviction.cost.weight`), so nobody waits for more than a fixed number of bytes of those who came later,
whoever they are.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from kvstore.types import BlockId

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue of blocks, each with something to be had when its turn comes.

    Parameters
    ----------
    reach : int
        Bytes that a block overtakes for each whole unit of weight that it has more than others.
    """

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._came = self._number = 0
        self._heap: list[tuple[bool, float, int, BlockId, T]] = []
        self._places: dict[BlockId, tuple[int, float]] = {}

    def add(
        self, block: BlockId, parent: BlockId | None, nbytes: int, weight: float, item: T, *, first: bool = False
    ) -> None:
        """Queue a block; what is to be `first` goes before everything that is not, its parent, too."""
        _, before = self._places.get(parent, (0, -float("inf"))) if parent is not None else (0, -float("inf"))
        place = max(self._came - self._reach * weight, before)
        self._number += 1
        self._came += nbytes
        self._places[block] = self._number, place
        heapq.heappush(self._heap, (not first, place, self._number, block, item))

    def take(self) -> T:
        """What was queued with the block whose turn it is. Raises `IndexError` if there is none."""
        _, _, number, block, item = heapq.heappop(self._heap)
        if self._places.get(block, (0,))[0] == number:  # else it was queued again meanwhile
            del self._places[block]
        return item

    def __len__(self) -> int:
        return len(self._heap)
