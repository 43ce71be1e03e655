"""The Redis tier: blocks in Redis or Valkey, or a cluster of them, shared by the daemons of a fleet.

A put reserves its bytes in the shared index by a script (which names what leaves for them), writes the parts and the
record over several connections, and tells everybody. A get reads the record and the parts, and verifies every byte:
what Redis returns is not trusted. Without a connection the tier holds nothing and refuses at once; it connects again by
itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.errors import ConfigError, CorruptBlock, TierDown
from kvstore.remote import index as ix
from kvstore.remote import record as rec
from kvstore.remote.blocks import Blocks
from kvstore.remote.follower import Follower
from kvstore.remote.link import FAILURES, Link
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
        self._seal = rec.Seal(key) if key else None
        self._names = ix.Names(prefix)
        self._link = Link(url, cluster, connections, timeout_s)
        self._values = Values(self._link, self._names, self._seal, int(ttl_s))
        self._index = Follower(self._link, self._names, own_domain, max_block_bytes)
        self._uses = Uses(self._index, self._values, int(ttl_s))
        self._index.meanwhile = self._uses.flush
        self._blocks = Blocks(self._link, self._names, self._index, self._values, self._uses, capacity, int(ttl_s))

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and read what is there; if that fails, go on trying in the background."""
        await self._index.start()

    async def close(self) -> None:
        """Finish what was accepted and disconnect."""
        self._index.closed = True
        await self._blocks.close()
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
        return None if place is None or self._blocks.writing(block) else place.nbytes

    def usage(self) -> Usage:
        """Bytes and blocks of the whole deployment; the capacity is less than the budget while the server is full."""
        return Usage(self._blocks.capacity, self._index.mirror.used, self._index.mirror.count)

    def pace(self) -> float | None:
        """What a block takes by the bytes that have come of those under way. A cluster's client tells of none."""
        return None if self._link.is_cluster else self._link.under_way.pace()

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes of the budget) of each scope."""
        held = self._index.mirror.scopes.items()
        return {scope: (len(blocks), sum(place.cost for place in blocks.values())) for scope, blocks in held}

    def describe_state(self) -> dict[str, Any]:
        """Whether it is connected, and if not why; since start failures by kind, and blocks that a server forgot."""
        return {
            "connected": self._index.connected,
            "last_error": self._link.error,
            "failures": dict(self._link.failures),
            "forgotten": self._index.forgotten,
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
        if place is None or self._blocks.writing(block):
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
            await self._link.quietly(self._blocks.remove([block], place))
            return Miss(MissReason.CORRUPT)
        except Gone:  # expired, evicted by the server or by another daemon, or dropped a moment ago
            await self._link.quietly(self._blocks.remove([block], place))
            return Miss(MissReason.LOST)
        except FAILURES as error:
            self._link.note(error)
            return Miss(MissReason.TIER_DOWN)
        self.counters.read_s += time.perf_counter() - began
        return Hit(found.header, place.nbytes)

    async def _read(self, block: BlockId, place: ix.Place, into: Sequence[memoryview]) -> rec.Record:
        with self._link.under_way.reading(place.nbytes):
            return await self._values.read(self._index.known(block), self._index.member(block), place, into)

    # -- put -----------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """Store a block. Durable is what the server has synced to its append-only file."""
        began = time.perf_counter()
        outcome = await self._put(block, header, payload, nbytes, durable)
        self.counters.evicted = self._blocks.evicted
        if isinstance(outcome, Stored):
            self.counters.stored += 1
            self.counters.bytes_written += nbytes
            self.counters.write_s += time.perf_counter() - began
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
        if self._blocks.writing(block):
            return Dropped(DropReason.IN_FLIGHT)
        if self._find(block) is not None:
            return Exists() if not durable or await self._blocks.synced_to_disk() else Dropped(DropReason.NOT_DURABLE)
        if ix.cost_of(nbytes) > self._capacity:
            return Dropped(DropReason.TOO_LARGE)
        return await self._blocks.put(block, header, payload, nbytes, durable)

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        """Write a block anew, which keeps its place in the order. It is absent meanwhile: nobody's bytes are uncounted.

        Of several daemons that want to, the first does; the others, and who finds it pinned, get ``IN_FLIGHT``.
        """
        began = time.perf_counter()
        place = self._find(block)
        if not self._usable:
            return Dropped(DropReason.TIER_DOWN)
        if place is None or self._blocks.writing(block):
            return Dropped(DropReason.IN_FLIGHT)
        outcome = await self._blocks.replace(block, place, header, payload, nbytes)
        self.counters.evicted = self._blocks.evicted
        if isinstance(outcome, Stored):
            self.counters.bytes_written += nbytes
            self.counters.write_s += time.perf_counter() - began
        return outcome

    # -- forgetting ----------------------------------------------------------------------------------------------------

    async def drop(self, block: BlockId) -> bool:
        """Forget a block, also one that is being written; whether it was there."""
        if self._blocks.give_up(block):
            return True
        if self._find(block) is None:
            return False
        return bool(await self._link.quietly(self._blocks.remove([block])))

    async def clear(self, scope: Scope) -> int:
        """Forget every block of a scope; how many there were."""
        blocks = [BlockId(scope, key) for key in self._index.mirror.scopes.get(scope, {})]
        self._blocks.give_up_all(scope)
        count = 0
        for first in range(0, len(blocks), _BATCH):
            count += await self._link.quietly(self._blocks.remove(blocks[first : first + _BATCH])) or 0
        return count

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
        for block in list(self._index.mirror.blocks()):
            place = self._find(block)
            if place is None or self._blocks.writing(block):
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
            fixed = fix and bool(await self._link.quietly(self._blocks.remove([block], place)))
            findings.append(Finding(what, self._names.record(self._index.member(block)), fixed))
        return findings
