"""Multi-queue: one LRU queue for each power of two of uses; who is not used for a lifetime comes down one queue.

After Y. Zhou, J. Philbin, K. Li, "The Multi-Queue Replacement Algorithm for Second Level Buffer Caches" (USENIX ATC
2001). A second-level cache sees what the first one missed, which is what a tier below an engine's own cache is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item

_QUEUES = 8
_LIFETIMES = 1.0
"""Uses after which an unused block comes down a queue, as a multiple of the blocks held."""
_GHOSTS = 4
"""Blocks that left whose number of uses is remembered, for each block held."""


class _Seen:
    """Uses of a block, the queue it is in, and when it comes down from there."""

    __slots__ = ("expires", "queue", "uses")

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self.queue = 0
        self.expires = 0


class MQ(EvictionPolicy[Item]):
    """Evict from the lowest queue that has blocks, the longest unused first."""

    name = "mq"

    def __init__(self) -> None:
        self._seen: dict[Item, _Seen] = {}
        self._queues: list[OrderedDict[Item, None]] = [OrderedDict() for _ in range(_QUEUES)]
        self._ghosts: OrderedDict[Item, int] = OrderedDict()
        self._clock = 0

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._clock += 1
        seen = self._seen[item] = _Seen(self._ghosts.pop(item, 0) + 1)
        self._place(item, seen)
        self._demote()

    def touch(self, items: list[Item]) -> None:
        self._clock += len(items)
        for item in reversed(items):
            seen = self._seen[item]
            del self._queues[seen.queue][item]
            seen.uses += 1
            self._place(item, seen)
        self._demote()

    def _place(self, item: Item, seen: _Seen) -> None:
        seen.queue = min(_QUEUES - 1, seen.uses.bit_length() - 1)
        seen.expires = self._clock + int(_LIFETIMES * len(self._seen))
        self._queues[seen.queue][item] = None

    def _demote(self) -> None:
        """Bring down the oldest of each queue if its time is over; one at a time keeps every call short."""
        for number in range(1, _QUEUES):
            queue = self._queues[number]
            if queue and (seen := self._seen[item := next(iter(queue))]).expires < self._clock:
                del queue[item]
                seen.queue = number - 1
                seen.expires = self._clock + int(_LIFETIMES * len(self._seen))
                self._queues[number - 1][item] = None

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        seen = self._seen.pop(item)
        del self._queues[seen.queue][item]
        if evicted:
            self._ghosts[item] = seen.uses
            while len(self._ghosts) > _GHOSTS * max(1, len(self._seen)):
                self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[Item]:
        for queue in self._queues:
            yield from queue

    def __len__(self) -> int:
        return len(self._seen)
