"""Blocks that somebody will soon want in memory, while nobody waits for them yet: a bounded queue, first come first."""

from __future__ import annotations

from kvstore.arena import PAGE_BYTES
from kvstore.types import BlockId, Scope


class PrefetchQueue:
    """What is to be brought up when nothing more urgent is.

    Parameters
    ----------
    capacity : int
        Bytes that may be queued. More than a part of memory would push out itself before it is used.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: dict[BlockId, int] = {}
        self.bytes = 0
        self.refused = 0

    def add(self, block: BlockId, nbytes: int) -> bool:
        """Queue a block; whether it is queued now."""
        if block in self._blocks:
            return True
        room = max(nbytes, PAGE_BYTES)  # many small blocks are bounded too
        if self.bytes + room > self._capacity:
            self.refused += 1
            return False
        self._blocks[block] = room
        self.bytes += room
        return True

    def take(self) -> BlockId | None:
        """The block that was asked for first, which is then no longer queued."""
        block = next(iter(self._blocks), None)
        if block is not None:
            self.discard(block)
        return block

    def discard(self, block: BlockId) -> bool:
        """Take a block out; whether it was queued."""
        room = self._blocks.pop(block, 0)
        self.bytes -= room
        return room > 0

    def discard_scope(self, scope: Scope) -> None:
        """Take out every block of a scope."""
        for block in [block for block in self._blocks if block.scope == scope]:
            self.discard(block)

    def __len__(self) -> int:
        return len(self._blocks)
