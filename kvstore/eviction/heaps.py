"""Places in a queue: a heap read in order without changing it, and what does not count any more."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol

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


class Placed(Protocol):
    """Who has a place: the number of that place, which those of before do not have."""

    ticket: int


def counting(places: list[Place[Item]], held: Mapping[Item, Placed]) -> list[Place[Item]]:
    """The places that still count."""
    return [p for p in places if (seen := held.get(p[2])) is not None and seen.ticket == p[1]]


def drop_first(heap: list[Place[Item]], held: Mapping[Item, Placed]) -> bool:
    """Take away places at the front of a heap that do not count any more; whether one is left that does."""
    while heap and ((entry := held.get(heap[0][2])) is None or entry.ticket != heap[0][1]):
        heapq.heappop(heap)
    return bool(heap)


def drop_last(places: list[Place[Item]], held: Mapping[Item, Placed]) -> None:
    """Take away places at the end that do not count any more. There is one that counts."""
    while (entry := held.get(places[-1][2])) is None or entry.ticket != places[-1][1]:
        places.pop()
