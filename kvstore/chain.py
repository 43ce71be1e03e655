"""The tiers as one store: look down, bring up, write behind.

Host memory is on top; below it are zero or more `Tier`s, nearest first. All methods run on the daemon's event loop, so
the state of the chain changes only between awaits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping

from kvstore.admission import Doorkeeper
from kvstore.copies import Copies
from kvstore.estimates import TierEstimate
from kvstore.eviction.cost import weight
from kvstore.prefetch import PrefetchQueue
from kvstore.tiers.base import Sized, Tier
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock, encode_header
from kvstore.types import (
    BlockId,
    Dropped,
    DropReason,
    Exists,
    Extent,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Scope,
    Stored,
    StoreOutcome,
    TierCode,
)
from kvstore.watcher import Watcher
from kvstore.writebehind import WriteBehind

log = logging.getLogger("kvstore.chain")

ROOM_S = 5.0
"""How long a promotion waits for memory that is being written down. Whoever asked for it may give up sooner."""

AHEAD_SHARE = 4
"""Blocks that are to be fetched ahead fill at most one part in so many of host memory."""

Arrival = Callable[[HostBlock | Miss, TierCode], None]
"""Told, on the event loop, that a promotion ended. It must acquire the block before it returns, or not at all."""

Holdings = Mapping[TierCode, tuple[Callable[[], Iterable[Scope]], Callable[[Scope], Mapping[bytes, Sized]]]]
"""Of each tier: the scopes it has blocks of, and the blocks of one of them."""

Wanted = Callable[[], bool]
"""Whether somebody who asked for a promotion still waits for it."""


def always() -> bool:
    """For promotions that nobody takes back."""
    return True


class TierChain:
    """Host memory over lower tiers.

    Parameters
    ----------
    host : HostTier
        The top.
    below : list of Tier
        Nearest first.
    parallel : int
        Promotions, and writes per tier, that run at once.
    twice : collection of TierCode
        Tiers that take a block at its second sighting.
    """

    def __init__(
        self, host: HostTier, below: list[Tier], parallel: int = 8, twice: Collection[TierCode] = frozenset()
    ) -> None:
        self.host = host
        self.below = below
        self._copies = Copies(below, self._loading)
        self.queues = [
            WriteBehind(host, tier, parallel, self._loading, Doorkeeper() if tier.code in twice else None)
            for tier in below
        ]
        self._parallel = parallel
        self._arrivals: dict[BlockId, list[tuple[Arrival, Wanted]]] = {}
        self.ahead = PrefetchQueue(host.arena.capacity // AHEAD_SHARE)
        self._most_ahead = max(1, parallel // 4)
        self._prefetching = 0
        self._estimates = {tier.code: TierEstimate(tier.pace) for tier in below}
        self._ahead: dict[BlockId, tuple[TierEstimate, int]] = {}
        self._waiting: deque[BlockId] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._forgotten: set[BlockId] = set()

    # -- looking -------------------------------------------------------------------------------------------------------

    def locate(self, scope: Scope, keys: list[bytes], prefix: bool) -> bytes:
        """Where a load reads each block, as `TierCode` bytes; with `prefix` only up to the first that is nowhere."""
        codes = bytearray(map(self.host.blocks(scope).__contains__, keys))  # False is ABSENT, True is HOST
        at = codes.find(TierCode.ABSENT)
        while at >= 0:
            tier = self.find_below(scope, keys[at])
            if tier is not None:
                codes[at] = tier.code
            elif prefix:
                return bytes(codes[:at])
            at = codes.find(TierCode.ABSENT, at + 1)
        return bytes(codes)

    def speeds(self, codes: bytes) -> dict[int, tuple[float, float, float]]:
        """What a load costs now (`Speed`) from each lower tier that a `locate` named, as far as that was measured."""
        speeds = {code: self._estimates[code].speed() for code in self._estimates if code in codes}
        return {int(code): speed for code, speed in speeds.items() if speed is not None}

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told of every block that comes into a tier of this daemon, or leaves one."""
        self.host.watcher = watcher
        for tier in self.below:
            tier.watch(watcher)

    def holdings(self) -> Holdings:
        """Of each tier: the scopes it has blocks of, and the blocks of one of them; live, not a copy."""
        below: Holdings = {tier.code: (tier.scopes, tier.held) for tier in self.below}
        return {TierCode.HOST: (self.host.scopes, self.host.blocks), **below}

    def find_below(self, scope: Scope, key: bytes) -> Tier | None:
        """The lower tier that a load reads a block from: the nearest one, unless one further down has it better."""
        return self._copies.best(scope, key)

    def touch(self, blocks: list[HostBlock]) -> None:
        """Note a use of one prompt's blocks in every tier, so that a lower one does not evict what is hot above."""
        self.host.touch(blocks)
        for tier in self.below:
            tier.touch([block.id for block in blocks])
        for queue in self.queues:
            queue.used(blocks)

    # -- bringing up ---------------------------------------------------------------------------------------------------

    def promote(self, block: BlockId, arrival: Arrival, wanted: Wanted = always) -> None:
        """Bring a block into host memory, once however many ask for it meanwhile, and tell each who asked.

        If none of them wants it any more when its turn comes it is not read, and they are told `Miss(DEADLINE)`.
        """
        asked = self._arrivals.get(block)
        if asked is not None:
            asked.append((arrival, wanted))
            return
        self._arrivals[block] = [(arrival, wanted)]
        self.ahead.discard(block)
        self._waiting.append(block)
        self._expect(block)
        self._hire()

    def prefetch(self, block: BlockId) -> bool:
        """Bring a block up when nobody waits for others, if there is room in the queue; whether it is on its way."""
        if block in self._arrivals:
            return True
        tier = None if self.host.get(block) is not None else self.find_below(block.scope, block.key)
        nbytes = None if tier is None else tier.size(block)
        if nbytes is None or not self.ahead.add(block, nbytes):
            return False
        if self._prefetching < self._most_ahead:
            self._hire()
        return True

    def _hire(self) -> None:
        if self._running < self._parallel:
            self._running += 1
            task = asyncio.get_running_loop().create_task(self._promote_until_empty())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _expect(self, block: BlockId) -> None:
        """Count a block into the queue in front of its tier."""
        tier = self.find_below(block.scope, block.key)
        nbytes = None if tier is None else tier.size(block)
        if tier is not None and nbytes is not None:
            estimate = self._estimates[tier.code]
            estimate.queued(nbytes)
            self._ahead[block] = (estimate, nbytes)

    def _expect_no_more(self, block: BlockId) -> None:
        ahead = self._ahead.pop(block, None)
        if ahead is not None:
            estimate, nbytes = ahead
            estimate.left(nbytes)

    def _loading(self) -> bool:
        return self._running > self._prefetching

    async def _promote_until_empty(self) -> None:
        """Serve those who wait; when nobody does, fetch ahead, with some of the workers only."""
        try:
            while True:
                if self._waiting:
                    await self._serve(self._waiting.popleft(), asked=True)
                elif self._prefetching < self._most_ahead and (block := self.ahead.take()) is not None:
                    self._arrivals[block] = []
                    self._expect(block)
                    self._prefetching += 1
                    try:
                        await self._serve(block, asked=False)
                    finally:
                        self._prefetching -= 1
                else:
                    return
        finally:
            self._running -= 1

    async def _serve(self, block: BlockId, *, asked: bool) -> None:
        found: HostBlock | Miss = Miss(MissReason.LOST)
        code = TierCode.ABSENT
        try:
            if not asked or any(wanted() for _, wanted in self._arrivals[block]):
                found, code = await self._promote(block, patient=asked)
            else:
                found = Miss(MissReason.DEADLINE)
        except Exception:
            log.exception("a promotion failed")
        finally:
            self._forgotten.discard(block)
            self._expect_no_more(block)
            for arrival, _ in self._arrivals.pop(block):
                arrival(found, code)

    async def _promote(self, block: BlockId, *, patient: bool) -> tuple[HostBlock | Miss, TierCode]:
        miss = Miss(MissReason.ABSENT)
        for tier in self._copies.in_order(block):
            nbytes = tier.size(block)
            if nbytes is None:
                continue
            extents = await self._room(block.scope, nbytes, ROOM_S if patient else 0.0)
            if extents is None:
                return Miss(MissReason.NO_SPACE), tier.code
            kept = False
            try:
                outcome = await self._read(tier, block, extents, nbytes)
                if isinstance(outcome, Hit):
                    present = self.host.get(block)
                    if present is not None:  # stored afresh meanwhile
                        return present, TierCode.HOST
                    if block in self._forgotten:
                        return Miss(MissReason.ABSENT), tier.code
                    header_bytes = encode_header(outcome.header)
                    if not self.host.charge_header(len(header_bytes)):
                        return Miss(MissReason.NO_SPACE), tier.code
                    found = HostBlock(block, header_bytes, outcome.header, nbytes, extents)
                    self.host.insert(found)
                    self.host.counters.bytes_written += nbytes
                    kept = True
                    self._copies.was_read(block, tier, weight(outcome.header))
                    return found, tier.code
                miss = outcome
            finally:
                if not kept:
                    self.host.free(extents)
        return miss, TierCode.ABSENT

    async def _read(self, tier: Tier, block: BlockId, extents: tuple[Extent, ...], nbytes: int) -> LoadOutcome:
        """Ask a tier for a block, and learn from it how fast the tier is."""
        estimate, came = self._estimates[tier.code], 0
        estimate.begun()
        try:
            outcome = await tier.get(block, self.host.arena.views(extents))
            came = nbytes if isinstance(outcome, Hit) else 0
            return outcome
        finally:
            estimate.ended(came)

    async def _room(self, scope: Scope, nbytes: int, wait_s: float) -> tuple[Extent, ...] | None:
        """Memory for a block that comes up. Where all of it waits to be written down, wait for that."""
        deadline = time.monotonic() + wait_s
        while True:
            extents = self.host.allocate(scope.domain, nbytes, scope=scope)
            left = deadline - time.monotonic()
            if extents is not None or not self.dirty_blocks or left <= 0:
                return extents
            await self.progress(left)

    # -- storing -------------------------------------------------------------------------------------------------------

    async def progress(self, timeout_s: float) -> None:
        """Wait until a lower tier has been told of a block, which may then be evicted; or until the time is over."""
        waits = [asyncio.ensure_future(queue.progress(timeout_s)) for queue in self.queues if queue.blocks]
        if not waits:
            return
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    @property
    def dirty_blocks(self) -> int:
        """Blocks that a lower tier has yet to be told of."""
        return sum(queue.blocks for queue in self.queues)

    def admit(self, block: HostBlock, durable: bool) -> list[asyncio.Future[StoreOutcome]]:
        """Make a filled block visible and tell the lower tiers of it in the background."""
        self.host.insert(block)
        self.host.counters.stored += 1
        self.host.counters.bytes_written += block.nbytes
        offered = [queue.offer(block, durable) for queue in self.queues]
        return [write for write in offered if write is not None]

    async def durable(self, writes: list[asyncio.Future[StoreOutcome]]) -> StoreOutcome:
        """Whether a block admitted as durable became so in at least one tier."""
        outcomes = await asyncio.gather(*writes)
        if any(isinstance(outcome, Stored | Exists) for outcome in outcomes):
            return Stored()
        return Dropped(DropReason.NOT_DURABLE)

    # -- keeping and forgetting ----------------------------------------------------------------------------------------

    def pin(self, scope: Scope, keys: list[bytes], until: float) -> int:
        """Pin blocks where they are, as far as pins have room; how many were found and pinned."""
        count = 0
        for key in keys:
            block = BlockId(scope, key)
            in_host = self.host.get(block)
            pinned = in_host is not None and self.host.pin(in_host, until)
            below = [tier.pin(block, until) for tier in self.below]
            count += pinned or any(below)
        return count

    async def drop(self, scope: Scope, keys: list[bytes] | None) -> int:
        """Forget blocks in every tier, also those on their way up or down; how many blocks there were."""
        if keys is None:
            return await self._drop_all(scope)
        count = 0
        for key in keys:
            count += await self._drop_one(BlockId(scope, key))
        return count

    async def _drop_one(self, block: BlockId) -> bool:
        found = self._forget(block)
        for tier in self.below:
            found |= await tier.drop(block)
        self._forget(block)  # a reader may have brought it up while a tier was forgetting it
        return found

    async def _drop_all(self, scope: Scope) -> int:
        count = self._forget_all(scope)
        for tier in self.below:
            count = max(count, await tier.clear(scope))
        self._forget_all(scope)
        return count

    def _forget(self, block: BlockId) -> bool:
        """Take a block out of memory, and what is on its way up shall not arrive; whether it was in memory."""
        self.ahead.discard(block)
        for queue in self.queues:
            if queue.doorkeeper is not None:
                queue.doorkeeper.forget(block)
        if block in self._arrivals:
            self._forgotten.add(block)
        in_host = self.host.get(block)
        if in_host is not None:
            self.host.remove(in_host)
        return in_host is not None

    def _forget_all(self, scope: Scope) -> int:
        self.ahead.discard_scope(scope)
        coming = {block for block in self._arrivals if block.scope == scope}
        return sum(map(self._forget, coming | {BlockId(scope, key) for key in self.host.blocks(scope)}))

    # -- life ----------------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> int:
        """Write what is queued; how many blocks were left unwritten."""
        return sum(await asyncio.gather(*(queue.drain(timeout_s) for queue in self.queues)))

    async def close(self) -> None:
        """Close the lower tiers, then let go of host memory."""
        await self._copies.close()
        for tier in self.below:
            await tier.close()
        self.host.arena.close()
