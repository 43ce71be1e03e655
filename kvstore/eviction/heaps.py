"""Reading a heap in order without changing it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic

from kvstore.eviction.base import Item

Place = tuple[float, int, Item]
"""A place in a heap: what it is ordered by, a number that no other place has, and the block."""


class InOrder(Generic[Item]):
    """The places of a heap from the first on. Each next one costs the logarithm of how many were taken."""

    def __init__(self, heap: list[Place[Item]]) -> None:
        self._heap = heap
        self._open: list[tuple[Place[Item], int]] = [(heap[0], 0)] if heap else []

    def __iter__(self) -> Iterator[Place[Item]]:
        return self

    def __next__(self) -> Place[Item]:
        if not self._open:
            raise StopIteration
        heap = self._heap
        place, at = heapq.heappop(self._open)
        child = 2 * at + 1
        if child < len(heap):
            heapq.heappush(self._open, (heap[child], child))
            if child + 1 < len(heap):
                heapq.heappush(self._open, (heap[child + 1], child + 1))
        return place
