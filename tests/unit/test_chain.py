"""The tiers as one store: read once for all who wait, readable while queued, and what was dropped stays away."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.admission import Doorkeeper
from kvstore.chain import TierChain
from kvstore.errors import TierDown
from kvstore.eviction import make_policy
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock, encode_header
from kvstore.tiers.wrappers import Breaker
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
from kvstore.writebehind import LINGER_S, WriteBehind

SCOPE = Scope("uid-1", b"n" * 32)
NBYTES = 40_000


class FakeTier(Tier):
    """A lower tier in a dict. Each `get`, `put` and `drop` first asks its gate, which may wait or raise."""

    name = "fake"
    code = TierCode.DISK

    def __init__(self, gate: Callable[[str, BlockId], Any] | None = None) -> None:
        self.counters = TierCounters()
        self.blocks: dict[BlockId, tuple[BlockHeader, bytes]] = {}
        self.calls: Counter[str] = Counter()
        self.answer: dict[str, Any] = {}
        self.touched: list[BlockId] = []
        self.pins: dict[BlockId, float] = {}
        self._gate = gate

    async def _pass(self, verb: str, block: BlockId) -> None:
        self.calls[verb] += 1
        if self._gate is not None:
            waits = self._gate(verb, block)
            if waits is not None:
                await waits

    def size(self, block: BlockId) -> int | None:
        return len(self.blocks[block][1]) if block in self.blocks else None

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        header, content = self.blocks.get(block, (BlockHeader(), b""))
        await self._pass("get", block)
        if "get" in self.answer:
            return self.answer["get"]
        if not content:
            return Miss(MissReason.ABSENT)
        for view in into:
            view[:], content = content[: len(view)], content[len(view) :]
        return Hit(header, sum(len(view) for view in into))

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        self.calls["durable"] += durable
        content = b"".join(payload)
        await self._pass("put", block)
        if "put" in self.answer:
            return self.answer["put"]
        if block in self.blocks:
            return Exists()
        self.blocks[block] = (header, content)
        return Stored()

    async def drop(self, block: BlockId) -> bool:
        await self._pass("drop", block)
        return self.blocks.pop(block, None) is not None

    async def clear(self, scope: Scope) -> int:
        return sum([await self.drop(block) for block in list(self.blocks) if block.scope == scope])

    def touch(self, blocks: Iterable[BlockId]) -> None:
        self.touched += blocks

    def pin(self, block: BlockId, until: float) -> bool:
        self.pins[block] = until
        return block in self.blocks

    def usage(self) -> Usage:
        return Usage(1 << 30, sum(len(content) for _, content in self.blocks.values()), len(self.blocks))

    async def check(self, fix: bool = False) -> list[Finding]:
        return []

    async def close(self) -> None:
        return None


class Gate:
    """Holds calls of some verbs back until it is opened."""

    def __init__(self, *verbs: str) -> None:
        self.verbs = verbs
        self.open = asyncio.Event()
        self.waiting = asyncio.Event()

    def __call__(self, verb: str, block: BlockId) -> Any:
        if verb not in self.verbs:
            return None
        self.waiting.set()
        return self.open.wait()


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def payload(of: bytes, nbytes: int = NBYTES) -> bytes:
    return hashlib.shake_128(of).digest(nbytes)


def block_id(number: int) -> BlockId:
    return BlockId(SCOPE, key(number))


class House:
    """A small host tier over some lower tiers."""

    def __init__(
        self, *below: Tier, nbytes: int = 1 << 20, parallel: int = 4, twice: Collection[TierCode] = ()
    ) -> None:
        self.host = HostTier(nbytes, make_policy("lru"), 256 * 1024, 0)
        self.chain = TierChain(self.host, list(below), parallel, twice)

    def admit(self, number: int, durable: bool = False) -> list[asyncio.Future[StoreOutcome]] | None:
        """Store a block; None if there is no room."""
        header = BlockHeader(position=number)
        raw = encode_header(header)
        extents = self.host.allocate(SCOPE.domain, NBYTES, len(raw))
        if extents is None:
            return None
        content = payload(key(number))
        for view in self.host.arena.views(extents):
            view[:], content = content[: len(view)], content[len(view) :]
        return self.chain.admit(HostBlock(block_id(number), raw, header, NBYTES, extents), durable)

    def in_host(self, number: int) -> bool:
        found = self.host.get(block_id(number))
        return found is not None and self.bytes_of(found) == payload(key(number))

    def bytes_of(self, block: HostBlock) -> bytes:
        return b"".join(bytes(view) for view in self.host.arena.views(block.extents))

    def evict(self, number: int) -> None:
        found = self.host.get(block_id(number))
        assert found is not None
        assert not found.dirty
        self.host.remove(found)

    def promote(self, number: int) -> asyncio.Future[tuple[HostBlock | Miss, TierCode]]:
        arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.chain.promote(block_id(number), lambda found, code: arrived.set_result((found, code)))
        return arrived

    async def settle(self) -> None:
        assert await self.chain.drain(5) == 0


@pytest.fixture
async def houses() -> AsyncIterator[Callable[..., House]]:
    made: list[House] = []

    def make(*below: Tier, **how: Any) -> House:
        made.append(House(*below, **how))
        return made[-1]

    yield make
    for house in made:
        await house.settle()
        house.host.check()
        assert house.host.dirty_bytes == house.host.leased_bytes == 0
        assert house.chain._arrivals == {}
        assert house.chain._forgotten == set()
        await house.chain.close()


Houses = Callable[..., House]


# -- looking -----------------------------------------------------------------------------------------------------------


async def test_locate_says_the_nearest_tier_and_stops_at_a_gap(houses: Houses) -> None:
    near, far = FakeTier(), FakeTier()
    far.code = TierCode.REDIS
    house = houses(near, far)
    house.admit(1)
    await house.settle()
    near.blocks[block_id(2)] = far.blocks[block_id(2)] = (BlockHeader(), payload(key(2)))
    far.blocks[block_id(3)] = (BlockHeader(), payload(key(3)))
    keys = [key(n) for n in (1, 2, 3, 4, 1)]
    assert house.chain.locate(SCOPE, keys, prefix=False) == bytes([1, 2, 3, 0, 1])
    assert house.chain.locate(SCOPE, keys, prefix=True) == bytes([1, 2, 3])
    assert house.chain.locate(SCOPE, keys[3:], prefix=True) == b""
    assert house.chain.locate(SCOPE, [], prefix=False) == b""
    assert house.chain.locate(Scope("uid-2", SCOPE.ns), keys, prefix=False) == bytes(5)
    assert near.calls["get"] == 0


async def test_a_use_is_noted_below_too(houses: Houses) -> None:
    below = FakeTier()
    house = houses(below)
    house.admit(1)
    found = house.host.get(block_id(1))
    assert found is not None
    house.chain.touch([found])
    assert below.touched == [block_id(1)]


async def test_a_tier_may_ask_for_a_second_sighting(houses: Houses) -> None:
    below = FakeTier()
    house = houses(below, twice=[TierCode.DISK])
    for number in (1, 2, 3):
        assert house.admit(number) == []
    assert (house.chain.dirty_blocks, house.chain.queues[0].blocks) == (0, 0)
    used = house.host.get(block_id(1))
    assert used is not None
    house.chain.touch([used])  # seen again in memory
    await house.chain.drain(5)
    assert list(below.blocks) == [block_id(1)]
    for number in (2, 3):
        again = house.host.get(block_id(number))
        assert again is not None
        house.host.remove(again)
    house.admit(2)  # stored anew after it had left
    await house.chain.drop(SCOPE, [key(3)])
    house.admit(3)  # what was dropped had not been seen
    durable = house.admit(4, durable=True)
    assert durable is not None
    assert await house.chain.durable(durable) == Stored()
    await house.chain.drain(5)
    assert set(below.blocks) == {block_id(1), block_id(2), block_id(4)}
    doorkeeper = house.chain.queues[0].doorkeeper
    assert doorkeeper is not None
    assert (doorkeeper.kept_out, len(doorkeeper)) == (4, 1)


def test_the_doorkeeper_remembers_a_bounded_number() -> None:
    doorkeeper = Doorkeeper(most=10)
    for number in range(100):
        assert doorkeeper.first_time(block_id(number))
    assert len(doorkeeper) == 10
    assert not doorkeeper.again(block_id(0))
    assert doorkeeper.again(block_id(99))


# -- bringing up -------------------------------------------------------------------------------------------------------


async def test_many_who_ask_at_once_read_once(houses: Houses) -> None:
    gate = Gate("get")
    below = FakeTier(gate)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(position=1), payload(key(1)))
    waiting = [house.promote(1) for _ in range(20)]
    await gate.waiting.wait()
    waiting += [house.promote(1) for _ in range(20)]
    gate.open.set()
    found = [(await one)[0] for one in waiting]
    assert below.calls["get"] == 1
    assert len({id(block) for block in found}) == 1
    assert isinstance(found[0], HostBlock)
    assert house.bytes_of(found[0]) == payload(key(1))
    assert found[0].header.position == 1


async def test_asking_again_without_waiting_holds_nothing(houses: Houses) -> None:
    gate = Gate("get")
    below = FakeTier(gate)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    for _ in range(1000):  # prefetches, while the tier hangs
        house.chain.prefetch(block_id(1))
    await gate.waiting.wait()
    assert house.chain._arrivals == {block_id(1): []}
    gate.open.set()
    found, _ = await house.promote(1)
    assert isinstance(found, HostBlock)
    assert below.calls["get"] == 1


async def test_promotions_are_bounded_and_all_end(houses: Houses) -> None:
    at_once = most = 0

    async def count() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1

    below = FakeTier(lambda verb, block: count() if verb == "get" else None)
    house = houses(below, parallel=3)
    for number in range(20):
        below.blocks[block_id(number)] = (BlockHeader(), payload(key(number)))
    found = await asyncio.gather(*(house.promote(number) for number in range(20)))
    assert all(isinstance(block, HostBlock) and code == TierCode.DISK for block, code in found)
    assert most == 3


async def test_the_next_tier_is_asked_where_one_misses(houses: Houses) -> None:
    near, far = FakeTier(), FakeTier()
    far.code = TierCode.REDIS
    house = houses(near, far)
    for tier in (near, far):
        tier.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    near.answer["get"] = Miss(MissReason.CORRUPT)
    found, code = await house.promote(1)
    assert isinstance(found, HostBlock)
    assert code == TierCode.REDIS
    far.answer["get"] = Miss(MissReason.TIER_DOWN)
    house.evict(1)
    assert (await house.promote(1))[0] == Miss(MissReason.TIER_DOWN)


async def test_a_tier_that_raises_is_a_miss_and_leaks_nothing(houses: Houses) -> None:
    def broken(verb: str, block: BlockId) -> None:
        raise RuntimeError(verb)

    below = FakeTier(broken)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    assert (await house.promote(1))[0] == Miss(MissReason.LOST)
    assert house.host.arena.used() == 0
    queued = house.admit(2)
    assert queued is not None
    assert await queued[0] == Dropped(DropReason.IO_ERROR)
    assert house.in_host(2)


async def test_no_room_for_what_comes_up_is_said(houses: Houses) -> None:
    below = FakeTier()
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    while (extents := house.host.allocate(SCOPE.domain, NBYTES)) is not None:
        pass
    assert extents is None
    assert (await house.promote(1))[0] == Miss(MissReason.NO_SPACE)
    for lent, _ in list(house.host._lent.values()):
        house.host.free(lent)


async def test_a_block_stored_afresh_while_it_comes_up_wins(houses: Houses) -> None:
    gate = Gate("get")
    below = FakeTier(gate)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    coming = house.promote(1)
    await gate.waiting.wait()
    house.admit(1)
    stored = house.host.get(block_id(1))
    gate.open.set()
    assert (await coming)[0] is stored


# -- write-behind ------------------------------------------------------------------------------------------------------


async def test_what_is_queued_is_readable_and_stays(houses: Houses) -> None:
    """Blocks on their way down are hits, and are not evicted; the rest of memory is."""
    gate = Gate("put")
    below = FakeTier(gate)
    house = houses(below)
    stored = 0
    while house.admit(stored) is not None:
        stored += 1
    assert house.chain.dirty_blocks == stored
    assert all(house.in_host(number) for number in range(stored))
    assert house.chain.locate(SCOPE, [key(n) for n in range(stored)], prefix=True) == bytes([1]) * stored
    gate.open.set()
    await house.settle()
    assert len(below.blocks) == stored
    assert house.admit(stored) is not None
    assert not house.in_host(0)
    found, _ = await house.promote(0)
    assert isinstance(found, HostBlock)
    assert house.bytes_of(found) == payload(key(0))


async def test_room_that_becomes_free_is_waited_for(houses: Houses) -> None:
    gate = Gate("put")
    house = houses(FakeTier(gate))
    number = 0
    while house.admit(number) is not None:
        number += 1
    waiting = asyncio.ensure_future(house.chain.progress(5))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    gate.open.set()
    await waiting
    assert house.admit(number) is not None


async def test_waiting_for_room_ends_in_time_and_at_once_if_nothing_is_queued(houses: Houses) -> None:
    gate = Gate("put")
    house = houses(FakeTier(gate))
    loop = asyncio.get_running_loop()
    began = loop.time()
    await house.chain.progress(5)
    assert loop.time() - began < 1
    house.admit(1)
    await house.chain.progress(0.02)
    assert loop.time() - began < 1
    gate.open.set()


async def test_drain_says_what_is_left(houses: Houses) -> None:
    gate = Gate("put")
    house = houses(FakeTier(gate))
    for number in range(5):
        house.admit(number)
    assert await house.chain.drain(0.02) == 5
    gate.open.set()
    assert await house.chain.drain(5) == 0


async def test_durable_blocks_go_first(houses: Houses) -> None:
    gate = Gate("put")
    order: list[BlockId] = []

    def note(verb: str, block: BlockId) -> Any:
        order.append(block)
        return gate(verb, block)

    house = houses(FakeTier(note), parallel=1)
    for number in range(3):
        house.admit(number)
    await gate.waiting.wait()
    house.admit(9, durable=True)
    gate.open.set()
    await house.settle()
    assert order == [block_id(n) for n in (0, 9, 1, 2)]


async def test_writes_leave_the_medium_to_loads(houses: Houses, monkeypatch: pytest.MonkeyPatch) -> None:
    """While blocks come up one is written at a time; for a moment afterwards two; then as many as may be."""
    house, under_way, most = houses(), 0, 0
    loading, now = [True], [100.0]
    monkeypatch.setattr("kvstore.writebehind.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def hold() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(8):
            await asyncio.sleep(0)
        under_way -= 1

    queue = WriteBehind(house.chain.host, FakeTier(lambda verb, block: hold()), 6, lambda: loading[0])
    seen = []
    for first in (0, 8, 16):
        most = 0
        for number in range(first, first + 8):
            house.admit(number)
            block = house.chain.host.get(block_id(number))
            assert block is not None
            queue.submit(block)
        while queue.blocks:
            await asyncio.sleep(0)
        seen.append(most)
        if loading[0]:
            loading[0] = False
        else:
            now[0] += 2 * LINGER_S
    assert seen == [1, 2, 6]


# -- durable outcomes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("near", "far", "wanted"),
    [
        (Stored(), Stored(), Stored()),
        (Exists(), Dropped(DropReason.TIER_FULL), Stored()),
        (Dropped(DropReason.IO_ERROR), Stored(), Stored()),
        (Dropped(DropReason.TIER_DOWN), Dropped(DropReason.IO_ERROR), Dropped(DropReason.NOT_DURABLE)),
    ],
)
async def test_one_tier_is_enough_to_be_durable(houses: Houses, near: Any, far: Any, wanted: Any) -> None:
    tiers = FakeTier(), FakeTier()
    house = houses(*tiers)
    for tier, outcome in zip(tiers, (near, far), strict=True):
        tier.answer["put"] = outcome
    writes = house.admit(1, durable=True)
    assert writes is not None
    assert await house.chain.durable(writes) == wanted
    assert all(tier.calls["durable"] == 1 for tier in tiers)
    assert house.in_host(1)


async def test_nothing_is_durable_without_a_lower_tier(houses: Houses) -> None:
    house = houses()
    writes = house.admit(1, durable=True)
    assert writes == []
    assert await house.chain.durable(writes) == Dropped(DropReason.NOT_DURABLE)
    assert house.in_host(1)


async def test_a_tier_that_is_down_answers_at_once(houses: Houses) -> None:
    below = FakeTier()
    house = houses(Breaker(below, failures=2, open_s=60))
    below.answer["put"] = Dropped(DropReason.IO_ERROR)
    for number in range(4):
        queued = house.admit(number)
        assert queued is not None
        await queued[0]
    assert below.calls["put"] == 2
    below.blocks[block_id(9)] = (BlockHeader(), payload(key(9)))
    assert house.chain.locate(SCOPE, [key(9)], prefix=False) == bytes(1)
    found, _ = await house.promote(9)
    assert isinstance(found, Miss)
    assert all(house.in_host(number) for number in range(4))


# -- forgetting --------------------------------------------------------------------------------------------------------


async def gone(house: House, below: FakeTier, number: int) -> None:
    """A dropped block is nowhere, and does not come back when everything has settled."""
    for _ in range(2):
        assert house.chain.locate(SCOPE, [key(number)], prefix=False) == bytes(1)
        await house.settle()
    assert block_id(number) not in below.blocks
    assert house.host.get(block_id(number)) is None


@pytest.mark.parametrize("everything", [False, True])
async def test_dropped_while_queued(houses: Houses, everything: bool) -> None:
    gate = Gate("put")
    below = FakeTier(gate)
    house = houses(below, parallel=1)
    for number in range(3):
        house.admit(number)
    await gate.waiting.wait()
    count = await house.chain.drop(SCOPE, None if everything else [key(2)])
    assert count == (3 if everything else 1)
    gate.open.set()
    await gone(house, below, 2)
    assert house.in_host(0) != everything


async def test_dropped_while_it_is_written(houses: Houses) -> None:
    gate = Gate("put")
    below = FakeTier(gate)
    house = houses(below)
    queued = house.admit(1)
    assert queued is not None
    await gate.waiting.wait()
    assert await house.chain.drop(SCOPE, [key(1)]) == 1
    gate.open.set()
    assert await queued[0] == Dropped(DropReason.ABORTED)
    await gone(house, below, 1)


@pytest.mark.parametrize("everything", [False, True])
async def test_dropped_while_it_comes_up(houses: Houses, everything: bool) -> None:
    gate = Gate("get")
    below = FakeTier(gate)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    coming = house.promote(1)
    await gate.waiting.wait()
    assert await house.chain.drop(SCOPE, None if everything else [key(1)]) == 1
    gate.open.set()
    assert (await coming)[0] == Miss(MissReason.ABSENT)
    await gone(house, below, 1)


@pytest.mark.parametrize("everything", [False, True])
async def test_what_comes_up_while_it_is_being_dropped_does_not_stay(houses: Houses, everything: bool) -> None:
    """A tier may take a while to forget. Who asks meanwhile may still get the block, who asks afterwards may not."""
    gate = Gate("drop")
    below = FakeTier(gate)
    house = houses(below)
    below.blocks[block_id(1)] = (BlockHeader(), payload(key(1)))
    dropping = asyncio.ensure_future(house.chain.drop(SCOPE, None if everything else [key(1)]))
    await gate.waiting.wait()
    await house.promote(1)
    gate.open.set()
    assert await dropping == 1
    await gone(house, below, 1)


async def test_dropped_and_stored_again_is_there(houses: Houses) -> None:
    gate = Gate("put")
    below = FakeTier(gate)
    house = houses(below, parallel=1)
    house.admit(1)
    await gate.waiting.wait()
    assert await house.chain.drop(SCOPE, [key(1)]) == 1
    house.admit(1)
    gate.open.set()
    await house.settle()
    assert house.in_host(1)
    assert block_id(1) in below.blocks


async def test_a_tier_that_cannot_forget_is_said(houses: Houses) -> None:
    def stuck(verb: str, block: BlockId) -> None:
        if verb == "drop":
            raise TierDown("it does not forget.")

    house = houses(FakeTier(stuck))
    house.admit(1)
    await house.settle()
    with pytest.raises(TierDown):
        await house.chain.drop(SCOPE, [key(1)])
    assert not house.in_host(1)


async def test_pins_reach_every_tier(houses: Houses) -> None:
    below = FakeTier()
    house = houses(below)
    house.admit(1)
    await house.settle()
    below.blocks[block_id(2)] = (BlockHeader(), payload(key(2)))
    assert house.chain.pin(SCOPE, [key(1), key(2), key(3)], until=1e12) == 2
    assert below.pins[block_id(2)] == 1e12
    while house.host.get(block_id(1)) is not None and house.admit(100 + len(below.blocks)) is not None:
        await house.settle()
        if len(below.blocks) > 60:
            break
    assert house.in_host(1)
    assert house.chain.pin(SCOPE, [key(1)], until=0.0) == 1
