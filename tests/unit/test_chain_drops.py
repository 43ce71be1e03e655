"""The tiers as one store, forgetting: what was dropped stays away, wherever it was on its way to."""

from __future__ import annotations

import asyncio

import pytest
from houses import SCOPE, FakeTier, House, Houses, block_id, gated, key, payload

from kvstore.errors import TierDown
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Miss, MissReason

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
    gate, below, house = gated(houses, "put", parallel=1)
    for number in range(3):
        house.admit(number)
    await gate.waiting.wait()
    count = await house.chain.drop(SCOPE, None if everything else [key(2)])
    assert count == (3 if everything else 1)
    gate.open.set()
    await gone(house, below, 2)
    assert house.in_host(0) != everything


async def test_dropped_while_it_is_written(houses: Houses) -> None:
    gate, below, house = gated(houses, "put")
    queued = house.admit(1)
    assert queued is not None
    await gate.waiting.wait()
    assert await house.chain.drop(SCOPE, [key(1)]) == 1
    gate.open.set()
    assert await queued[0] == Dropped(DropReason.ABORTED)
    await gone(house, below, 1)


@pytest.mark.parametrize("everything", [False, True])
async def test_dropped_while_it_comes_up(houses: Houses, everything: bool) -> None:
    gate, below, house = gated(houses, "get", 1)
    coming = house.promote(1)
    await gate.waiting.wait()
    assert await house.chain.drop(SCOPE, None if everything else [key(1)]) == 1
    gate.open.set()
    assert (await coming)[0] == Miss(MissReason.ABSENT)
    await gone(house, below, 1)


@pytest.mark.parametrize("everything", [False, True])
async def test_what_comes_up_while_it_is_being_dropped_does_not_stay(houses: Houses, everything: bool) -> None:
    """A tier may take a while to forget. Who asks meanwhile may still get the block, who asks afterwards may not."""
    gate, below, house = gated(houses, "drop", 1)
    dropping = asyncio.ensure_future(house.chain.drop(SCOPE, None if everything else [key(1)]))
    await gate.waiting.wait()
    await house.promote(1)
    gate.open.set()
    assert await dropping == 1
    await gone(house, below, 1)


async def test_dropped_and_stored_again_is_there(houses: Houses) -> None:
    gate, below, house = gated(houses, "put", parallel=1)
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
