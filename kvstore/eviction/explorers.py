"""Explorers: blocks that stay when others of their age leave, to find out whether anything is used again after long.

Where nothing of a class was ever used again, nothing says which of it should go. It leaves by age then, so that what is
new can show what it is worth; but what comes back later than it leaves would never be seen. So a sample stays. It is
drawn by hash and thins out as more comes, so that it is spread over all that came within the longest age that is told
apart (after the spatial sampling of C. Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015). New
blocks of one prompt are drawn together: a part of a prompt without what stands before it is never found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic

from kvstore.eviction.base import Item

SHARE = 0.25
"""Explorers among the new blocks that were drawn, at most: so much less room have those that follow, for a while."""
FEW = 64
"""So many of those blocks have no explorers among them: little is learnt from few, and a small tier keeps its order."""
_LEVELS = 32
_MIX = 0x9E3779B97F4A7C15
"""Spreads hashes that are numbers in a row (Fibonacci hashing)."""
NEVER = -1
"""Level of a block that cannot be an explorer."""


def level_of(item: Hashable) -> int:
    """A level by hash: half of all blocks are of level 0, a quarter of level 1, and so on."""
    mark = (hash(item) * _MIX >> 24) & ((1 << (_LEVELS - 1)) - 1) | 1 << (_LEVELS - 1)
    return (mark & -mark).bit_length() - 1


class Explorers(Generic[Item]):
    """From which level on a block is an explorer, and those explorers that have no block behind them."""

    def __init__(self) -> None:
        self.level = 0
        self.waiting: OrderedDict[Item, None] = OrderedDict()
        """Explorers that would have a place in the order, in turns of being looked at."""
        self._drawn = 0
        """Held blocks that were drawn, and not used again."""
        self._explored = 0
        self._counts = [0] * _LEVELS
        """Those by their level."""

    def add(self, level: int) -> None:
        """Count a new block that was drawn, and thin out if there are too many explorers."""
        self._drawn += 1
        self._counts[level] += 1
        if level >= self.level:
            self._explored += 1
            most = max(0.0, SHARE * (self._drawn - FEW))
            while self._explored > most:
                self._explored -= self._counts[self.level]
                self.level += 1

    def discard(self, level: int) -> None:
        """Count one less: it leaves, or is not new any more."""
        self._drawn -= 1
        self._counts[level] -= 1
        if level >= self.level:
            self._explored -= 1

    def widen(self) -> None:
        """Take more of what comes from now on, if few explorers are left."""
        while self.level and self._explored + self._counts[self.level - 1] < SHARE / 2 * (self._drawn - FEW):
            self.level -= 1
            self._explored += self._counts[self.level]
