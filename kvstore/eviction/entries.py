"""A block that is held by `kvstore.eviction.lhd`, and the classes that blocks fall into."""

from __future__ import annotations

from typing import Generic

from kvstore.eviction.base import Item
from kvstore.eviction.explorers import NEVER

_LEVELS = 8
_LEVEL = tuple(0 if n < 1 else n - 1 if n < 4 else min(_LEVELS - 1, n.bit_length()) for n in range(1 << _LEVELS))
"""Level of a number of uses: each of the first three, then powers of two."""
CLASSES = 3 * _LEVELS
BELOW = 3
"""The class below a class, which saw fewer uses, is that of so much lower a number."""
END = tuple(3 * level + 2 for level in _LEVEL)
INNER = tuple(3 * level for level in _LEVEL)
"""Class of a block by its number of uses: at the end of a prompt, and within one."""
BEHIND = 1
"""Class of a block within a prompt that was used once, behind text that had been used before."""
MOST = len(_LEVEL) - 1
"""More uses than this are as many."""


class Entry(Generic[Item]):
    """A block that is held.

    Attributes
    ----------
    time, stamp, count : int
        When it was last used, which also orders the blocks of one use (`stamp`), and how often.
    parent : Item or None
        The block before it, held or not.
    behind : bool
        Whether it was computed behind text that had been used before.
    children : int
        Held blocks behind it, and one more while it must stay.
    parted : bool
        Whether there ever was one behind it.
    group : int
        Its class.
    ticket : int
        Of its place in the queue of that class; 0 if it has none, since it has children.
    stays : bool
        Whether it must stay (`EvictionPolicy.hold`).
    level : int
        While it is new, its level as an explorer.
    stem : Entry or None
        While it is new, the block that the first new one of its prompt stands behind.
    """

    __slots__ = (
        "behind",
        "children",
        "count",
        "group",
        "level",
        "parent",
        "parted",
        "stamp",
        "stays",
        "stem",
        "ticket",
        "time",
    )

    def __init__(self, time: int, stamp: int, count: int, parent: Item | None, behind: bool, children: int) -> None:
        self.time = time
        self.stamp = stamp
        self.count = count
        self.parent = parent
        self.behind = behind
        self.children = children
        self.parted = children > 0
        self.group = self.classify() if children or count > 1 else END[1]
        self.ticket = 0
        self.stays = False
        self.level = NEVER
        self.stem: Entry[Item] | None = None

    def classify(self) -> int:
        """Its class: the number of uses by powers of two, and what kind of place it has in prompts."""
        count = self.count
        if count > MOST:
            count = MOST
        if not self.parted:
            return END[count]
        return BEHIND if count == 1 and self.behind else INNER[count]
