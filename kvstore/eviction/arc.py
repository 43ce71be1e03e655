"""Adaptive replacement: a list of blocks used once and one of those used again, and a border that learns.

After N. Megiddo, D. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003). The tier decides when it
is full, so the capacity is what is held when a block is evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item


class ARC(EvictionPolicy[Item]):
    """Two LRU lists and the ghosts of both. A use of a ghost moves the border toward the list it had left."""

    name = "arc"

    def __init__(self) -> None:
        self._once: OrderedDict[Item, None] = OrderedDict()
        self._again: OrderedDict[Item, None] = OrderedDict()
        self._once_ghosts: OrderedDict[Item, None] = OrderedDict()
        self._again_ghosts: OrderedDict[Item, None] = OrderedDict()
        self._border = 0.0
        """How many blocks the first list should have."""

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        if item in self._once_ghosts:
            self._border = min(len(self), self._border + max(1.0, self._ratio(self._again_ghosts, self._once_ghosts)))
            del self._once_ghosts[item]
            self._again[item] = None
        elif item in self._again_ghosts:
            self._border = max(0.0, self._border - max(1.0, self._ratio(self._once_ghosts, self._again_ghosts)))
            del self._again_ghosts[item]
            self._again[item] = None
        else:
            self._once[item] = None

    @staticmethod
    def _ratio(one: OrderedDict[Item, None], other: OrderedDict[Item, None]) -> float:
        return len(one) / max(1, len(other))

    def touch(self, items: list[Item]) -> None:
        for item in reversed(items):
            if item in self._once:
                del self._once[item]
                self._again[item] = None
            else:
                self._again.move_to_end(item)

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        capacity = len(self)
        here, ghosts = (self._once, self._once_ghosts) if item in self._once else (self._again, self._again_ghosts)
        del here[item]
        if not evicted:
            return
        ghosts[item] = None
        while len(self._once) + len(self._once_ghosts) > capacity and self._once_ghosts:
            self._once_ghosts.popitem(last=False)
        while len(self._once_ghosts) + len(self._again_ghosts) > capacity and self._again_ghosts:
            self._again_ghosts.popitem(last=False)

    def victims(self) -> Iterator[Item]:
        once, again = iter(self._once), iter(self._again)
        left, rest = len(self._once), len(self._again)
        while left or rest:
            if left and (left > self._border or not rest):
                left -= 1
                yield next(once)
            else:
                rest -= 1
                yield next(again)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)
