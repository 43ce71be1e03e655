"""Tell the lower tiers of new blocks, later and in the background.

A block in this queue is still in host memory and still a hit; it is merely `dirty`, which keeps it from being
evicted. The queue needs no bound of its own: what it holds is memory of the host tier, which is bounded. When that
runs out of clean blocks a store waits for this queue if its caller allows, or is dropped, and says so. An engine
never waits.

What gets more attention is written before what gets less, within bounds (`kvstore.turns`). Nothing that was accepted is
given up for what comes later.

Loads go first: while blocks are being brought up, one writer at a time goes on, so that a load finds the medium nearly
to itself and the queue still gets shorter; for a moment afterwards two, since the next load would have to wait for all
writes that are under way then.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable

from kvstore.admission import Doorkeeper
from kvstore.eviction.cost import weight
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock
from kvstore.turns import Turns
from kvstore.types import BlockId, Dropped, DropReason, Exists, Stored, StoreOutcome

log = logging.getLogger("kvstore.writebehind")

LINGER_S = 0.25
"""How long after a load the next one is expected."""
REACH = 128 << 20
"""Bytes that a block with twice the attention of others overtakes: fractions of a second of a disk."""


class WriteBehind:
    """Queue of one lower tier.

    Parameters
    ----------
    host : HostTier
        Owner of the blocks' memory.
    tier : Tier
        Where they go.
    writers : int
        Blocks written at once.
    loading : callable
        Whether blocks are being brought up now.
    doorkeeper : Doorkeeper, optional
        Keeps out what was seen only once; without one every block is written.

    Attributes
    ----------
    blocks, bytes : int
        Waiting or being written.
    """

    def __init__(
        self,
        host: HostTier,
        tier: Tier,
        writers: int,
        loading: Callable[[], bool] = lambda: False,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        self.tier = tier
        self.doorkeeper = doorkeeper
        self._host = host
        self._queue: Turns[tuple[HostBlock, bool, asyncio.Future[StoreOutcome]]] = Turns(REACH)
        self._busy = 0
        self._writers = writers
        self._loading = loading
        self._loaded = -math.inf
        """When blocks were last seen being brought up."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self.blocks = 0
        self.bytes = 0

    def offer(self, block: HostBlock, durable: bool) -> asyncio.Future[StoreOutcome] | None:
        """Queue a new block, unless it is kept out for now: then None. What is to be durable is never kept out."""
        if self.doorkeeper is not None and not durable and self.doorkeeper.first_time(block.id):
            return None
        return self.submit(block, durable)

    def used(self, blocks: Iterable[HostBlock]) -> None:
        """Blocks in memory are used: those that had been kept out are written now."""
        if self.doorkeeper is not None:
            for block in blocks:
                if self.doorkeeper.again(block.id) and not block.gone:
                    self.submit(block)

    def submit(self, block: HostBlock, durable: bool = False) -> asyncio.Future[StoreOutcome]:
        """Queue a block; durable ones first. The future says what became of it, and is never cancelled from here."""
        done: asyncio.Future[StoreOutcome] = asyncio.get_running_loop().create_future()
        self._host.soil(block)
        self.blocks += 1
        self.bytes += block.nbytes
        parent = BlockId(block.id.scope, block.header.parent) if block.header.parent else None
        self._queue.add(block.id, parent, block.nbytes, weight(block.header), (block, durable, done), first=durable)
        self._hire()
        return done

    def _may_write(self) -> int:
        now = time.monotonic()
        if self._loading():
            self._loaded = now
            return 1
        return min(2, self._writers) if now - self._loaded < LINGER_S else self._writers

    def _hire(self) -> None:
        """One more writer, if there is work for it and loads leave it room."""
        if self._queue and self._busy < self._may_write():
            self._busy += 1
            task = asyncio.get_running_loop().create_task(self._write_until_empty())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _write_until_empty(self) -> None:
        try:
            while self._queue and self._busy <= self._may_write():
                block, durable, done = self._queue.take()
                outcome = await self._write(block, durable)
                self.blocks -= 1
                self.bytes -= block.nbytes
                self._host.clean(block)
                if not done.done():
                    done.set_result(outcome)
                self._progress()
                self._hire()
        finally:
            self._busy -= 1
            self._progress()

    async def _write(self, block: HostBlock, durable: bool) -> StoreOutcome:
        if block.gone:  # dropped while it waited
            return Dropped(DropReason.ABORTED)
        try:
            payload = self._host.arena.views(block.extents)
            outcome = await self.tier.put(block.id, block.header, payload, block.nbytes, durable=durable)
            if block.gone and isinstance(outcome, Stored | Exists):
                # Dropped while it was written: it must not come back.
                await self.tier.drop(block.id)
                return Dropped(DropReason.ABORTED)
        except Exception:
            log.exception("tier %s: a put raised", self.tier.name)
            return Dropped(DropReason.IO_ERROR)
        return outcome

    def _progress(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def progress(self, timeout_s: float) -> bool:
        """Wait until a block has been written; whether one was within the time. At once False if nothing is queued."""
        if not self.blocks:
            return False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            return False
        return True

    async def drain(self, timeout_s: float) -> int:
        """Wait until everything is written; how many blocks were not within the time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.blocks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await self.progress(left)
        return self.blocks
