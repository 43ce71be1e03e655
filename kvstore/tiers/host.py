"""The host tier: blocks in the arena, lent in place. Always there, and the only tier a client reads and writes
directly.

It is not a `Tier`: the tiers below keep copies of bytes, this one owns the memory that clients map. Allocation evicts
on demand, least valuable first, and only what nobody reads, nobody pinned and no lower tier is still being told of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import msgspec

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import InternalError
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.cost import recompute_cost
from kvstore.tiers.base import TierCounters, Usage
from kvstore.types import BlockHeader, BlockId, Extent, Scope

INDEX_BYTES = 1024
"""What one block costs beside its payload: its entry, its place in the order, its names. Headers come on top."""

_INDEX_SHARE = 32
"""One part in this many of the budget is set aside for the index."""


class HostBlock:
    """A block in the arena.

    Attributes
    ----------
    footprint : int
        Bytes of arena pages it occupies.
    refs : int
        Leases that read it now. It keeps its memory while there are any, even after it was dropped.
    dirty : int
        Lower tiers that have yet to be told of it.
    pin_until : float
        Monotonic time until which it may not be evicted.
    gone : bool
        No longer in the index; its memory goes back with the last reference.
    """

    __slots__ = (
        "dirty",
        "extents",
        "footprint",
        "gone",
        "header",
        "header_bytes",
        "id",
        "nbytes",
        "pin_until",
        "refs",
    )

    def __init__(
        self, block: BlockId, header_bytes: bytes, header: BlockHeader, nbytes: int, extents: tuple[Extent, ...]
    ):
        self.id = block
        self.header = header
        self.header_bytes = header_bytes
        self.nbytes = nbytes
        self.extents = extents
        self.footprint = sum(-(-e.nbytes // PAGE_BYTES) for e in extents) * PAGE_BYTES
        self.refs = 0
        self.dirty = 0
        self.pin_until = 0.0
        self.gone = False

    @property
    def index_bytes(self) -> int:
        """Bytes it costs beside its payload."""
        return INDEX_BYTES + len(self.header_bytes)


class HostTier:
    """Index and memory of the blocks in host RAM.

    Parameters
    ----------
    capacity : int
        Byte budget; arena and index together stay within it.
    slab_bytes, ahead_bytes : int
        See `Arena`.
    policy : EvictionPolicy
        Order in which blocks leave.
    """

    name = "host"

    def __init__(self, capacity: int, policy: EvictionPolicy[BlockId], slab_bytes: int, ahead_bytes: int) -> None:
        self.index_capacity = capacity // _INDEX_SHARE
        self.capacity = capacity
        self.arena = Arena(capacity - self.index_capacity, slab_bytes, ahead_bytes)
        self.policy = policy
        self.counters = TierCounters()
        self.index_bytes = 0
        self.used_bytes = 0
        self.leased_bytes = 0
        self.dirty_bytes = 0
        self.busy_bytes = 0
        self._pinned: set[HostBlock] = set()
        self._scopes: dict[Scope, dict[bytes, HostBlock]] = {}
        self._scope_bytes: dict[Scope, int] = {}
        self._detached: set[HostBlock] = set()
        self._lent: dict[Extent, tuple[Extent, ...]] = {}

    # -- finding -------------------------------------------------------------------------------------------------------

    def blocks(self, scope: Scope) -> dict[bytes, HostBlock]:
        """Blocks of one scope by key; to be read, not changed."""
        return self._scopes.get(scope, {})

    def get(self, block: BlockId) -> HostBlock | None:
        """The block if it is in memory."""
        return self._scopes.get(block.scope, {}).get(block.key)

    def touch(self, blocks: list[HostBlock]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        self.policy.touch([block.id for block in blocks])

    # -- memory --------------------------------------------------------------------------------------------------------

    def allocate(self, domain: str, nbytes: int, header_bytes: int = 0) -> tuple[Extent, ...] | None:
        """Memory for a block of at least one byte, evicting as needed; None if what could be evicted is not enough.

        The extents are on loan to the caller until it passes them to `insert` or gives them back with `free`.
        """
        index_need = INDEX_BYTES + header_bytes
        if nbytes > self.arena.capacity or index_need > self.index_capacity:
            return None
        if self.index_bytes + index_need > self.index_capacity:
            self._evict(None, bytes_needed=0, index_needed=self.index_bytes + index_need - self.index_capacity)
            if self.index_bytes + index_need > self.index_capacity:
                return None
        extents = self.arena.allocate(domain, nbytes)
        if extents is None:
            pages = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
            self._evict(domain, bytes_needed=pages - self.arena.free(domain))
            extents = self.arena.allocate(domain, nbytes)
        while extents is None and (movable := self.arena.movable(domain)) and self._evict(None, 1, slabs=movable):
            # Room can only come from other domains now: their slabs change hands once wholly free.
            extents = self.arena.allocate(domain, nbytes)
        if extents is not None:
            self.index_bytes += index_need
            self._lent[extents[0]] = extents
        return extents

    def charge_header(self, header_bytes: int) -> bool:
        """Count a header that became known only after `allocate`; whether the index had room for it."""
        over = self.index_bytes + header_bytes - self.index_capacity
        if over > 0:
            self._evict(None, bytes_needed=0, index_needed=over)
        if self.index_bytes + header_bytes > self.index_capacity:
            return False
        self.index_bytes += header_bytes
        return True

    def free(self, extents: tuple[Extent, ...], header_bytes: int = 0) -> None:
        """Give back memory that did not become a block."""
        del self._lent[extents[0]]
        self.index_bytes -= INDEX_BYTES + header_bytes
        self.arena.release(extents)

    def evictable(self, block: HostBlock, now: float) -> bool:
        """Whether a block may leave now."""
        return not block.refs and not block.dirty and block.pin_until <= now

    def _evict(
        self, domain: str | None, bytes_needed: int, index_needed: int = 0, slabs: set[int] | None = None
    ) -> int:
        """Evict blocks until so many bytes are free, or none if that is not possible; how many were evicted.

        Only blocks of `domain` if one is given, and only such as lie in `slabs` alone.
        """
        idle_bytes = self.used_bytes - self.busy_bytes
        if not idle_bytes or bytes_needed > idle_bytes:
            return 0  # without looking at each block: in a burst this is asked for every one that is offered
        now = time.monotonic()
        victims: list[HostBlock] = []
        for scope, key in self.policy.victims():
            if bytes_needed <= 0 and index_needed <= 0:
                break
            block = self._scopes[scope][key]
            if (
                self.evictable(block, now)
                and (domain is None or block.id.scope.domain == domain)
                and (slabs is None or all(extent.slab in slabs for extent in block.extents))
            ):
                victims.append(block)
                bytes_needed -= block.footprint
                index_needed -= block.index_bytes
        if bytes_needed > 0 or index_needed > 0:
            return 0
        for block in victims:
            self.remove(block, evicted=True)
        self.counters.evicted += len(victims)
        return len(victims)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def insert(self, block: HostBlock) -> None:
        """Make a block visible whose memory came from `allocate` and is filled."""
        index = self._scopes.setdefault(block.id.scope, {})
        if block.id.key in index:
            raise InternalError("host: a block was inserted twice under one key.")
        del self._lent[block.extents[0]]
        index[block.id.key] = block
        parent = BlockId(block.id.scope, block.header.parent) if block.header.parent else None
        self.policy.insert(block.id, block.nbytes, cost=recompute_cost(block.header, block.nbytes), parent=parent)
        self.used_bytes += block.footprint
        self._scope_bytes[block.id.scope] = self._scope_bytes.get(block.id.scope, 0) + block.nbytes

    def remove(self, block: HostBlock, *, evicted: bool = False) -> None:
        """Take a block out of the index. Its memory goes back now, or with its last reader or writer-behind."""
        scope = block.id.scope
        del self._scopes[scope][block.id.key]
        self._scope_bytes[scope] -= block.nbytes
        if not self._scopes[scope]:
            del self._scopes[scope], self._scope_bytes[scope]
        self.policy.remove(block.id, evicted=evicted)
        self._pinned.discard(block)
        block.gone = True
        if block.refs or block.dirty:
            self._detached.add(block)
        else:
            self._return(block)

    def acquire(self, blocks: Iterable[HostBlock]) -> None:
        """Note a reader of some blocks."""
        for block in blocks:
            if not block.refs:
                self.leased_bytes += block.footprint
                if not block.dirty:
                    self.busy_bytes += block.footprint
            block.refs += 1

    def unacquire(self, blocks: Iterable[HostBlock]) -> None:
        """Note that a reader of some blocks is done."""
        for block in blocks:
            block.refs -= 1
            if not block.refs:
                self.leased_bytes -= block.footprint
                self._settle(block)

    def soil(self, block: HostBlock) -> None:
        """Note that a lower tier has yet to be told of a block: it is kept until `clean`."""
        if not block.dirty:
            self.dirty_bytes += block.footprint
            if not block.refs:
                self.busy_bytes += block.footprint
        block.dirty += 1

    def clean(self, block: HostBlock) -> None:
        """Note that a lower tier has been told of a block, or has refused it."""
        block.dirty -= 1
        if not block.dirty:
            self.dirty_bytes -= block.footprint
            self._settle(block)

    def pin(self, block: HostBlock, until: float) -> None:
        """Keep a block from eviction until a monotonic time; a time that has passed ends the pin."""
        block.pin_until = until
        if until > time.monotonic():
            self._pinned.add(block)
        else:
            self._pinned.discard(block)

    def _settle(self, block: HostBlock) -> None:
        """Note that it is no longer read, or no longer dirty."""
        if block.refs or block.dirty:
            return
        self.busy_bytes -= block.footprint
        if block.gone:
            self._detached.discard(block)
            self._return(block)

    def _return(self, block: HostBlock) -> None:
        self.used_bytes -= block.footprint
        self.index_bytes -= block.index_bytes
        self.arena.release(block.extents)
        block.extents = ()

    # -- accounts ------------------------------------------------------------------------------------------------------

    def all_blocks(self) -> Iterator[HostBlock]:
        """Every block in the index."""
        for index in self._scopes.values():
            yield from index.values()

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, payload bytes) of each scope."""
        return {scope: (len(index), self._scope_bytes[scope]) for scope, index in self._scopes.items()}

    def usage(self) -> Usage:
        """Slabs and index against the budget."""
        blocks = sum(len(index) for index in self._scopes.values())
        return Usage(self.capacity, self.arena.total + self.index_bytes, blocks)

    def breakdown(self) -> dict[str, int]:
        """Bytes by what keeps them: leased, dirty (not yet in a lower tier), pinned, lent for writing, free."""
        now = time.monotonic()
        self._pinned = {block for block in self._pinned if block.pin_until > now and not block.gone}
        return {
            "blocks_bytes": self.used_bytes,
            "leased_bytes": self.leased_bytes,
            "dirty_bytes": self.dirty_bytes,
            "pinned_bytes": sum(block.footprint for block in self._pinned),
            "writing_bytes": self.arena.used() - self.used_bytes,
            "free": self.arena.capacity - self.arena.used() - self.arena.dropping,
        }

    def _every(self) -> Iterable[HostBlock]:
        yield from self.all_blocks()
        yield from self._detached

    def check(self) -> None:
        """Account for every byte; raises `InternalError` where something does not add up."""
        lent = [e for extents in self._lent.values() for e in extents]
        self.arena.check(lent + [e for block in self._every() for e in block.extents])
        used = sum(block.footprint for block in self._every())
        if used != self.used_bytes:
            raise InternalError(f"host: blocks occupy {used} bytes, counted are {self.used_bytes}.")
        if len(self.policy) != sum(1 for _ in self.all_blocks()):
            raise InternalError("host: the eviction policy does not hold exactly the blocks of the index.")
        if any(block.refs < 0 or block.dirty < 0 for block in self._every()):
            raise InternalError("host: a block was released more often than acquired.")
        leased = sum(block.footprint for block in self._every() if block.refs)
        dirty = sum(block.footprint for block in self._every() if block.dirty)
        busy = sum(block.footprint for block in self._every() if block.refs or block.dirty)
        if (leased, dirty, busy) != (self.leased_bytes, self.dirty_bytes, self.busy_bytes):
            raise InternalError("host: leased, dirty or busy bytes are miscounted.")
        if self.index_bytes > self.index_capacity:
            raise InternalError("host: the index exceeds its share of the budget.")


def encode_header(header: BlockHeader) -> bytes:
    """A block header as it travels."""
    return msgspec.msgpack.encode(header)
