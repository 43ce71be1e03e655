"""The Redis tier: blocks in Redis or Valkey, or a cluster of them, shared by the daemons of a fleet.

A put reserves its bytes in the shared index by a script (which names what leaves for them), writes the parts over
several connections, then the record, and tells everybody. A get reads the record, then the parts, and verifies every
byte: what Redis returns is not trusted. Without a connection the tier holds nothing and refuses at once; it connects
again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from redis.asyncio.cluster import RedisCluster
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from kvstore.errors import ConfigError, CorruptBlock, TierDown
from kvstore.remote import index as ix
from kvstore.remote import record as rec
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
_LIES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What a reply of another shape than was asked for ends in: no server of ours."""
_FAILURES = (RedisError, OSError, TimeoutError, asyncio.TimeoutError, *_LIES)
TOUCH_SHARE = 8
"""The expiry of a block's values is put off at most so many times in one life of them."""
OWNER = "owner"
"""What the domain of the daemon's own user is called in Redis: that user may have another number on another host."""
_BATCH = 256


class Exhausted(RedisError):
    """All connections were busy for as long as a command may take."""


class _Gone(Exception):
    """A block is not there any more, or is another write of it than the index here knows. Nothing is damaged."""


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
        self._names = ix.Names(prefix)
        self._seal = rec.Seal(key) if key else None
        self._own_domain = own_domain
        self._lanes = connections
        self._ttl_s = int(ttl_s)
        self._timeout_s = timeout_s
        self._max_block_bytes = max_block_bytes
        self._patience_ms = max(1, min(500, int(500 * timeout_s)))  # well within the time limit of the connection
        self._client = _make_client(url, cluster, 2 * connections + 4, timeout_s)
        self._free = asyncio.Semaphore(2 * connections + 3)  # and one connection follows the log
        self._origin = os.urandom(8).hex()
        self._mirror = ix.Mirror()
        self._about: dict[Scope, bytes] = {}
        self._pins: dict[BlockId, float] = {}
        self._later: dict[bytes, tuple[float, bool]] = {}
        self._writing: dict[BlockId, bool] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._synced = asyncio.Event()
        self._closed = False
        self._error = "not started"
        self._failures: dict[str, int] = {}
        self._heed_own = 0
        self._renewed: set[bytes] = set()
        self._renewed_since = time.monotonic()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and read what is there; if that fails, go on trying in the background."""
        self._follower = asyncio.get_running_loop().create_task(self._follow())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._synced.wait(), self._timeout_s)

    async def close(self) -> None:
        """Finish what was accepted and disconnect."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._follower is not None:
            self._follower.cancel()  # it looks at `_closed` too: a timeout that ends just then would swallow this
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
            self._follower = None
        self._synced.clear()
        with contextlib.suppress(*_FAILURES):
            await self._client.aclose()

    # -- the index -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep the copy of the index up to date, and connect again whenever that fails."""
        wait_s = 0.1
        while not self._closed:
            try:
                at, number = await self._read_index()
                self._error, wait_s = "", 0.1
                self._synced.set()
                while at and not self._closed:
                    at, number = await self._read_log(at, number)
                    await self._flush()
            except _FAILURES as error:
                self._failed(error)
                await asyncio.sleep(wait_s)
                wait_s = min(5.0, 2 * wait_s)

    def _failed(self, error: BaseException) -> None:
        connected = self._synced.is_set() or not self._error
        self._synced.clear()
        self._note(error)
        if connected:
            log.warning("redis: %s", self._error)

    def _note(self, error: BaseException) -> None:
        """Count a failure by its kind and keep what it says."""
        kind, words = _kind_of(error)
        self._failures[kind] = self._failures.get(kind, 0) + 1
        self._error = f"{words}: {error}"

    async def _read_index(self) -> tuple[bytes, int]:
        """Read all of it; the place in the stream from which on it changes, and the number of the last change."""
        number = int(await self._ask(self._client.get(self._names.seq)) or 0)
        last = await self._ask(self._client.xrevrange(self._names.log, count=1))
        mirror, cursor = ix.Mirror(), 0
        while True:
            cursor, found = await self._ask(self._client.hscan(self._names.blocks, cursor, count=1000))
            for member, value in found.items():
                block, place = self._block(member), self._place(value)
                if block is not None and place is not None:
                    mirror.add(block, place)
            if not int(cursor):
                break
        about = await self._ask(self._client.hgetall(self._names.about))
        for member, text in about.items():
            block = self._block(member + bytes(32))
            if block is not None and len(text) <= 65536:
                self._about[block.scope] = text
        # What we ourselves changed while this was read may be missing from it: so far the log counts for that, too.
        self._heed_own = int(await self._ask(self._client.get(self._names.seq)) or 0)
        self._mirror = mirror
        return (last[0][0], int(last[0][1][b"n"])) if last else (b"0-0", number)

    async def _read_log(self, at: bytes, number: int) -> tuple[bytes, int]:
        """Apply what changed; empty bytes if something was missed and the index has to be read again."""
        reading = self._client.xread({self._names.log: at}, count=1000, block=self._patience_ms)
        found = await asyncio.wait_for(cast("Awaitable[Any]", reading), 2 * self._timeout_s)
        for _, changes in found or ():
            for place_in_log, change in changes:
                if int(change[b"n"]) != number + 1:
                    return b"", 0
                at, number = place_in_log, number + 1
                if number <= self._heed_own or change[b"o"].decode(errors="replace") != self._origin:
                    self._apply(change)
        return at, number

    def _apply(self, change: dict[bytes, bytes]) -> None:
        block, place = self._block(change[b"m"]), self._place(change[b"v"])
        if block is None or place is None:
            return
        if change[b"k"] == b"stored":
            self._mirror.add(block, place)
        else:
            self._mirror.remove(block, place.write)

    def _member(self, block: BlockId) -> bytes:
        own = block.scope.domain == self._own_domain
        return ix.member_of(block, OWNER if own else block.scope.domain)

    def _block(self, member: bytes) -> BlockId | None:
        domain = ix.domain_of(member)
        return ix.block_of(member, self._own_domain if domain == OWNER and self._own_domain else domain)

    def _place(self, value: bytes) -> ix.Place | None:
        place = ix.Place.unpack(value)
        believable = place is not None and place.nbytes <= min(self._max_block_bytes, place.cost)
        return place if believable else None

    async def _script(self, text: str, *args: bytes | str | float) -> Any:
        return await self._ask(self._client.eval(text, 5, *self._names.index, self._origin, *args))

    async def _ask(self, reply: Any) -> Any:
        """What a command answers, once a connection is free for it; each may take the time limit."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._free.acquire()
        except BaseException as error:
            reply.close()
            if isinstance(error, TimeoutError):
                raise Exhausted(f"no connection was free for {self._timeout_s:g} s") from None
            raise
        try:
            async with asyncio.timeout(self._timeout_s):
                return await reply
        finally:
            self._free.release()

    # -- looking -------------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Payload bytes of a block that is there, as far as is known. No I/O."""
        place = self._mirror.find(block) if self._synced.is_set() else None
        return None if place is None or block in self._writing else place.nbytes

    def usage(self) -> Usage:
        """Bytes and blocks of the whole deployment."""
        return Usage(self._capacity, self._mirror.used, self._mirror.count)

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes of the budget) of each scope."""
        held = self._mirror.scopes.items()
        return {scope: (len(blocks), sum(place.cost for place in blocks.values())) for scope, blocks in held}

    def describe_state(self) -> dict[str, Any]:
        """Whether it is connected, and if not why; failures since start by kind."""
        return {
            "connected": self._synced.is_set(),
            "last_error": self._error,
            "failures": dict(self._failures),
            "sealed": self._seal is not None,
        }

    async def describe(self, scope: Scope, text: bytes) -> None:
        """Keep a short text beside the blocks of a scope."""
        if self._synced.is_set() and self._about.get(scope) != text and 0 < len(text) <= 65536:
            self._about[scope] = text
            member = self._member(BlockId(scope, b""))
            with contextlib.suppress(*_FAILURES):
                await self._ask(self._client.hset(self._names.about, key=cast("Any", member), value=cast("Any", text)))

    def descriptions(self) -> dict[Scope, bytes]:
        """The texts kept by `describe`."""
        return dict(self._about)

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

    async def _get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        if self._closed or not self._synced.is_set():
            return Miss(MissReason.TIER_DOWN)
        place = self._mirror.find(block)
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
            await self._quietly(self._remove([block], place))
            return Miss(MissReason.CORRUPT)
        except _Gone:  # expired, evicted by the server or by another daemon, or dropped a moment ago
            await self._quietly(self._remove([block], place))
            return Miss(MissReason.LOST)
        except _FAILURES as error:
            self._note(error)
            return Miss(MissReason.TIER_DOWN)
        self.counters.read_s += time.perf_counter() - began
        return Hit(found.header, place.nbytes)

    async def _read(self, block: BlockId, place: ix.Place, into: Sequence[memoryview]) -> rec.Record:
        """Read and verify a block. The record, which says what the parts must be, travels with the first of them."""
        member, known = self._member(block), self._known(block)
        parts = self._names.parts(member, place)
        record: asyncio.Future[rec.Record] = asyncio.get_running_loop().create_future()

        async def lane(numbers: range) -> None:
            for first in range(0, max(1, len(numbers)), 4):  # what is read at once is bounded, whatever is there
                some = numbers[first : first + 4]
                leads = not (first or numbers.start)
                pipe = self._client.pipeline(**self._plain)
                if leads:
                    pipe.getrange(self._names.record(member), 0, rec.MAX_RECORD)
                for number in some:
                    pipe.getrange(parts[number], 0, rec.PART_BYTES + rec.SEAL_BYTES)
                values = await self._ask(pipe.execute())
                if leads:
                    record.set_result(self._believed(known, place, values.pop(0)))
                self._unpack(known, await record, dict(zip(some, values, strict=True)), into)

        async def leading(numbers: range) -> None:
            try:
                await lane(numbers)
            finally:
                record.cancel()  # if it did not come, the others do not wait for it

        lanes = [range(at, len(parts), self._lanes) for at in range(max(1, min(self._lanes, len(parts))))]
        await _all([leading(lanes[0]), *map(lane, lanes[1:])])
        return record.result()

    def _believed(self, block: BlockId, place: ix.Place, value: bytes) -> rec.Record:
        """A record, if it is that of the write which the index names."""
        if not value:
            raise _Gone
        record = rec.decode(block, value, self._seal)
        if record.write != place.write:
            raise _Gone
        if record.nbytes != place.nbytes:
            raise CorruptBlock("redis: a record's length is not the one that the index names.")
        return record

    def _unpack(self, block: BlockId, record: rec.Record, values: dict[int, bytes], into: Sequence[memoryview]) -> None:
        """Verify some parts, by number, and copy them to where they belong."""
        for number, value in values.items():
            if not value:
                raise _Gone
            part = rec.open_part(block, record, number, value, self._seal)
            rec.scatter(part, number * rec.PART_BYTES, into)

    def _known(self, block: BlockId) -> BlockId:
        """A block as its record names it: with the name that its domain has in Redis."""
        domain = OWNER if block.scope.domain == self._own_domain else block.scope.domain
        return BlockId(Scope(domain, block.scope.ns), block.key)

    @property
    def _plain(self) -> dict[str, Any]:
        return {} if isinstance(self._client, RedisCluster) else {"transaction": False}

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
        if self._closed or not self._synced.is_set():
            return Dropped(DropReason.TIER_DOWN)
        if block in self._writing:
            return Dropped(DropReason.IN_FLIGHT)
        if self._mirror.find(block) is not None:
            return Exists() if not durable or await self._synced_to_disk() else Dropped(DropReason.NOT_DURABLE)
        cost = ix.cost_of(nbytes)
        if cost > self._capacity:
            return Dropped(DropReason.TOO_LARGE)
        self._writing[block] = True
        began = time.perf_counter()
        try:
            return await self._write(block, header, payload, nbytes, cost, durable)
        except _FAILURES as error:
            self._note(error)
            return Dropped(DropReason.TIER_FULL if _kind_of(error)[0] == "full" else DropReason.TIER_DOWN)
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
    ) -> StoreOutcome:
        await self._flush()
        known = self._known(block)
        if self._seal is None:
            write, record, parts = rec.encode(known, header, payload, nbytes, None)
        else:  # takes long enough to keep everybody else waiting
            write, record, parts = await asyncio.to_thread(rec.encode, known, header, payload, nbytes, self._seal)
        member, place = self._member(block), ix.Place(cost, nbytes, write)
        try:
            reply = await self._script(
                ix.RESERVE, member, cost, self._capacity, place.pack(), self._ttl_s, ix.WRITING_S
            )
            if reply[0] != b"room":
                return Exists() if reply[0] == b"exists" else Dropped(DropReason.TIER_FULL)
            self._mirror.add(block, place)
            await self._unlink(reply[1:], evicted=True)
            values = dict(zip(self._names.parts(member, place), parts, strict=True)) | {
                self._names.record(member): record
            }
            await _all(self._write_lane(list(values.items())[at :: self._lanes]) for at in range(self._lanes))
            if not await self._script(ix.COMMIT, member, place.pack()) or not self._writing[block]:
                await self._remove([block], place)
                return Dropped(DropReason.ABORTED)
        except _FAILURES:
            self._mirror.remove(block, place.write)
            await self._quietly(self._remove([block], place))
            raise
        if durable and not await self._synced_to_disk():
            return Dropped(DropReason.NOT_DURABLE)
        return Stored()

    async def _write_lane(self, values: Sequence[tuple[str, memoryview | bytes]]) -> None:
        for first in range(0, len(values), 4):
            pipe = self._client.pipeline(**self._plain)
            for name, value in values[first : first + 4]:
                pipe.set(name, cast("bytes", value), ex=self._ttl_s)
            await self._ask(pipe.execute())

    async def _synced_to_disk(self) -> bool:
        """Whether everything written so far is in the server's append-only file and synced.

        The server waits for what its connection has written, so a write goes before; the file has one order for all.
        Blocks of a cluster are on other nodes than the index: there nothing is promised.
        """
        if isinstance(self._client, RedisCluster):
            return False
        pipe = self._client.pipeline(transaction=False)
        pipe.incrby(self._names.sum, 0)
        pipe.execute_command("WAITAOF", 1, 0, int(self._timeout_s * 900))
        try:
            return int((await self._ask(pipe.execute()))[1][0]) >= 1
        except _FAILURES:
            return False

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
        if self._mirror.find(block) is None:
            return False
        return bool(await self._quietly(self._remove([block])))

    async def clear(self, scope: Scope) -> int:
        """Forget every block of a scope; how many there were."""
        blocks = [BlockId(scope, key) for key in self._mirror.scopes.get(scope, {})]
        for block in self._writing:
            if block.scope == scope:
                self._writing[block] = False
        count = 0
        for first in range(0, len(blocks), _BATCH):
            count += await self._quietly(self._remove(blocks[first : first + _BATCH])) or 0
        return count

    async def _remove(self, blocks: list[BlockId], only: ix.Place | None = None) -> int:
        """Take blocks out of the index, with `only` just that write, and delete their values; how many there were."""
        known = [(block, only or self._mirror.find(block)) for block in blocks]
        which = b"" if only is None else only.pack()
        gone = await self._script(ix.REMOVE, which, *(self._member(block) for block in blocks))
        for block, place in known:
            if place is not None:
                self._mirror.remove(block, place.write)
        await self._unlink(gone)
        return len(gone) // 2

    async def _unlink(self, gone: list[bytes], evicted: bool = False) -> None:
        """Delete the values of blocks that a script took out: member and value in turn."""
        keys: list[str] = []
        for member, value in zip(gone[::2], gone[1::2], strict=True):
            place, block = self._place(value), self._block(member)
            if place is None or block is None:
                continue
            self._mirror.remove(block, place.write)
            self._pins.pop(block, None)
            self.counters.evicted += evicted
            keys += [self._names.record(member), *self._names.parts(member, place)]
        if keys:
            pipe = self._client.pipeline(**self._plain)
            for name in keys:
                pipe.execute_command("UNLINK", name)  # the method for it does nothing in a cluster's pipeline
            await self._ask(pipe.execute())

    async def _quietly(self, work: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await work
        except _FAILURES as error:
            self._note(error)
            return None

    # -- staying -------------------------------------------------------------------------------------------------------

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first; told to Redis a moment later, in one go."""
        for depth, block in enumerate(blocks):
            if self._mirror.find(block) is not None and self._pins.get(block, 0.0) <= time.monotonic():
                self._later[self._member(block)] = (-1e-6 * depth, False)

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction until a monotonic time; whether it is there, as far as is known."""
        if self.size(block) is None:
            return False
        left = max(0.0, until - time.monotonic())
        self._later[self._member(block)] = (left, True)
        if left:
            self._pins[block] = until
        else:
            self._pins.pop(block, None)
        return True

    async def _flush(self) -> None:
        """Tell Redis of uses and pins."""
        while self._later:
            some = [(member, *self._later.pop(member)) for member in list(self._later)[:_BATCH]]
            args = [arg for member, delta, back in some for arg in (member, f"{delta:.6f}", "1" if back else "0")]
            await self._script(ix.TOUCH, *args)
            pins = {member: delta for member, delta, back in some if back}
            await self._renew([(member, int(pins.get(member, 0.0))) for member, _, _ in some])

    async def _renew(self, members: list[tuple[bytes, int]]) -> None:
        """Put off the expiry of blocks' values, now and then for those in use, at once for those pinned for long."""
        now = time.monotonic()
        if now - self._renewed_since > self._ttl_s / TOUCH_SHARE:
            self._renewed.clear()
            self._renewed_since = now
        pipe = self._client.pipeline(**self._plain)
        for member, pinned_s in members:
            block = self._block(member)
            place = None if block is None else self._mirror.find(block)
            if place is None or (member in self._renewed and pinned_s <= self._ttl_s):
                continue
            self._renewed.add(member)
            for name in [self._names.record(member), *self._names.parts(member, place)]:
                pipe.expire(name, max(self._ttl_s, pinned_s + 1))
        if len(pipe):
            await self._ask(pipe.execute())

    async def check(self, fix: bool = False) -> list[Finding]:
        """Read and verify every block that the index names."""
        findings: list[Finding] = []
        for block in [BlockId(scope, key) for scope, keys in self._mirror.scopes.items() for key in keys]:
            place = self._mirror.find(block)
            if place is None or block in self._writing:
                continue
            try:
                await self._read(block, place, [memoryview(bytearray(place.nbytes))])
                continue
            except _Gone:
                if self._mirror.find(block) is not place:
                    continue  # it left while it was looked at
                what = "the index names a block that is not there"
            except CorruptBlock as error:
                what = error.cause
            except _FAILURES as error:
                self._note(error)
                raise TierDown(f"redis tier: {self._error}.") from None
            fixed = fix and bool(await self._quietly(self._remove([block], place)))
            findings.append(Finding(what, self._names.record(self._member(block)), fixed))
        return findings


def read_key(file: Path) -> bytes:
    """The key in a file of 64 hex digits.

    Raises
    ------
    ConfigError
        If it cannot be read or is anything else.
    """
    try:
        key = bytes.fromhex(file.read_text("ascii"))
    except OSError as error:
        raise ConfigError(f"redis.key_file: {file}: {error.strerror or error}.") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            f"redis.key_file: {file} does not hold 64 hex digits.", "Make one with `openssl rand -hex 32`."
        )
    return key


def _kind_of(error: BaseException) -> tuple[str, str]:
    """Kind of a failure, and how it is said."""
    if isinstance(error, Exhausted):
        return "exhausted", "all connections are busy"
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return "denied", "refused"
    if isinstance(error, TimeoutError | redis.TimeoutError):
        return "slow", "does not answer in time"
    if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM" in str(error)):
        return "full", "has no memory left"
    if isinstance(error, (InvalidResponse, *_LIES)):
        return "garbage", "answers what was not asked"
    if isinstance(error, ResponseError):
        return "error", "answers with an error"
    return "refused", "cannot be reached"


def _make_client(url: str, cluster: bool, connections: int, timeout_s: float) -> redis.Redis | RedisCluster:
    limits = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "max_connections": connections}
    try:
        if cluster:
            return RedisCluster.from_url(url, retry=Retry(NoBackoff(), 1), **limits)
        pool = redis.BlockingConnectionPool.from_url(url, retry=Retry(NoBackoff(), 0), timeout=timeout_s, **limits)
        return redis.Redis(connection_pool=pool)
    except (ValueError, RedisError) as error:
        raise ConfigError(f"redis.url: {error}.", "Write redis://host:6379, rediss://… or unix:///path.") from None


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run some work at the same time; if one fails the others end first, and then that error is raised."""
    done = await asyncio.gather(*works, return_exceptions=True)
    for error in done:
        if error is not None:
            raise error
