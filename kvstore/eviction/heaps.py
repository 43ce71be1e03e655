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
        self._open: list[tuple[float, int, int]] = [(*heap[0][:2], 0)] if heap else []

    def __iter__(self) -> Iterator[Place[Item]]:
        return self

    def __next__(self) -> Place[Item]:
        if not self._open:
            raise StopIteration
        _, _, at = heapq.heappop(self._open)
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(self._heap):
                heapq.heappush(self._open, (*self._heap[child][:2], child))
        return self._heap[at]
