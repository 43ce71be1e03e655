"""Greedy dual size frequency: keep what costs most to compute again for the bytes it takes, times its uses.

After L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs 1998).
The cost is the prefill work of the block at its depth (`kvstore.eviction.cost`): a block deep in a prompt attends to
all before it, so it is worth more than one at the head.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item
from kvstore.eviction.heaps import InOrder, Place


class _Worth:
    """What a block is worth: cost by bytes, uses, and the ticket of its place in the heap."""

    __slots__ = ("per_byte", "ticket", "uses")

    def __init__(self, per_byte: float) -> None:
        self.per_byte = per_byte
        self.uses = 1
        self.ticket = 0


class GDSF(EvictionPolicy[Item]):
    """Evict the least worth. Worth starts from that of the last block evicted, so that what is not used ages."""

    name = "gdsf"

    def __init__(self) -> None:
        self._worth: dict[Item, _Worth] = {}
        self._heap: list[Place[Item]] = []
        self._floor = 0.0
        self._tickets = 0

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        worth = self._worth[item] = _Worth(cost / max(1, nbytes))
        self._place(item, worth)

    def touch(self, items: list[Item]) -> None:
        for item in reversed(items):
            worth = self._worth[item]
            worth.uses += 1
            self._place(item, worth)

    def _place(self, item: Item, worth: _Worth) -> None:
        self._tickets += 1
        worth.ticket = self._tickets
        heapq.heappush(self._heap, (self._floor + worth.per_byte * worth.uses, worth.ticket, item))
        if len(self._heap) > 2 * len(self._worth) + 64:
            self._heap[:] = filter(self._valid, self._heap)
            heapq.heapify(self._heap)

    def _valid(self, place: Place[Item]) -> bool:
        worth = self._worth.get(place[2])
        return worth is not None and worth.ticket == place[1]

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        heap = self._heap
        if evicted and heap[0][2] == item and self._valid(heap[0]):
            self._floor = heap[0][0]
        del self._worth[item]
        while heap and not self._valid(heap[0]):
            heapq.heappop(heap)

    def victims(self) -> Iterator[Item]:
        for place in InOrder(self._heap):
            if self._valid(place):
                yield place[2]

    def __len__(self) -> int:
        return len(self._worth)
