"""The Redis tier: blocks in Redis or Valkey, or a cluster of them, shared by the daemons of a fleet.

A put reserves its bytes in the shared index by a script (which names what leaves for them), writes the parts and the
record over several connections, and tells everybody. A get reads the record and the parts, and verifies every byte:
what Redis returns is not trusted. Without a connection the tier holds nothing and refuses at once; it connects again by
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from kvstore.errors import ConfigError, CorruptBlock, TierDown
from kvstore.remote import index as ix
from kvstore.remote import record as rec
from kvstore.remote.follower import Follower
from kvstore.remote.link import FAILURES, Link, kind_of
from kvstore.remote.uses import Uses
from kvstore.remote.values import Gone, Values
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    Exists,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Scope,
    Stored,
    StoreOutcome,
    TierCode,
)

log = logging.getLogger("kvstore.redis")

T = TypeVar("T")
_BATCH = 256


class RedisTier(Tier):
    """Blocks as Redis values.

    Parameters
    ----------
    url : str
        ``redis://``, ``rediss://`` or ``unix://``, with user and password if there are any.
    capacity : int
        Bytes that this deployment (all daemons with this prefix) keeps there.
    prefix : str
        What the names of all keys begin with.
    cluster : bool
        Whether it is a cluster.
    connections : int
        Connections over which one block's parts travel.
    ttl_s : float
        How long a block stays after its last use.
    timeout_s : float
        Longest time one command may take, and longest wait for a connection.
    max_block_bytes : int
        Larger blocks are not believed in: the index is not trusted with memory.
    key : bytes
        32 bytes: seal everything with AES-256-GCM. Empty: checksums alone.
    own_domain : str
        The trust domain of the daemon's own user.

    Raises
    ------
    ConfigError
        If the URL or the key cannot be used.
    """

    name = "redis"
    code = TierCode.REDIS

    def __init__(
        self,
        url: str,
        capacity: int,
        *,
        prefix: str = "kvstore",
        cluster: bool = False,
        connections: int = 4,
        ttl_s: float = 7 * 86_400.0,
        timeout_s: float = 2.0,
        max_block_bytes: int = 1 << 30,
        key: bytes = b"",
        own_domain: str = "",
    ) -> None:
        if key and len(key) != 32:
            raise ConfigError(f"redis.key_file: the key has {len(key)} bytes; it must have 32.")
        self.counters = TierCounters()
        self._capacity = capacity
        self._ttl_s = int(ttl_s)
        self._seal = rec.Seal(key) if key else None
        self._names = ix.Names(prefix)
        self._link = Link(url, cluster, connections, timeout_s)
        self._values = Values(self._link, self._names, self._seal, self._ttl_s)
        self._index = Follower(self._link, self._names, own_domain, max_block_bytes)
        self._uses = Uses(self._index, self._values, self._ttl_s)
        self._index.meanwhile = self._uses.flush
        self._writing: dict[BlockId, bool] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and read what is there; if that fails, go on trying in the background."""
        await self._index.start()

    async def close(self) -> None:
        """Finish what was accepted and disconnect."""
        self._index.closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._index.stop()
        await self._link.close()

    @property
    def _usable(self) -> bool:
        return self._index.connected and not self._index.closed

    def _find(self, block: BlockId) -> ix.Place | None:
        return self._index.mirror.find(block)

    # -- looking -------------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Payload bytes of a block that is there, as far as is known. No I/O."""
        place = self._find(block) if self._index.connected else None
        return None if place is None or block in self._writing else place.nbytes

    def usage(self) -> Usage:
        """Bytes and blocks of the whole deployment."""
        return Usage(self._capacity, self._index.mirror.used, self._index.mirror.count)

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes of the budget) of each scope."""
        held = self._index.mirror.scopes.items()
        return {scope: (len(blocks), sum(place.cost for place in blocks.values())) for scope, blocks in held}

    def describe_state(self) -> dict[str, Any]:
        """Whether it is connected, and if not why; failures since start by kind."""
        return {
            "connected": self._index.connected,
            "last_error": self._link.error,
            "failures": dict(self._link.failures),
            "sealed": self._seal is not None,
        }

    async def describe(self, scope: Scope, text: bytes) -> None:
        """Keep a short text beside the blocks of a scope."""
        await self._index.describe(scope, text)

    def descriptions(self) -> dict[Scope, bytes]:
        """The texts kept by `describe`."""
        return dict(self._index.about)

    # -- get -----------------------------------------------------------------------------------------------------------

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """Read a block into the caller's buffers and verify every byte."""
        outcome = await self._get(block, into)
        if isinstance(outcome, Hit):
            self.counters.hits += 1
            self.counters.bytes_read += outcome.nbytes
            self.touch([block])
        else:
            self.counters.misses += 1
        return outcome

    async def peek(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """As `get`, but nobody used the block."""
        return await self._get(block, into)

    async def _get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        if not self._usable:
            return Miss(MissReason.TIER_DOWN)
        place = self._find(block)
        if place is None or block in self._writing:
            return Miss(MissReason.ABSENT)
        if sum(view.nbytes for view in into) != place.nbytes:
            return Miss(MissReason.LOST)  # it was replaced after the caller had asked for its size
        began = time.perf_counter()
        views = [view.cast("B") for view in into]
        try:
            found = await self._read(block, place, views)
        except CorruptBlock as error:
            log.warning("%s", error)
            self.counters.corrupt += 1
            await self._link.quietly(self._remove([block], place))
            return Miss(MissReason.CORRUPT)
        except Gone:  # expired, evicted by the server or by another daemon, or dropped a moment ago
            await self._link.quietly(self._remove([block], place))
            return Miss(MissReason.LOST)
        except FAILURES as error:
            self._link.note(error)
            return Miss(MissReason.TIER_DOWN)
        self.counters.read_s += time.perf_counter() - began
        return Hit(found.header, place.nbytes)

    async def _read(self, block: BlockId, place: ix.Place, into: Sequence[memoryview]) -> rec.Record:
        return await self._values.read(self._index.known(block), self._index.member(block), place, into)

    # -- put -----------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """Store a block. Durable is what the server has synced to its append-only file."""
        outcome = await self._to_the_end(block, self._put(block, header, payload, nbytes, durable))
        if isinstance(outcome, Stored):
            self.counters.stored += 1
            self.counters.bytes_written += nbytes
        elif isinstance(outcome, Exists):
            self.counters.exists += 1
        else:
            self.counters.drop(outcome.reason.value)
        return outcome

    async def _put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, durable: bool
    ) -> StoreOutcome:
        if not self._usable:
            return Dropped(DropReason.TIER_DOWN)
        if block in self._writing:
            return Dropped(DropReason.IN_FLIGHT)
        if self._find(block) is not None:
            return Exists() if not durable or await self._synced_to_disk() else Dropped(DropReason.NOT_DURABLE)
        cost = ix.cost_of(nbytes)
        if cost > self._capacity:
            return Dropped(DropReason.TOO_LARGE)
        return await self._occupying(block, self._write(block, header, payload, nbytes, cost, durable))

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        """Write a block anew, which keeps its place in the order. It is absent meanwhile: nobody's bytes are uncounted.

        Of several daemons that want to, the first does; the others, and who finds it pinned, get ``IN_FLIGHT``.
        """
        outcome = await self._to_the_end(block, self._replace(block, header, payload, nbytes))
        if isinstance(outcome, Stored):
            self.counters.bytes_written += nbytes
        return outcome

    async def _replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        place = self._find(block)
        if not self._usable:
            return Dropped(DropReason.TIER_DOWN)
        if place is None or block in self._writing:
            return Dropped(DropReason.IN_FLIGHT)
        return await self._occupying(block, self._write_anew(block, place, header, payload, nbytes))

    async def _write_anew(
        self, block: BlockId, place: ix.Place, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        member = self._index.member(block)
        taken = await self._index.script(ix.TAKE, member, place.pack())
        if not taken:
            return Dropped(DropReason.IN_FLIGHT)
        value, used = taken
        await self._unlink([member, value])
        return await self._write(block, header, payload, nbytes, ix.cost_of(nbytes), False, used)

    async def _occupying(self, block: BlockId, work: Coroutine[Any, Any, StoreOutcome]) -> StoreOutcome:
        """Write a block, which is not found meanwhile."""
        self._writing[block] = True
        began = time.perf_counter()
        try:
            return await work
        except FAILURES as error:
            self._link.note(error)
            return Dropped(DropReason.TIER_FULL if kind_of(error)[0] == "full" else DropReason.TIER_DOWN)
        finally:
            del self._writing[block]
            self.counters.write_s += time.perf_counter() - began

    async def _write(
        self,
        block: BlockId,
        header: BlockHeader,
        payload: Sequence[memoryview],
        nbytes: int,
        cost: int,
        durable: bool,
        used: bytes = b"",
    ) -> StoreOutcome:
        """Reserve, write, tell; `used` is when the block was last used, as the index says it, if that was not now."""
        await self._uses.flush()
        known, member = self._index.known(block), self._index.member(block)
        if self._seal is None:
            write, record, parts = rec.encode(known, header, payload, nbytes, None)
        else:  # takes long enough to keep everybody else waiting
            write, record, parts = await asyncio.to_thread(rec.encode, known, header, payload, nbytes, self._seal)
        place = ix.Place(cost, nbytes, write)
        try:
            room = member, cost, self._capacity, place.pack(), self._ttl_s, ix.WRITING_S
            reply = await self._index.script(ix.RESERVE, *room)
            if reply[0] != b"room":
                return Exists() if reply[0] == b"exists" else Dropped(DropReason.TIER_FULL)
            self._index.mirror.add(block, place)
            await self._unlink(reply[1:], evicted=True)
            await self._values.write(member, place, record, parts)
            if not await self._index.script(ix.COMMIT, member, place.pack(), used) or not self._writing[block]:
                await self._remove([block], place)
                return Dropped(DropReason.ABORTED)
        except FAILURES:
            self._index.mirror.remove(block, place.write)
            await self._link.quietly(self._remove([block], place))
            raise
        if durable and not await self._synced_to_disk():
            return Dropped(DropReason.NOT_DURABLE)
        return Stored()

    async def _synced_to_disk(self) -> bool:
        return await self._link.synced_to_disk(self._names.sum)

    async def _to_the_end(self, block: BlockId, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end even if the caller is cancelled: nothing half-written may stay, and its buffers are in use."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if block in self._writing:
                self._writing[block] = False
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            raise

    # -- forgetting ----------------------------------------------------------------------------------------------------

    async def drop(self, block: BlockId) -> bool:
        """Forget a block, also one that is being written; whether it was there."""
        if block in self._writing:
            self._writing[block] = False
            return True
        if self._find(block) is None:
            return False
        return bool(await self._link.quietly(self._remove([block])))

    async def clear(self, scope: Scope) -> int:
        """Forget every block of a scope; how many there were."""
        blocks = [BlockId(scope, key) for key in self._index.mirror.scopes.get(scope, {})]
        for block in self._writing:
            if block.scope == scope:
                self._writing[block] = False
        count = 0
        for first in range(0, len(blocks), _BATCH):
            count += await self._link.quietly(self._remove(blocks[first : first + _BATCH])) or 0
        return count

    async def _remove(self, blocks: list[BlockId], only: ix.Place | None = None) -> int:
        """Take blocks out of the index, with `only` just that write, and delete their values; how many there were."""
        known = [(block, only or self._find(block)) for block in blocks]
        which = b"" if only is None else only.pack()
        gone = await self._index.script(ix.REMOVE, which, *map(self._index.member, blocks))
        for block, place in known:
            if place is not None:
                self._index.mirror.remove(block, place.write)
        await self._unlink(gone)
        return len(gone) // 2

    async def _unlink(self, gone: list[bytes], evicted: bool = False) -> None:
        """Delete the values of blocks that a script took out: member and value in turn."""
        names: list[str] = []
        for member, value in zip(gone[::2], gone[1::2], strict=True):
            place, block = self._index.place(value), self._index.block(member)
            if place is None or block is None:
                continue
            self._index.mirror.remove(block, place.write)
            self._uses.forget(block)
            self.counters.evicted += evicted
            names += self._values.names(member, place)
        await self._values.unlink(names)

    # -- staying -------------------------------------------------------------------------------------------------------

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first; told to Redis a moment later, in one go."""
        self._uses.touch(blocks)

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction until a monotonic time; whether it is there, as far as is known."""
        if self.size(block) is None:
            return False
        self._uses.pin(block, until)
        return True

    async def oldest(self, most: int) -> list[BlockId]:
        """Blocks of the whole deployment that leave next, those unused for longest first; none without a connection."""
        return (await self._link.quietly(self._uses.oldest(most)) if self._usable else None) or []

    async def check(self, fix: bool = False) -> list[Finding]:
        """Read and verify every block that the index names."""
        findings: list[Finding] = []
        for block in [BlockId(scope, key) for scope, keys in self._index.mirror.scopes.items() for key in keys]:
            place = self._find(block)
            if place is None or block in self._writing:
                continue
            try:
                await self._read(block, place, [memoryview(bytearray(place.nbytes))])
                continue
            except Gone:
                if self._find(block) is not place:
                    continue  # it left while it was looked at
                what = "the index names a block that is not there"
            except CorruptBlock as error:
                what = error.cause
            except FAILURES as error:
                self._link.note(error)
                raise TierDown(f"redis tier: {self._link.error}.") from None
            fixed = fix and bool(await self._link.quietly(self._remove([block], place)))
            findings.append(Finding(what, self._names.record(self._index.member(block)), fixed))
        return findings
