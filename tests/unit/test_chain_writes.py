"""The tiers as one store, on the way down: readable while queued, and durable where that was asked for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from houses import SCOPE, FakeTier, Gate, Houses, block_id, gated, key, payload

from kvstore.tiers.host_block import HostBlock
from kvstore.tiers.wrappers import Breaker
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Exists, Miss, Stored
from kvstore.writebehind import LINGER_S, WriteBehind

# -- write-behind ------------------------------------------------------------------------------------------------------


async def test_what_is_queued_is_readable_and_stays(houses: Houses) -> None:
    """Blocks on their way down are hits, and are not evicted; the rest of memory is."""
    gate, below, house = gated(houses, "put")
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
    assert writes is not None
    assert not writes
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
