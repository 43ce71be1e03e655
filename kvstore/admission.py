"""Admission: a tier may ask for a second sighting of a block before it is written there.

Most blocks are never asked for again; a disk or a shared server need not take them all. After the doorkeeper of
G. Einziger, R. Friedman, B. Manes, "TinyLFU" (ACM TOS 2017): one look at what came by lately, nothing about how often.
A block is seen a second time when it is used in memory, or when it is stored anew after it had left.
"""

from __future__ import annotations

from kvstore.types import BlockId

MOST = 1 << 16
"""Blocks remembered that were seen once, at about 200 bytes each; beyond that the oldest are forgotten."""


class Doorkeeper:
    """Remembers blocks that were seen once. A block is let through at its second sighting, and then forgotten.

    Parameters
    ----------
    most : int
        Blocks remembered at most.

    Attributes
    ----------
    kept_out : int
        Blocks that were not let through when they came first.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._once: dict[BlockId, None] = {}
        self.kept_out = 0

    def __len__(self) -> int:
        return len(self._once)

    def first_time(self, block: BlockId) -> bool:
        """Note that a block is offered; whether it is to be kept out, since it was not seen before."""
        if self.again(block):
            return False
        if len(self._once) >= self._most:
            del self._once[next(iter(self._once))]
        self._once[block] = None
        self.kept_out += 1
        return True

    def again(self, block: BlockId) -> bool:
        """Note a use; whether the block had been kept out and is let through now."""
        return self._once.pop(block, block) is None

    def forget(self, block: BlockId) -> None:
        """A block was dropped: it has not been seen."""
        self._once.pop(block, None)
