"""Prefix-closed: whatever a policy prefers, a block leaves only after every block that was computed behind it.

A block is found by the chain of those before it, so one whose parent is gone only takes room.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item


class PrefixClosed(EvictionPolicy[Item]):
    """A policy whose victims wait for their children. One that waited leaves right behind the last of them."""

    def __init__(self, inner: EvictionPolicy[Item]) -> None:
        self.name = inner.name
        self._inner = inner
        self._parents: dict[Item, Item] = {}
        """Held block to its parent, held or not."""
        self._children: dict[Item, int] = {}
        """Parent, held or not, to how many blocks behind it are held; no entry is none."""

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._inner.insert(item, nbytes, cost=cost, parent=parent)
        if parent is not None:
            self._parents[item] = parent
            self._children[parent] = self._children.get(parent, 0) + 1

    def touch(self, items: list[Item]) -> None:
        self._inner.touch(items)

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        self._inner.remove(item, evicted=evicted)
        parent = self._parents.pop(item, None)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]

    def victims(self) -> Iterator[Item]:
        left: dict[Item, int] = {}
        """Blocks behind this one that would still be there."""
        waiting: set[Item] = set()
        for item in self._inner.victims():
            if left.get(item, self._children.get(item, 0)):
                waiting.add(item)
                continue
            yield item
            while (parent := self._parents.get(item)) is not None:
                left[parent] = left.get(parent, self._children[parent]) - 1
                if left[parent] or parent not in waiting:
                    break
                waiting.discard(parent)
                yield parent
                item = parent
        yield from waiting  # blocks whose headers name each other, or themselves, as parents: no client needs those

    def __len__(self) -> int:
        return len(self._inner)
