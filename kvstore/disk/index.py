"""What is on the disk, what it takes of the budget, and what leaves first. Memory only; used by the event loop alone.

Space is accounted in three steps that keep the budget at every instant, whatever fails between them: `reserve` charges
a new file before it exists and names the blocks that leave for it; the I/O thread removes those and only then creates
the file; `settle` books what really happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.disk.directory import FIXED_COST
from kvstore.disk.format import ALIGN, ENTRY_COST, Shape
from kvstore.eviction.base import EvictionPolicy
from kvstore.eviction.cost import recompute_cost
from kvstore.eviction.partitions import Facts, Partitions
from kvstore.eviction.pins import Pins
from kvstore.types import BlockHeader, BlockId, Gone, Scope, TierCode
from kvstore.watcher import Watcher

_UNKNOWN = BlockHeader()
"""Of a block found at start nothing is known but its name; its header is in its file."""

NAMESPACE_COST = 2 * (ALIGN + ENTRY_COST)
"""What a namespace's directory takes, and its share of the domain's."""


@dataclass(slots=True)
class Space:
    """The blocks of one scope, files being written into it, and what its description takes of the budget."""

    blocks: dict[bytes, Shape] = field(default_factory=dict)
    nbytes: int = 0
    writers: int = 0
    description: int = 0

    @property
    def overhead(self) -> int:
        """What goes with the directory when the last block has left."""
        return NAMESPACE_COST + self.description


@dataclass(slots=True)
class Reading:
    """Reads of one block that are under way. What is removed meanwhile is paid back when the last of them ends."""

    count: int = 0
    gone: bool = False
    owed: int = 0


Removed = tuple[BlockId, Shape]


@dataclass(slots=True)
class Departure:
    """What leaves the disk together. The index has forgotten it already; its bytes count until `settle`."""

    blocks: list[Removed] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    nbytes: int = 0


@dataclass(slots=True)
class Reservation:
    """Bytes of the budget for one new file, for its directory if that is new, and what leaves for them."""

    scope: Scope
    directory: int
    charged: int
    cost: int
    leaving: Departure


class Index:
    """Scope → key → shape, with the sum of all costs.

    Parameters
    ----------
    capacity : int
        Byte budget.
    policy : EvictionPolicy
        The order of eviction among blocks stored or used since start. Blocks found at start and not used since leave
        before them, until a rule sets some apart: then they join the order as soon as their last use is known.
    pin_share : float
        The part of the capacity that pins may keep.
    """

    def __init__(self, capacity: int, policy: EvictionPolicy[BlockId], pin_share: float = 0.5) -> None:
        self.capacity = capacity
        self.used = FIXED_COST
        self.count = 0
        self.evicted = 0
        self.spaces: dict[Scope, Space] = {}
        self.order = Partitions(policy, self._facts, self._cold_blocks)
        self.order.on_arranged = self._join_order
        self.watcher = Watcher()
        self._hot: set[BlockId] = set()
        self._cold: list[tuple[int, BlockId]] | None = []
        self._cold_at = 0
        self.pins = Pins(self.order, lambda: int(pin_share * self.capacity))
        self.open_reads = 0
        self._reads: dict[BlockId, Reading] = {}
        self.quarantine: dict[str, int] = {}
        self.leftovers: dict[str, int] = {}

    # -- finding -------------------------------------------------------------------------------------------------------

    def find(self, block: BlockId) -> Shape | None:
        """Shape of a block that is here."""
        space = self.spaces.get(block.scope)
        return None if space is None else space.blocks.get(block.key)

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes of the budget) of each scope."""
        return {scope: (len(s.blocks), s.nbytes + s.overhead) for scope, s in self.spaces.items()}

    def total(self) -> int:
        """What `used` must be while nothing is being read, written or removed."""
        blocks = sum(shape.cost for space in self.spaces.values() for shape in space.blocks.values())
        overhead = sum(space.overhead for space in self.spaces.values())
        return FIXED_COST + blocks + overhead + sum(self.quarantine.values()) + sum(self.leftovers.values())

    # -- found at start ------------------------------------------------------------------------------------------------

    def adopt(self, found: dict[Scope, Space], quarantine: dict[str, int]) -> None:
        """Take over what was found at start. Its order is unknown until `set_cold`."""
        self.spaces, self.quarantine = found, quarantine
        self.count = sum(len(space.blocks) for space in found.values())
        self.used += sum(space.nbytes + space.overhead for space in found.values()) + sum(quarantine.values())
        for scope, space in found.items():
            self.order.charge(scope, space.nbytes)
        self._cold = None

    def set_cold(self, order: list[tuple[int, BlockId]]) -> None:
        """Say when the blocks found at start were last used, in nanoseconds since the epoch, oldest first."""
        self._cold, self._cold_at = order, 0
        self._join_order()

    def _join_order(self) -> None:
        """Where there are rules every block is in its partition's order, at its age."""
        if not self.order.ruled or not self._cold:
            return
        began = time.monotonic() - time.time()  # a clock that was set back makes blocks older, and a miss
        for used_at, block in self._cold:
            if self.is_cold(block):
                shape = self.spaces[block.scope].blocks[block.key]
                self._order(block, shape, used_at=used_at / 1e9 + began)
        self._cold, self._cold_at = [], 0
        self.order.sort_uses()

    # -- coming --------------------------------------------------------------------------------------------------------

    def reserve(self, scope: Scope, cost: int) -> Reservation | None:
        """Charge a file that is about to be written and choose what leaves for it; None if not enough may leave."""
        directory = 0 if scope in self.spaces else NAMESPACE_COST
        leaving = self.evict(
            self.used + cost + directory - self.capacity, keep=scope, over=self.order.over(scope, cost)
        )
        if leaving is None:
            return None
        self.spaces.setdefault(scope, Space()).writers += 1
        charged = max(0, cost + directory - leaving.nbytes)
        self.used += charged
        self.order.charge(scope, cost)
        return Reservation(scope, directory, charged, cost, leaving)

    def settle(self, reservation: Reservation, kept: int, failed: Sequence[Removed] = ()) -> Departure:
        """Book the end of a write.

        Parameters
        ----------
        reservation : Reservation
            What `reserve` gave.
        kept : int
            Bytes of the file that are on the disk now; 0 if it was not written.
        failed : sequence of (BlockId, Shape)
            Blocks of `reservation.leaving` that could not be removed. They are back in the index.

        Returns
        -------
        Departure
            The namespace, if nothing is left in it.
        """
        self.used += kept + reservation.directory - reservation.charged
        self.order.discharge(reservation.scope, reservation.cost)
        self.evicted -= len(failed)
        self.depart(reservation.leaving, failed)
        empty = Departure()
        space = self.spaces[reservation.scope]
        space.writers -= 1
        if not space.blocks and not space.writers:
            self._close(reservation.scope, empty)
        return empty

    def insert(self, block: BlockId, shape: Shape, header: BlockHeader = _UNKNOWN) -> None:
        """Make a block findable. Its bytes were charged before."""
        space = self.spaces[block.scope]
        space.blocks[block.key] = shape
        space.nbytes += shape.cost
        self.count += 1
        self.order.charge(block.scope, shape.cost)
        self._order(block, shape, header)
        self.watcher.stored(TierCode.DISK, block, shape.nbytes, header.parent)

    def exchange(self, block: BlockId, shape: Shape) -> Departure:
        """Have a block that is here be of another shape, whose bytes were charged before; what leaves for that.

        It keeps its place in the order, its pin and its namespace. Nobody is told: it was here and still is.
        """
        space = self.spaces[block.scope]
        old = space.blocks[block.key]
        space.blocks[block.key] = shape
        space.nbytes += shape.cost - old.cost
        self.order.charge(block.scope, shape.cost)
        self.order.discharge(block.scope, old.cost)
        self.pins.resize(block, shape.cost)
        leaving = Departure([(block, old)])
        reading = self._reads.pop(block, None)
        if reading is None:
            leaving.nbytes = old.cost
        else:
            reading.gone, reading.owed = True, old.cost
        return leaving

    def _order(
        self, block: BlockId, shape: Shape, header: BlockHeader = _UNKNOWN, used_at: float | None = None
    ) -> None:
        self._hot.add(block)
        parent = BlockId(block.scope, header.parent) if header.parent else None
        cost = recompute_cost(header, shape.nbytes)
        self.order.insert(block, shape.nbytes, cost=cost, parent=parent, used_at=used_at)

    def _facts(self, block: BlockId) -> Facts:
        nbytes = self.spaces[block.scope].blocks[block.key].nbytes
        return nbytes, recompute_cost(_UNKNOWN, nbytes), None

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        known = [block for block in blocks if self.find(block) is not None]
        for block in known:
            if block not in self._hot:
                self._order(block, self.spaces[block.scope].blocks[block.key])
        self.order.touch(known)

    # -- staying -------------------------------------------------------------------------------------------------------

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction until a monotonic time; whether it is here, and pins had room for it."""
        shape = self.find(block)
        return shape is not None and self.pins.pin(block, shape.cost, until)

    def begin_read(self, block: BlockId) -> Reading:
        """Keep a block's bytes charged, and it from eviction, until `end_read`."""
        reading = self._reads.setdefault(block, Reading())
        reading.count += 1
        self.open_reads += 1
        return reading

    def end_read(self, block: BlockId, reading: Reading) -> None:
        """The end of a read; pays back what was removed under it."""
        reading.count -= 1
        self.open_reads -= 1
        if reading.count:
            return
        if reading.gone:
            self.used -= reading.owed
        else:
            del self._reads[block]

    def _may_leave(self, block: BlockId, now: float) -> bool:
        return block not in self._reads and self.pins.until(block) <= now

    # -- leaving -------------------------------------------------------------------------------------------------------

    def evict(self, need: int, keep: Scope | None = None, over: int = 0) -> Departure | None:
        """Choose blocks of at least `need` bytes and forget them; None, and nothing forgotten, if too few may go.

        The directory of the scope `keep`, for which it is done, stays even if its last block goes; `over` bytes come
        from its partition.
        """
        leaving, chosen = Departure(), []
        now = time.monotonic()
        self.pins.end_due()

        def size(block: BlockId) -> int:
            return self.spaces[block.scope].blocks[block.key].cost if self._may_leave(block, now) else 0

        victims = self.order.victims(keep, over, size)
        while need > 0 or over > 0:
            if (found := next(victims, None)) is None:
                return None
            block, nbytes = found
            chosen.append(block)
            need -= nbytes
            over -= nbytes
        self.order.count_evicted(keep, chosen)
        for block in chosen:
            self._forget(block, leaving, keep, Gone.EVICTED)
        self.evicted += len(chosen)
        return leaving

    def forget(self, blocks: Iterable[BlockId], reason: Gone = Gone.DROPPED) -> Departure:
        """Make blocks unfindable; those that were here leave the disk together."""
        leaving = Departure()
        for block in blocks:
            if self.find(block) is not None:
                self._forget(block, leaving, None, reason)
        return leaving

    def forget_damaged(self, block: BlockId, shape: Shape) -> tuple[Departure, Reading]:
        """Make a block unfindable whose file is damaged, unless it has a file of another shape by now.

        Returns
        -------
        Departure
            With all bytes of the file, also where others read it: it is moved, and not gone with the last of them.
        Reading
            Theirs.
        """
        reading = self._reads.get(block, Reading())
        if self.find(block) != shape:
            return Departure(), Reading()
        leaving = self.forget([block], Gone.CORRUPT)
        leaving.nbytes += reading.owed
        reading.owed = 0
        return leaving, reading

    def depart(self, departure: Departure, failed: Sequence[Removed] = ()) -> None:
        """Pay back what has left the disk, and take back what could not be removed."""
        self.used -= departure.nbytes
        for block, shape in failed:
            if block.scope not in self.spaces:
                self.spaces[block.scope] = Space()
                self.used += NAMESPACE_COST
            self.used += shape.cost
            self.insert(block, shape)

    def _forget(self, block: BlockId, leaving: Departure, keep: Scope | None, reason: Gone) -> None:
        self.pins.end(block)
        space = self.spaces[block.scope]
        shape = space.blocks.pop(block.key)
        space.nbytes -= shape.cost
        self.count -= 1
        if block in self._hot:
            self._hot.remove(block)
            self.order.remove(block, evicted=reason is Gone.EVICTED)
        self.order.discharge(block.scope, shape.cost)
        reading = self._reads.pop(block, None)
        if reading is None:
            leaving.nbytes += shape.cost
        else:
            reading.gone, reading.owed = True, shape.cost
        leaving.blocks.append((block, shape))
        self.watcher.removed(TierCode.DISK, block, reason)
        if not space.blocks and not space.writers and block.scope != keep:
            self._close(block.scope, leaving)

    def _close(self, scope: Scope, leaving: Departure) -> None:
        leaving.scopes.append(scope)
        leaving.nbytes += self.spaces.pop(scope).overhead

    def _cold_blocks(self) -> Iterator[BlockId]:
        """Blocks found at start and not used since. Those that no longer are such are skipped, never searched for."""
        if self._cold is None:  # the order is still being found out
            for scope, space in self.spaces.items():
                for key in space.blocks:
                    block = BlockId(scope, key)
                    if block not in self._hot:
                        yield block
            return
        while self._cold_at < len(self._cold) and not self.is_cold(self._cold[self._cold_at][1]):
            self._cold_at += 1
        if self._cold_at == len(self._cold):
            self._cold, self._cold_at = [], 0
        for at in range(self._cold_at, len(self._cold)):
            if self.is_cold(self._cold[at][1]):
                yield self._cold[at][1]

    def is_cold(self, block: BlockId) -> bool:
        """Whether a block was found at start and has not been used since."""
        return block not in self._hot and self.find(block) is not None
