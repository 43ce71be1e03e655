"""The GPU tier: copies, in the memory of one GPU, of blocks that are in host memory, lent in place.

It is a cache of host memory and never the only copy: a block leaves it when it leaves the host tier, which it is told
as a `Watcher`. So nothing above or below has to know of it, and losing all of it costs nothing but speed.

A copy lies in one piece, so that a kernel needs one address. Allocation evicts on demand, least valuable first, and
only what nobody reads. Like the host tier it is no `Tier`: it lends memory instead of copying bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from kvstore.arena import PAGE_BYTES
from kvstore.errors import InternalError
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.cost import recompute_cost
from kvstore.eviction.partitions import Facts, Partitions
from kvstore.gpu_memory import DevicePool, DeviceSlab
from kvstore.tiers.base import TierCounters, Usage
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockId, Extent, Gone, TierCode
from kvstore.watcher import Watcher

MOST_EVICTED = 8
"""To find room in one piece, copies of at most so many times a block's bytes are given up."""


class GpuBlock:
    """A copy in GPU memory.

    Attributes
    ----------
    extent : Extent
        Where it lies; its slab is one of GPU memory.
    refs : int
        Leases that read it now. It keeps its memory while there are any, even after it was forgotten.
    gone : bool
        No longer in the index; its memory goes back with the last reference.
    """

    __slots__ = ("extent", "facts", "footprint", "gone", "id", "refs")

    def __init__(self, block: HostBlock, extent: Extent) -> None:
        self.id = block.id
        self.extent = extent
        self.footprint = -(-extent.nbytes // PAGE_BYTES) * PAGE_BYTES
        parent = BlockId(block.id.scope, block.header.parent) if block.header.parent else None
        self.facts: Facts = block.nbytes, recompute_cost(block.header, block.nbytes), parent
        self.refs = 0
        self.gone = False


class GpuTier(Watcher):
    """Index of the copies in GPU memory.

    Parameters
    ----------
    pool : DevicePool
        The memory.
    policy : EvictionPolicy
        Order in which copies leave.
    """

    name = "gpu"

    def __init__(self, pool: DevicePool, policy: EvictionPolicy[BlockId]) -> None:
        self.pool = pool
        self.counters = TierCounters()
        self.order = Partitions(policy, lambda item: self._blocks[item].facts)
        self.leased_bytes = 0
        self._blocks: dict[BlockId, GpuBlock] = {}
        self._detached: set[GpuBlock] = set()
        self._lent: set[Extent] = set()

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, block: BlockId) -> GpuBlock | None:
        """The copy of a block, if there is one."""
        return self._blocks.get(block)

    def lend(self, blocks: Mapping[int, HostBlock]) -> dict[int, GpuBlock]:
        """Note a reader of the copies there are of one prompt's blocks, which are given and answered by index."""
        found: dict[int, GpuBlock] = {}
        for index, block in blocks.items():
            copy = self._blocks.get(block.id)
            if copy is not None:
                found[index] = copy
                self.leased_bytes += 0 if copy.refs else copy.footprint
                copy.refs += 1
        self.order.touch([copy.id for copy in found.values()])
        self.counters.hits += len(found)
        self.counters.misses += len(blocks) - len(found)
        self.counters.bytes_read += sum(copy.extent.nbytes for copy in found.values())
        return found

    def give_back(self, copies: Iterable[GpuBlock]) -> None:
        """Note that a reader of some copies is done."""
        for copy in copies:
            copy.refs -= 1
            if not copy.refs:
                self.leased_bytes -= copy.footprint
                if copy.gone:
                    self._detached.discard(copy)
                    self.pool.release([copy.extent])

    def slab(self, slab_id: int, domain: str) -> DeviceSlab | None:
        """A slab, for somebody of this trust domain."""
        slab = self.pool.slab(slab_id)
        return slab if slab is not None and slab.domain == domain else None

    # -- filling -------------------------------------------------------------------------------------------------------

    def allocate(self, domain: str, nbytes: int) -> Extent | None:
        """Room for a copy in one piece, evicting as needed; None if that is not possible.

        It is on loan to the caller until it passes it to `insert` or gives it back with `free`.
        """
        if nbytes > self.pool.slab_bytes:
            return None
        room = self.pool.allocate(domain, nbytes, split=False)
        leaving = iter(()) if room is not None else iter(self._may_leave(domain, MOST_EVICTED * nbytes))
        while room is None and (victim := next(leaving, None)) is not None:
            self.forget(victim, evicted=True)
            room = self.pool.allocate(domain, nbytes, split=False)
        if room is None:
            return None
        self._lent.add(room[0])
        return room[0]

    def _may_leave(self, domain: str, nbytes: int) -> list[BlockId]:
        """Copies that may be evicted, in order, of about so many bytes together."""

        def size(item: BlockId) -> int:
            copy = self._blocks[item]
            return 0 if copy.refs or item.scope.domain != domain else copy.footprint

        left = [nbytes]

        def wanted(victim: tuple[BlockId, int]) -> bool:
            left[0] -= victim[1]
            return left[0] > -victim[1]

        return [item for item, _ in takewhile(wanted, self.order.victims(None, 0, size))]

    def free(self, extent: Extent) -> None:
        """Give back room that did not become a copy."""
        self._lent.remove(extent)
        self.pool.release([extent])

    def insert(self, block: HostBlock, extent: Extent) -> None:
        """Make a copy readable that is complete in room from `allocate`."""
        if block.id in self._blocks or block.gone:
            raise InternalError("gpu: a copy of a block that has one, or is no longer in host memory.")
        self._lent.remove(extent)
        copy = self._blocks[block.id] = GpuBlock(block, extent)
        nbytes, cost, parent = copy.facts
        self.order.insert(copy.id, nbytes, cost=cost, parent=parent)
        self.counters.stored += 1
        self.counters.bytes_written += nbytes

    # -- forgetting ----------------------------------------------------------------------------------------------------

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """A block that left host memory leaves here, too."""
        if tier is TierCode.HOST and block in self._blocks:
            self.forget(block, evicted=reason is Gone.EVICTED)

    def forget(self, block: BlockId, *, evicted: bool = False) -> None:
        """Take a copy out of the index. Its memory goes back now, or with its last reader."""
        copy = self._blocks.pop(block)
        self.order.remove(block, evicted=evicted)
        self.counters.evicted += evicted
        copy.gone = True
        if copy.refs:
            self._detached.add(copy)
        else:
            self.pool.release([copy.extent])

    def clear(self) -> None:
        """Forget all copies."""
        for block in list(self._blocks):
            self.forget(block)

    # -- accounts ------------------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """What is taken of the GPU, which is all of the budget from the start, and copies in it."""
        return Usage(self.pool.capacity, self.pool.capacity, len(self._blocks))

    def breakdown(self) -> dict[str, Any]:
        """Bytes by what keeps them."""
        writing = sum(-(-extent.nbytes // PAGE_BYTES) * PAGE_BYTES for extent in self._lent)
        used = self.pool.used()
        return {
            "blocks_bytes": used - writing,
            "leased_bytes": self.leased_bytes,
            "writing_bytes": writing,
            "free": self.pool.capacity - used,
        }

    def check(self) -> None:
        """Account for every byte; raises `InternalError` where something does not add up."""
        every = [*self._blocks.values(), *self._detached]
        self.pool.check([*self._lent, *(copy.extent for copy in every)])
        if len(self.order) != len(self._blocks):
            raise InternalError("gpu: the eviction policy does not hold exactly the copies of the index.")
        if sum(copy.footprint for copy in every if copy.refs) != self.leased_bytes:
            raise InternalError("gpu: leased bytes are miscounted.")
        if any(copy.refs < 0 or (copy.gone and not copy.refs) for copy in every):
            raise InternalError("gpu: a copy was released more often than lent, or kept though nobody reads it.")
