"""S3-FIFO: a small queue in front lets go early of what is used once.

After J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vinayak, "FIFO Queues Are All You Need for Cache Eviction" (SOSP 2023). A
block moves to the main queue with its first use after it was stored; one that comes back from the ghosts goes there at
once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.eviction.base import EvictionPolicy, Item

_SMALL = 0.1
_MOST_USES = 3


class S3FIFO(EvictionPolicy[Item]):
    """Evict from the small queue while it has more than its tenth, else from the main one, passing over used blocks."""

    name = "s3-fifo"

    def __init__(self) -> None:
        self._small: OrderedDict[Item, None] = OrderedDict()
        self._main: OrderedDict[Item, int] = OrderedDict()
        """Block to uses since it was last passed over."""
        self._ghosts: OrderedDict[Item, None] = OrderedDict()

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        if item in self._ghosts:
            del self._ghosts[item]
            self._main[item] = 0
        else:
            self._small[item] = None

    def touch(self, items: list[Item]) -> None:
        for item in reversed(items):
            if item in self._small:
                del self._small[item]
                self._main[item] = 0
            else:
                self._main[item] = min(_MOST_USES, self._main[item] + 1)

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        if item in self._small:
            del self._small[item]
            if evicted:
                self._ghosts[item] = None
                while len(self._ghosts) > max(1, len(self)):
                    self._ghosts.popitem(last=False)
            return
        if evicted:
            self._pass_over(item)
        del self._main[item]

    def _pass_over(self, victim: Item) -> None:
        """What stood before an evicted block has been used, and was given another round."""
        while (oldest := next(iter(self._main))) != victim and self._main[oldest]:
            self._main[oldest] -= 1
            self._main.move_to_end(oldest)

    def victims(self) -> Iterator[Item]:
        small, over = iter(self._small), len(self._small) - int(_SMALL * len(self))
        for _ in range(over):
            yield next(small)
        for round_ in range(_MOST_USES + 1):
            for item, uses in self._main.items():
                if uses == round_:
                    yield item
        yield from small

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
