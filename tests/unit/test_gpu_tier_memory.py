"""The GPU tier over ordinary memory: never the only copy, never a wrong byte, never more than its budget."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.arena import PAGE_BYTES
from kvstore.errors import ConfigError, DeviceUnavailable, InternalError
from kvstore.eviction import make_policy
from kvstore.gpu_desk import GpuDesk, open_tier
from kvstore.gpu_memory import DevicePool, slab_size
from kvstore.leases import Ledger, Session
from kvstore.settings import Gpu
from kvstore.testing import device as ordinary
from kvstore.tiers.gpu import GpuBlock, GpuTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockHeader, BlockId, Scope
from kvstore.watcher import Watchers

A, B = Scope("uid-1", b"a" * 32), Scope("uid-2", b"b" * 32)
SLAB = 8 * PAGE_BYTES
SLABS = 3


class World:
    """Host memory, and a GPU that is ordinary memory."""

    def __init__(self, folder: Path | None = None, slabs: int = SLABS) -> None:
        self.host = HostTier(2 << 20, make_policy("lru"), 256 * 1024, 0)
        self.memory = ordinary.OrdinaryMemory(folder)
        self.tier = GpuTier(DevicePool(self.memory.take(slabs, SLAB), SLAB), make_policy("lru"))
        self.host.watcher = Watchers(self.tier)

    def put(self, number: int, nbytes: int = 2 * PAGE_BYTES, scope: Scope = A) -> HostBlock:
        """A block in host memory, of bytes that only it has."""
        block_id = BlockId(scope, hashlib.sha256(str(number).encode()).digest())
        extents = self.host.allocate(scope.domain, nbytes)
        assert extents is not None
        right = self.right(block_id, nbytes)
        for view in self.host.arena.views(extents):
            view[:], right = right[: len(view)], right[len(view) :]
        block = HostBlock(block_id, b"", BlockHeader(), nbytes, extents)
        self.host.insert(block)
        return block

    @staticmethod
    def right(block: BlockId, nbytes: int) -> bytes:
        """What a block has to hold."""
        return hashlib.shake_128(block.scope.ns + block.key).digest(nbytes)

    def copy(self, block: HostBlock) -> bool:
        """As the daemon copies, at once; whether there was room."""
        extent = self.tier.allocate(block.id.scope.domain, block.nbytes)
        if extent is None:
            return False
        self.memory.copy(self.host.arena.views(block.extents), self.address(extent))
        self.tier.insert(block, extent)
        return True

    def address(self, extent: Any) -> int:
        """Where an extent lies."""
        slab = self.tier.pool.slab(extent.slab)
        assert slab is not None
        return slab.address + extent.offset

    def read(self, copy: GpuBlock) -> bytes:
        """As a client reads: through the slab's handle."""
        slab = self.tier.pool.slab(copy.extent.slab)
        assert slab is not None
        mapped = ordinary.OrdinaryImports().open(slab.handle, slab.nbytes)
        return bytes(mapped[copy.extent.offset : copy.extent.offset + copy.extent.nbytes])

    def close(self) -> None:
        """Look whether everything adds up, at the end."""
        self.tier.check()
        self.host.check()
        self.host.arena.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


# -- the index ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_block_and_is_found_by_its_id(world: World) -> None:
    block = world.put(1, 3 * PAGE_BYTES - 100)
    assert world.tier.lend({0: block}) == {}
    assert world.copy(block)
    copies = world.tier.lend({4: block, 7: world.put(2)})
    assert list(copies) == [4]
    assert world.read(copies[4]) == world.right(block.id, block.nbytes)
    assert world.tier.counters.hits == 1
    assert world.tier.counters.misses == 2
    world.tier.give_back(copies.values())


def test_it_evicts_on_demand_the_least_used_and_never_what_is_lent(world: World) -> None:
    blocks = [world.put(number) for number in range(SLABS * 4)]  # four fill a slab
    assert all(map(world.copy, blocks))
    lent = world.tier.lend({0: blocks[0], 1: blocks[5]})
    more = [world.put(100 + number) for number in range(SLABS * 4)]
    assert [world.copy(block) for block in more].count(True) == SLABS * 4
    assert [block for block in blocks if world.tier.get(block.id)] == [blocks[0], blocks[5]]
    assert world.tier.counters.evicted == SLABS * 8 - SLABS * 4
    for index, block in ((0, blocks[0]), (1, blocks[5])):
        assert world.read(lent[index]) == world.right(block.id, block.nbytes)
    world.tier.give_back(lent.values())


def test_all_lent_is_no_room_and_no_eviction(world: World) -> None:
    blocks = [world.put(number) for number in range(SLABS * 4)]
    assert all(map(world.copy, blocks))
    lent = world.tier.lend(dict(enumerate(blocks)))
    assert not world.copy(world.put(99))
    assert world.tier.counters.evicted == 0
    assert world.tier.leased_bytes == SLABS * SLAB
    world.tier.give_back(lent.values())
    assert world.copy(world.put(98))


def test_a_copy_is_in_one_piece_or_not_at_all(world: World) -> None:
    assert world.tier.allocate("uid-1", SLAB + 1) is None
    odd = [world.put(number) for number in range(SLABS * 4)]
    assert all(map(world.copy, odd))
    for block in odd[::2]:
        world.tier.forget(block.id)  # half of the memory is free now, nowhere more than one block's
    large = world.put(77, SLAB)
    assert world.copy(large)
    copies = world.tier.lend({0: large})
    assert world.read(copies[0]) == world.right(large.id, SLAB)
    world.tier.give_back(copies.values())


def test_what_leaves_host_memory_leaves_the_gpu(world: World) -> None:
    block, other = world.put(1), world.put(2)
    assert world.copy(block)
    assert world.copy(other)
    lent = world.tier.lend({0: block})
    world.host.remove(block)
    assert world.tier.get(block.id) is None
    assert world.tier.get(other.id) is not None
    assert world.read(lent[0]) == world.right(block.id, block.nbytes), "it is still being read"
    world.tier.check()
    world.tier.give_back(lent.values())
    assert world.tier.pool.used() == other.footprint


def test_slabs_stay_with_their_domain(world: World) -> None:
    """A client holds whole slabs open, and nothing can take them from it."""
    blocks = [world.put(number) for number in range(SLABS * 4)]
    assert all(map(world.copy, blocks))
    world.tier.clear()
    assert world.tier.pool.used() == 0
    assert not world.copy(world.put(1, scope=B))
    assert world.tier.slab(1, "uid-1") is not None
    assert world.tier.slab(1, "uid-2") is None
    assert world.tier.slab(9, "uid-1") is None


def test_two_copies_of_one_block_are_a_defect(world: World) -> None:
    block = world.put(1)
    assert world.copy(block)
    extent = world.tier.allocate("uid-1", block.nbytes)
    assert extent is not None
    with pytest.raises(InternalError):
        world.tier.insert(block, extent)
    world.tier.free(extent)


@pytest.mark.parametrize(("budget", "size"), [(0, 16), (64, 16), (1 << 10, 128), (5 << 10, 512), (40 << 10, 512)])
def test_slabs_are_pieces_that_cuda_shares(budget: int, size: int) -> None:
    assert slab_size(budget << 20) == size << 20


class GpuMachine(RuleBasedStateMachine):
    """Any order of what happens to blocks and their copies, a copy being made in the background included."""

    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="kvg-")
        self.world = World(Path(self.folder.name))
        self.next = 0
        self.leases: list[tuple[list[HostBlock], list[GpuBlock]]] = []
        self.copying: list[tuple[HostBlock, Any]] = []

    def _some(self, data: st.DataObject) -> HostBlock | None:
        blocks = list(self.world.host.all_blocks())
        return blocks[data.draw(st.integers(0, len(blocks) - 1))] if blocks else None

    @rule(nbytes=st.integers(1, SLAB + PAGE_BYTES), scope=st.sampled_from([A, A, B]))
    def put(self, nbytes: int, scope: Scope) -> None:
        self.next += 1
        if len(list(self.world.host.all_blocks())) < 40 and self.world.host.arena.free(scope.domain) > 2 * SLAB:
            self.world.put(self.next, nbytes, scope)

    @rule(data=st.data())
    def begin_copy(self, data: st.DataObject) -> None:
        block = self._some(data)
        taken = {one.id for one, _ in self.copying}
        if block is None or block.id in taken or self.world.tier.get(block.id) is not None:
            return
        lent = [copy for _, copies in self.leases for copy in copies]
        extent = self.world.tier.allocate(block.id.scope.domain, block.nbytes)
        assert all(copy.extent.slab for copy in lent)
        if extent is not None:
            self.world.host.acquire([block])
            self.copying.append((block, extent))

    @precondition(lambda self: self.copying)
    @rule(cancelled=st.booleans())
    def end_copy(self, cancelled: bool) -> None:
        block, extent = self.copying.pop(0)
        self.world.memory.copy(self.world.host.arena.views(block.extents), self.world.address(extent))
        self.world.host.unacquire([block])
        if cancelled or block.gone:
            self.world.tier.free(extent)
        else:
            self.world.tier.insert(block, extent)

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        block = self._some(data)
        if block is not None:
            self.world.host.acquire([block])
            self.leases.append(([block], list(self.world.tier.lend({0: block}).values())))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, copies = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.world.host.unacquire(blocks)
        self.world.tier.give_back(copies)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = self._some(data)
        if block is not None:
            self.world.host.remove(block)

    @rule()
    def lose_all_copies(self) -> None:
        self.world.tier.clear()

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.tier.check()
        self.world.host.check()
        parts = self.world.tier.breakdown()
        assert parts["blocks_bytes"] + parts["writing_bytes"] + parts["free"] == SLABS * SLAB
        in_host = {block.id for block in self.world.host.all_blocks()}
        assert set(self.world.tier._blocks) <= in_host, "a copy was the only one"
        for blocks, copies in self.leases:
            for block, copy in zip(blocks, copies, strict=False):
                assert self.world.read(copy) == self.world.right(block.id, block.nbytes)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.host.arena.close()
            self.folder.cleanup()


TestGpuMachine = GpuMachine.TestCase
TestGpuMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# -- copying in the background -----------------------------------------------------------------------------------------


class Desk:
    """A desk, and leases as the service makes them."""

    def __init__(self, world: World, *, twice: bool = True) -> None:
        self.world = world
        self.desk = GpuDesk(world.tier, world.memory, world.host, twice=twice)
        self.ledger = Ledger(world.host)
        self.session: Session = self.ledger.open("uid-1", False, lambda *_: None)

    def reach(self, *blocks: HostBlock) -> tuple[Any, dict[int, GpuBlock]]:
        """Lease blocks and ask where they lie on the GPU."""
        lease = self.ledger.new_lease(self.session, A, 30)
        self.ledger.lend(lease, dict(enumerate(blocks)))
        return lease, self.desk.reach(lease)

    def wants(self, *blocks: HostBlock) -> None:
        """The same, and released again."""
        self.ledger.end_lease(self.reach(*blocks)[0])

    async def settled(self) -> None:
        """Until nothing is being copied."""
        while self.desk._task is not None:
            await asyncio.sleep(0.001)


async def test_the_second_lease_brings_a_block_up_and_the_third_finds_it(world: World) -> None:
    desk = Desk(world)
    blocks = [world.put(number) for number in range(2)]
    desk.wants(*blocks)
    await desk.settled()
    assert world.tier.usage().blocks == 0
    desk.wants(*blocks)
    await desk.settled()
    lease, copies = desk.reach(*blocks)
    assert [world.read(copies[i]) for i in (0, 1)] == [world.right(block.id, block.nbytes) for block in blocks]
    assert world.tier.leased_bytes == 2 * blocks[0].footprint
    desk.ledger.end_lease(lease)
    assert world.tier.leased_bytes == 0
    await desk.desk.close()


async def test_a_client_that_dies_gives_everything_back(world: World) -> None:
    desk = Desk(world, twice=False)
    block = world.put(1)
    desk.wants(block)
    await desk.settled()
    for _ in range(3):
        _, copies = desk.reach(block)
        assert copies
    assert world.tier.leased_bytes == block.footprint
    desk.ledger.close(desk.session)
    assert world.tier.leased_bytes == 0
    assert world.host.leased_bytes == 0
    await desk.desk.close()


async def test_a_lease_is_lent_each_copy_once_however_often_it_asks(world: World) -> None:
    desk = Desk(world, twice=False)
    block, other = world.put(1), world.put(2)
    desk.wants(block)
    await desk.settled()
    lease, copies = desk.reach(block, other)
    assert list(copies) == [0]
    await desk.settled()
    for _ in range(50):
        assert list(desk.desk.reach(lease)) == [0, 1]
    assert [copy.refs for copy in copies.values()] == [1, 1]
    assert len(lease.ends) == 1
    desk.ledger.end_lease(lease)
    assert world.tier.leased_bytes == 0
    assert not desk.desk._lent
    await desk.desk.close()


async def test_what_waits_is_bounded_and_heads_come_first(world: World) -> None:
    desk = Desk(world, twice=False)
    blocks = [world.put(number, PAGE_BYTES) for number in range(SLABS * 8)]
    desk.wants(*blocks)
    await desk.settled()
    held = [number for number, block in enumerate(blocks) if world.tier.get(block.id)]
    assert held == list(range(SLABS * 8 // 4))
    assert desk.desk.refused == len(blocks) - len(held)
    assert desk.desk.state()["waiting_bytes"] == 0
    await desk.desk.close()


async def test_a_block_that_is_dropped_while_it_is_copied_does_not_arrive(world: World) -> None:
    desk = Desk(world, twice=False)
    block, go = world.put(1), threading.Event()
    world.memory.before_copy = lambda: go.wait(10)
    desk.wants(block)
    await asyncio.sleep(0.01)
    assert world.host.leased_bytes == block.footprint, "held while it is read"
    world.host.remove(block)
    again = world.put(1)  # the same name, stored anew
    go.set()
    await desk.settled()
    assert world.tier.usage().blocks == 0
    assert world.tier.pool.used() == 0
    assert not again.gone
    await desk.desk.close()


async def test_a_gpu_that_fails_costs_no_block(world: World) -> None:
    desk = Desk(world, twice=False)
    block, other = world.put(1), world.put(2)
    desk.wants(block)
    await desk.settled()
    lease, copies = desk.reach(block)

    def fails() -> None:
        raise DeviceUnavailable("the device fell off the bus.", "")

    world.memory.before_copy = fails
    desk.wants(other)
    await desk.settled()
    assert desk.desk.off == "the device fell off the bus."
    assert desk.desk.gpu == b""
    assert desk.desk.state()["breaker"]["state"] == "open"
    assert desk.reach(block, other)[1] == {}
    assert world.host.get(block.id) is block
    assert world.host.get(other.id) is other
    assert world.read(copies[0]) == world.right(block.id, block.nbytes), "a lease is honoured to its end"
    desk.ledger.end_lease(lease)
    assert world.tier.pool.used() == 0
    await desk.desk.close()


async def test_a_block_larger_than_a_slab_is_counted_and_left_out(world: World) -> None:
    desk = Desk(world, twice=False)
    desk.wants(world.put(1, SLAB + 1))
    await desk.settled()
    assert world.tier.counters.dropped == {"too_large": 1}
    await desk.desk.close()


async def test_it_ends_while_it_copies(world: World) -> None:
    desk = Desk(world, twice=False)
    go = threading.Event()
    world.memory.before_copy = lambda: go.wait(10)
    desk.wants(world.put(1), world.put(2, PAGE_BYTES))
    await asyncio.sleep(0.01)
    await desk.desk.close()
    go.set()
    assert world.host.leased_bytes == 0
    assert world.tier.pool.used() == 0


def test_less_than_a_slab_is_refused_with_the_rule() -> None:
    with pytest.raises(ConfigError, match="less than one slab"):
        open_tier(
            Gpu(bytes=1 << 20, device=0, policy="lru", admission="first"),
            HostTier(2 << 20, make_policy("lru"), 1 << 18, 0),
        )
