"""Least recently used, with the tail of a prompt before its head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item


class LRU(EvictionPolicy[Item]):
    """Evict what was used longest ago. A prompt's blocks are touched last to first, so its head outlives its tail."""

    name = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[Item, None] = OrderedDict()

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._order[item] = None

    def touch(self, items: list[Item]) -> None:
        move = self._order.move_to_end
        for item in reversed(items):
            move(item)

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        del self._order[item]

    def victims(self) -> Iterator[Item]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
