"""Blocks read from disk into the caller's buffers, every byte verified; what was found damaged or gone is seen to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from kvstore.disk.blocks import ForeignFile
from kvstore.disk.format import Shape
from kvstore.disk.store import Store
from kvstore.errors import CorruptBlock
from kvstore.types import BlockHeader, BlockId, Hit, LoadOutcome, Miss, MissReason

TOUCH_EVERY_S = 60.0
"""How often a use of one block is noted in its file's times."""


class Counted(Protocol):
    """What is counted: seconds that uses took to be read, and blocks that were found damaged."""

    read_s: float
    corrupt: int


class Reader:
    """What is read of a store. Its coroutines are to run to their end, whoever asked: see `Threads.to_the_end`."""

    def __init__(self, store: Store, counters: Counted) -> None:
        self._store = store
        self._index = store.index
        self._counters = counters
        self._touched: set[BlockId] = set()
        self._touched_since = 0.0

    def living(self, block: BlockId) -> Shape | None:
        """Shape of a block that is here, and not too old. No I/O."""
        shape, order = self._index.find(block), self._index.order
        return shape if shape is None or not order.expiring or order.alive(block) else None

    async def read(self, block: BlockId, into: Sequence[memoryview], used: bool) -> LoadOutcome:
        """Read a block; whether that is a use of it the caller says."""
        store = self._store
        if not store.ready:
            return Miss(MissReason.TIER_DOWN)
        shape = self.living(block)
        if shape is None:
            return Miss(MissReason.ABSENT)
        if sum(view.nbytes for view in into) != shape.nbytes:
            return Miss(MissReason.LOST)  # it was replaced after the caller had asked for its size
        began = time.perf_counter()
        reading = self._index.begin_read(block)
        try:
            with store.blocks.under_way.reading(shape.nbytes):
                touch = used and self._wants_touch(block)
                header = await store.threads.read(store.blocks.read, block, shape, into, touch)
        except CorruptBlock:
            reason = MissReason.CORRUPT
        except (FileNotFoundError, ForeignFile):
            reason = MissReason.LOST
        except OSError:
            return Miss(MissReason.TIER_DOWN)
        else:
            if used:
                self._counters.read_s += time.perf_counter() - began
                self._index.touch([block])
            return Hit(header, shape.nbytes)
        finally:
            self._index.end_read(block, reading)
        if reading.gone:  # dropped while it was read, or found bad by another reader first
            return Miss(MissReason.LOST)
        if reason == MissReason.CORRUPT:
            self._counters.corrupt += 1
            await store.set_aside(block, shape)
        else:
            await store.forget_lost(block, shape)
        return Miss(reason)

    async def header(self, block: BlockId) -> BlockHeader | None:
        """The header of a block that is here and undamaged."""
        shape = self.living(block) if self._store.ready else None
        if shape is None:
            return None
        reading = self._index.begin_read(block)
        try:
            return await self._store.threads.read(self._store.blocks.header, block, shape)
        except (CorruptBlock, ForeignFile, OSError):  # whoever reads all of it will see to that
            return None
        finally:
            self._index.end_read(block, reading)

    def _wants_touch(self, block: BlockId) -> bool:
        """Whether the use should be noted in the file's times."""
        now = time.monotonic()
        if now - self._touched_since > TOUCH_EVERY_S:
            self._touched.clear()
            self._touched_since = now
        fresh = block not in self._touched
        self._touched.add(block)
        return fresh
