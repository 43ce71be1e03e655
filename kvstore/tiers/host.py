"""The host tier: blocks in the arena, lent in place. Always there, and the only tier a client reads and writes
directly.

It is not a `Tier`: the tiers below keep copies of bytes, this one owns the memory that clients map. Allocation evicts
on demand, least valuable first, and only what nobody reads, nobody pinned and no lower tier is still being told of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from kvstore.arena import PAGE_BYTES, Arena
from kvstore.errors import InternalError
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.partitions import Facts, Partitions
from kvstore.eviction.pins import Pins
from kvstore.machine import INDEX_SHARE
from kvstore.tiers.base import TierCounters, Usage
from kvstore.tiers.host_block import INDEX_BYTES, HostBlock, footprint_of
from kvstore.types import BlockId, DropReason, Extent, Gone, Scope, TierCode
from kvstore.watcher import Watcher

DIRTY_SHARE = 0.5
"""While more of the memory than this waits to be written below, new blocks take free memory only: a flood of stores
would otherwise evict all that can be, which is what is used, and keep what it brought."""


class HostTier:
    """Index and memory of the blocks in host RAM.

    Parameters
    ----------
    capacity : int
        Byte budget; arena and index together stay within it.
    slab_bytes, ahead_bytes : int
        See `Arena`.
    policy : EvictionPolicy
        Order in which blocks leave, among those that no rule sets apart (`order`).
    pin_share : float
        The part of the arena that pins may keep.
    """

    name = "host"

    def __init__(
        self,
        capacity: int,
        policy: EvictionPolicy[BlockId],
        slab_bytes: int,
        ahead_bytes: int,
        pin_share: float = 0.5,
    ) -> None:
        self.index_capacity = capacity // INDEX_SHARE
        self.capacity = capacity
        self.arena = Arena(capacity - self.index_capacity, slab_bytes, ahead_bytes)
        self.order = Partitions(policy, self._facts)
        self.watcher = Watcher()
        self.counters = TierCounters()
        self.index_bytes = 0
        self.used_bytes = 0
        self.leased_bytes = 0
        self.dirty_bytes = 0
        self.busy_bytes = 0
        self.pins = Pins(self.order, lambda: int(pin_share * self.arena.capacity))
        self._scopes: dict[Scope, dict[bytes, HostBlock]] = {}
        self._scope_bytes: dict[Scope, int] = {}
        self._detached: set[HostBlock] = set()
        self._lent: dict[Extent, tuple[tuple[Extent, ...], Scope | None]] = {}
        """What is on loan, by its first extent, and whom it was charged to."""

    # -- finding -------------------------------------------------------------------------------------------------------

    def blocks(self, scope: Scope) -> dict[bytes, HostBlock]:
        """Blocks of one scope by key, without those that are too old; to be read, not changed."""
        if self.order.expiring:
            self.expire(scope)
        return self._scopes.get(scope, {})

    def get(self, block: BlockId) -> HostBlock | None:
        """The block if it is in memory, and not too old."""
        if self.order.expiring:
            self.expire(block.scope)
        return self._scopes.get(block.scope, {}).get(block.key)

    def touch(self, blocks: list[HostBlock]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        self.order.touch([block.id for block in blocks])

    def expire(self, scope: Scope | None = None) -> None:
        """Forget what has not been used for longer than its rule allows. A pin does not make a block younger."""
        for item in self.order.expired(scope):
            self.order.count_expired(item)
            self.remove(self._scopes[item.scope][item.key], Gone.EXPIRED)

    # -- memory --------------------------------------------------------------------------------------------------------

    def allocate(
        self, domain: str, nbytes: int, header_bytes: int = 0, scope: Scope | None = None, *, new: bool = False
    ) -> tuple[Extent, ...] | None:
        """Memory for a block of at least one byte, evicting as needed; None if what could be evicted is not enough.

        The extents are on loan to the caller until it passes them to `insert` or gives them back with `free`. With a
        scope they are charged to it from now on, and its quota decides who gives way. For a block that is `new` below
        nothing is evicted while `DIRTY_SHARE` of the memory waits to be written there.
        """
        index_need = INDEX_BYTES + header_bytes
        if nbytes > self.arena.capacity or index_need > self.index_capacity:
            return None
        if self.index_bytes + index_need > self.index_capacity:
            missing = self.index_bytes + index_need - self.index_capacity
            self._evict(None, bytes_needed=0, index_needed=missing, scope=scope)
            if self.index_bytes + index_need > self.index_capacity:
                return None
        pages = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        over = 0 if scope is None else self.order.over(scope, pages)
        if over > 0 and not self._evict(None, bytes_needed=0, scope=scope, over=over):
            return None
        extents = self.arena.allocate(domain, nbytes)
        if extents is None and new and self.dirty_bytes > DIRTY_SHARE * self.arena.capacity:
            return None
        if extents is None:
            self._evict(domain, bytes_needed=pages - self.arena.free(domain), scope=scope)
            extents = self.arena.allocate(domain, nbytes)
        while (
            extents is None
            and (movable := self.arena.movable(domain))
            and self._evict(None, 1, slabs=movable, scope=scope)
        ):
            # Room can only come from other domains now: their slabs change hands once wholly free.
            extents = self.arena.allocate(domain, nbytes)
        if extents is not None:
            self.index_bytes += index_need
            self._lent[extents[0]] = extents, scope
            if scope is not None:
                self.order.charge(scope, footprint_of(extents))
        return extents

    def why_full(self, scope: Scope, nbytes: int) -> DropReason:
        """Why `allocate` has just refused: the limit of the scope, or the tier."""
        return DropReason.OVER_LIMIT if self.order.over(scope, nbytes) > 0 else DropReason.HOST_FULL

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
        _, scope = self._lent.pop(extents[0])
        if scope is not None:
            self.order.discharge(scope, footprint_of(extents))
        self.index_bytes -= INDEX_BYTES + header_bytes
        self.arena.release(extents)

    def evictable(self, block: HostBlock, now: float) -> bool:
        """Whether a block may leave now."""
        return not block.refs and not block.dirty and self.pins.until(block.id) <= now

    def _evict(
        self,
        domain: str | None,
        bytes_needed: int,
        index_needed: int = 0,
        slabs: set[int] | None = None,
        scope: Scope | None = None,
        over: int = 0,
    ) -> int:
        """Evict blocks until so many bytes are free, or none if that is not possible; how many were evicted.

        Only blocks of `domain` if one is given, and only such as lie in `slabs` alone. `over` bytes come from the
        partition of `scope`.
        """
        idle_bytes = self.used_bytes - self.busy_bytes
        if not idle_bytes or bytes_needed > idle_bytes:
            return 0  # without looking at each block: in a burst this is asked for every one that is offered
        now = time.monotonic()
        self.pins.end_due()

        def size(item: BlockId) -> int:
            block = self._scopes[item.scope][item.key]
            if (
                not self.evictable(block, now)
                or (domain is not None and item.scope.domain != domain)
                or (slabs is not None and not all(extent.slab in slabs for extent in block.extents))
            ):
                return 0
            return block.footprint

        victims: list[HostBlock] = []
        candidates = self.order.victims(scope, over, size)
        while bytes_needed > 0 or index_needed > 0 or over > 0:
            if (found := next(candidates, None)) is None:
                return 0
            item, nbytes = found
            block = self._scopes[item.scope][item.key]
            victims.append(block)
            bytes_needed -= nbytes
            over -= nbytes
            index_needed -= block.index_bytes
        self.order.count_evicted(scope, (block.id for block in victims))
        for block in victims:
            self.remove(block, Gone.EVICTED)
        self.counters.evicted += len(victims)
        return len(victims)

    # -- blocks --------------------------------------------------------------------------------------------------------

    def insert(self, block: HostBlock) -> None:
        """Make a block visible whose memory came from `allocate` and is filled."""
        index = self._scopes.setdefault(block.id.scope, {})
        if block.id.key in index:
            raise InternalError("host: a block was inserted twice under one key.")
        _, charged = self._lent.pop(block.extents[0])
        index[block.id.key] = block
        if charged is None:
            self.order.charge(block.id.scope, block.footprint)
        nbytes, cost, parent = block.facts()
        self.order.insert(block.id, nbytes, cost=cost, parent=parent)
        self.used_bytes += block.footprint
        self._scope_bytes[block.id.scope] = self._scope_bytes.get(block.id.scope, 0) + block.nbytes
        self.watcher.stored(TierCode.HOST, block.id, block.nbytes, block.header.parent)

    def remove(self, block: HostBlock, reason: Gone = Gone.DROPPED) -> None:
        """Take a block out of the index. Its memory goes back now, or with its last reader or writer-behind."""
        scope = block.id.scope
        del self._scopes[scope][block.id.key]
        self._scope_bytes[scope] -= block.nbytes
        if not self._scopes[scope]:
            del self._scopes[scope], self._scope_bytes[scope]
        self.order.remove(block.id, evicted=reason is Gone.EVICTED)
        self.watcher.removed(TierCode.HOST, block.id, reason)
        self.order.discharge(scope, block.footprint)
        self.pins.end(block.id)
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
            self.order.hold(block.id)
        block.dirty += 1

    def clean(self, block: HostBlock) -> None:
        """Note that a lower tier has been told of a block, or has refused it."""
        block.dirty -= 1
        if not block.dirty:
            self.dirty_bytes -= block.footprint
            if not block.gone:
                self.order.release(block.id)
            self._settle(block)

    def pin(self, block: HostBlock, until: float) -> bool:
        """Keep a block from eviction until a monotonic time; a time that has passed ends the pin.

        False if that many bytes are pinned already that the tier could no longer do its work.
        """
        return self.pins.pin(block.id, block.footprint, until)

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
        self.pins.end_old()
        return {
            "blocks_bytes": self.used_bytes,
            "leased_bytes": self.leased_bytes,
            "dirty_bytes": self.dirty_bytes,
            "pinned_bytes": self.pins.nbytes,
            "writing_bytes": self.arena.used() - self.used_bytes,
            "free": self.arena.capacity - self.arena.used() - self.arena.dropping,
        }

    def _facts(self, item: BlockId) -> Facts:
        return self._scopes[item.scope][item.key].facts()

    def _every(self) -> Iterable[HostBlock]:
        yield from self.all_blocks()
        yield from self._detached

    def check(self) -> None:
        """Account for every byte; raises `InternalError` where something does not add up."""
        lent = [e for extents, _ in self._lent.values() for e in extents]
        self.arena.check(lent + [e for block in self._every() for e in block.extents])
        used = sum(block.footprint for block in self._every())
        if used != self.used_bytes:
            raise InternalError(f"host: blocks occupy {used} bytes, counted are {self.used_bytes}.")
        if len(self.order) != sum(1 for _ in self.all_blocks()):
            raise InternalError("host: the eviction policy does not hold exactly the blocks of the index.")
        if wrong := self.order.check():
            raise InternalError(f"host: {wrong}.")
        if wrong := self.pins.check():
            raise InternalError(f"host: {wrong}.")
        if any(block.refs < 0 or block.dirty < 0 for block in self._every()):
            raise InternalError("host: a block was released more often than acquired.")
        leased = sum(block.footprint for block in self._every() if block.refs)
        dirty = sum(block.footprint for block in self._every() if block.dirty)
        busy = sum(block.footprint for block in self._every() if block.refs or block.dirty)
        if (leased, dirty, busy) != (self.leased_bytes, self.dirty_bytes, self.busy_bytes):
            raise InternalError("host: leased, dirty or busy bytes are miscounted.")
        if self.index_bytes > self.index_capacity:
            raise InternalError("host: the index exceeds its share of the budget.")
