"""The tiers as one store, from below: where a block is found, and that it is read once for all who wait."""

from __future__ import annotations

import asyncio

from houses import NBYTES, SCOPE, FakeTier, Houses, block_id, gated, key, payload

from kvstore.admission import Doorkeeper
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Miss, MissReason, Scope, Stored, TierCode

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
    gate, below, house = gated(houses, "get")
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
    gate, below, house = gated(houses, "get", 1)
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
    gate, _, house = gated(houses, "get", 1)
    coming = house.promote(1)
    await gate.waiting.wait()
    house.admit(1)
    stored = house.host.get(block_id(1))
    gate.open.set()
    assert (await coming)[0] is stored
