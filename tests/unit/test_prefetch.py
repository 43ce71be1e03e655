"""Fetching ahead: after all that somebody waits for, with some of the workers, bounded, and taken back when told to."""

from __future__ import annotations

import asyncio

from houses import NBYTES, FakeTier, Gate, House, Houses, block_id, key, payload

from kvstore.arena import PAGE_BYTES
from kvstore.chain import AHEAD_SHARE
from kvstore.prefetch import PrefetchQueue
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockHeader, BlockId, Scope


def filled(below: FakeTier, count: int) -> FakeTier:
    for number in range(count):
        below.blocks[block_id(number)] = (BlockHeader(), payload(key(number)))
    return below


async def rest(house: House) -> None:
    """Until nothing is on its way up."""
    while house.chain._tasks:
        await asyncio.wait(house.chain._tasks)


async def test_what_is_prefetched_arrives(houses: Houses) -> None:
    house = houses(filled(FakeTier(), 3))
    assert [house.chain.prefetch(block_id(n)) for n in (0, 1, 2, 3)] == [True, True, True, False]
    await rest(house)
    assert all(house.in_host(n) for n in range(3))
    assert house.chain.ahead.bytes == len(house.chain.ahead) == 0
    assert not house.chain.prefetch(block_id(0)), "it is there"


async def test_leases_go_first_and_find_free_workers(houses: Houses) -> None:
    order: list[BlockId] = []
    gate = Gate("get")

    def note(verb: str, block: BlockId) -> object:
        if verb == "get":
            order.append(block)
        return gate(verb, block)

    house = houses(filled(FakeTier(note), 12), nbytes=4 << 20)
    for number in range(6):
        house.chain.prefetch(block_id(number))
    await gate.waiting.wait()
    waiting = [house.promote(number) for number in range(6, 12)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == [block_id(0), *(block_id(n) for n in (6, 7, 8))], "one of four workers fetches ahead"
    gate.open.set()
    await asyncio.gather(*waiting)
    await rest(house)
    assert set(order[4:7]) == {block_id(n) for n in (9, 10, 11)}
    assert order[7:] == [block_id(n) for n in range(1, 6)]


async def test_a_lease_for_a_queued_block_does_not_wait_for_the_queue(houses: Houses) -> None:
    gate = Gate("get")
    below = filled(FakeTier(lambda verb, block: gate(verb, block) if block == block_id(0) else None), 5)
    house = houses(below, nbytes=4 << 20)
    for number in range(5):
        house.chain.prefetch(block_id(number))
    await gate.waiting.wait()
    found, _ = await asyncio.wait_for(house.promote(4), 5)
    assert isinstance(found, HostBlock)
    assert not house.in_host(1)
    gate.open.set()
    await rest(house)
    assert below.calls["get"] == 5, "the one that was leased is not read again"


async def test_the_queue_is_bounded_by_memory(houses: Houses) -> None:
    gate = Gate("get")
    house = houses(filled(FakeTier(gate), 40))
    taken = [house.chain.prefetch(block_id(number)) for number in range(40)]
    room = house.host.arena.capacity // AHEAD_SHARE // NBYTES
    assert taken == [True] * room + [False] * (40 - room)
    assert house.chain.ahead.refused == 40 - room
    await gate.waiting.wait()  # one has left the queue
    assert house.chain.prefetch(block_id(39))
    gate.open.set()
    await rest(house)


async def test_what_is_cancelled_or_dropped_is_not_read(houses: Houses) -> None:
    gate = Gate("get")
    below = filled(FakeTier(gate), 5)
    house = houses(below, nbytes=4 << 20)
    for number in range(5):
        house.chain.prefetch(block_id(number))
    await gate.waiting.wait()
    assert [house.chain.ahead.discard(block_id(n)) for n in (0, 1, 1)] == [False, True, False]
    await house.chain.drop(block_id(2).scope, [key(2)])
    gate.open.set()
    await rest(house)
    assert [house.in_host(n) for n in range(5)] == [True, False, False, True, True]
    assert below.calls["get"] == 3


async def test_it_does_not_wait_for_memory_that_is_being_written(houses: Houses) -> None:
    gate = Gate("put")
    below = filled(FakeTier(gate), 1)
    house = houses(below)
    number = 100
    while house.admit(number) is not None:
        number += 1
    assert house.chain.prefetch(block_id(0))
    await asyncio.wait_for(rest(house), 1)
    assert not house.in_host(0)
    gate.open.set()


def test_small_blocks_are_bounded_too() -> None:
    queue = PrefetchQueue(10 * PAGE_BYTES)
    assert sum(queue.add(block_id(number), 1) for number in range(1000)) == 10
    queue.discard_scope(Scope("uid-1", b"x" * 32))
    assert len(queue) == 10
    queue.discard_scope(block_id(0).scope)
    assert (len(queue), queue.bytes) == (0, 0)
