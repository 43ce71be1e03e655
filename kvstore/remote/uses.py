"""Uses and pins of blocks, noted at once and told to Redis a moment later, many in one go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from kvstore.remote import index as ix
from kvstore.remote.follower import Follower
from kvstore.remote.values import Values
from kvstore.types import BlockId

TOUCH_SHARE = 8
"""The expiry of a block's values is put off at most so many times in one life of them."""
_BATCH = 256


class Uses:
    """What is to be told.

    Parameters
    ----------
    index : Follower
    values : Values
    ttl_s : int
        How long a block stays after its last use.
    """

    def __init__(self, index: Follower, values: Values, ttl_s: int) -> None:
        self._index = index
        self._values = values
        self._ttl_s = ttl_s
        self._pins: dict[BlockId, float] = {}
        self._later: dict[bytes, tuple[float, bool]] = {}
        self._renewed: set[bytes] = set()
        self._renewed_since = time.monotonic()
        self._telling = asyncio.Lock()

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        for depth, block in enumerate(blocks):
            if self._index.mirror.find(block) is not None and self._pins.get(block, 0.0) <= time.monotonic():
                self._later[self._index.member(block)] = (-1e-6 * depth, False)

    def pin(self, block: BlockId, until: float) -> None:
        """Keep a block from eviction until a monotonic time."""
        left = max(0.0, until - time.monotonic())
        self._later[self._index.member(block)] = (left, True)
        if left:
            self._pins[block] = until
        else:
            self._pins.pop(block, None)

    def forget(self, block: BlockId) -> None:
        """A block is gone."""
        self._pins.pop(block, None)

    async def flush(self) -> None:
        """Tell Redis. When this returns, what others were telling has arrived, too: what leaves may be chosen next."""
        async with self._telling:
            while self._later:
                some = [(member, *self._later.pop(member)) for member in list(self._later)[:_BATCH]]
                args = [arg for member, delta, back in some for arg in (member, f"{delta:.6f}", "1" if back else "0")]
                await self._index.script(ix.TOUCH, *args)
                pins = {member: delta for member, delta, back in some if back}
                await self._renew([(member, int(pins.get(member, 0.0))) for member, _, _ in some])

    async def oldest(self, most: int) -> list[BlockId]:
        """Blocks unused for longest, as far as they are known here; none that is pinned or being written."""
        await self.flush()
        found = [self._index.block(member) for member in await self._index.script(ix.OLDEST, most)]
        return [block for block in found if block is not None and self._index.mirror.find(block) is not None]

    async def _renew(self, members: list[tuple[bytes, int]]) -> None:
        """Put off the expiry of blocks' values, now and then for those in use, at once for those pinned for long."""
        now = time.monotonic()
        if now - self._renewed_since > self._ttl_s / TOUCH_SHARE:
            self._renewed.clear()
            self._renewed_since = now
        lives: list[tuple[str, int]] = []
        for member, pinned_s in members:
            block = self._index.block(member)
            place = None if block is None else self._index.mirror.find(block)
            if place is None or (member in self._renewed and pinned_s <= self._ttl_s):
                continue
            self._renewed.add(member)
            lives += [(name, max(self._ttl_s, pinned_s + 1)) for name in self._values.names(member, place)]
        await self._values.expire(lives)
