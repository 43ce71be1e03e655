"""A block that became smaller on disk while Redis holds more of it: a load takes that copy, and so does the disk."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from codec_kit import (
    CHAINS,
    EXACT,
    LOSSY,
    NAMES,
    WHOLE,
    as_pages,
    block_id,
    encoded_by_an_engine,
    error,
    load,
    payload,
    profiles,
    rung,
    store,
)

from kvstore.copies import Copies
from kvstore.encoding import pages
from kvstore.ladder import Ladder
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.redis import RedisTier
from kvstore.types import BlockHeader, Hit, Stored

CUT = [rung(CHAINS[0], 1.5), rung(CHAINS[0], 2.5, planes=3), rung(CHAINS[0], 3.5, planes=1)]
_numbers = itertools.count()


class Pair:
    """A disk tier over a Redis tier, with the same rungs."""

    def __init__(self, place: Path, server: ValkeyServer, capacity: int) -> None:
        found = profiles(place / "p", CUT)
        below = RedisTier(server.url, 64 << 20, prefix=f"c{next(_numbers)}", timeout_s=20)
        self.disk = Ladder(DiskTier(place / "disk", capacity, policy="lru"), NAMES.get, profiles=found)
        self.redis = Ladder(below, NAMES.get, profiles=found)
        self.copies = Copies([self.disk, self.redis], lambda: False)

    async def store(self, number: int, *, durable: bool = False) -> None:
        raw = as_pages(payload(number))
        for tier in (self.disk, self.redis):
            header = BlockHeader(position=64 * number)
            kept = durable and tier is self.disk
            assert isinstance(await tier.put(block_id(number, LOSSY), header, [raw], WHOLE, durable=kept), Stored)

    async def error(self, number: int) -> float:
        """Relative error of a block as a load has it now; what follows from that is begun."""
        block = block_id(number, LOSSY)
        source = self.copies.in_order(block)[0]
        got = await load(source, number, LOSSY)
        self.copies.was_read(block, source)
        return error(got, payload(number))

    async def settled(self) -> None:
        if self.copies._task is not None:
            await self.copies._task


@pytest.fixture
def capacity() -> int:
    return 16 << 20


@pytest.fixture
async def pair(tmp_path: Path, server: ValkeyServer, capacity: int) -> AsyncIterator[Pair]:
    made = Pair(tmp_path, server, capacity)
    await made.disk.start()
    await made.redis.start()
    yield made
    await made.copies.close()
    await made.disk.close()
    await made.redis.close()


async def test_a_load_takes_the_copy_with_more_planes_and_the_disk_has_it_afterwards(pair: Pair) -> None:
    block = block_id(1, LOSSY)
    await pair.store(1)
    whole = pair.disk.inner.size(block)
    assert pair.copies.best(*block) is pair.disk  # as good as the other, and nearer
    for _ in range(2):
        await pair.disk.steps.step(block)
    assert (pair.disk.inner.size(block) or 0) < 0.5 * (whole or 0)
    assert pair.copies.best(*block) is pair.redis
    assert await pair.error(1) < 0.01
    await pair.settled()
    assert pair.disk.inner.size(block) == whole
    assert pair.copies.best(*block) is pair.disk
    assert await pair.error(1) < 0.01
    state = pair.disk.describe_state()["codecs"]
    assert (state["taken_over"], state["lost_stepping"], state["can_step"]) == (1, 0, 1)
    assert pair.redis.counters.hits == 1  # the second reading was not for a user
    assert await pair.disk.check() == []
    await pair.disk.steps.step(block)  # it may step down again
    assert (pair.disk.inner.size(block) or 0) < (whole or 0)


@pytest.mark.parametrize("capacity", [1 << 20])
async def test_others_step_down_for_it_but_none_leaves(pair: Pair) -> None:
    for number in range(24):
        await pair.store(number)
    assert pair.copies.best(*block_id(0, LOSSY)) is pair.redis
    for number in range(3):
        assert await pair.error(number) < 0.01
        await pair.settled()
        assert pair.disk.usage().used <= pair.disk.usage().capacity
    better = sum(pair.copies.best(*block_id(number, LOSSY)) is pair.disk for number in range(3))
    assert better == pair.disk.steps.up > 0
    assert pair.disk.inner.counters.evicted == pair.disk.steps.lost == 0


@pytest.mark.parametrize("capacity", [1 << 20])
async def test_where_there_is_no_room_for_it_the_worse_copy_stays(pair: Pair) -> None:
    await pair.store(0)
    for _ in range(2):
        await pair.disk.steps.step(block_id(0, LOSSY))
    for number in range(20):
        await store(pair.disk, number, EXACT)
        pair.disk.touch([block_id(0, LOSSY)])
    evicted = pair.disk.inner.counters.evicted
    assert evicted > 0
    assert await pair.error(0) < 0.01  # from Redis
    await pair.settled()
    assert pair.copies.best(*block_id(0, LOSSY)) is pair.redis
    assert (pair.disk.inner.counters.evicted, pair.disk.steps.up) == (evicted, 0)


async def test_where_the_better_copy_cannot_be_had_the_worse_one_is_read(pair: Pair) -> None:
    block = block_id(1, LOSSY)
    await pair.store(1)
    await pair.disk.steps.step(block)
    sources = pair.copies.in_order(block)
    assert sources == [pair.redis, pair.disk]
    await pair.redis.drop(block)
    assert not await pair.disk.take_over(block, pair.redis)
    assert pair.copies.best(*block) is pair.disk
    assert 0.01 < await pair.error(1) < 0.1


async def test_a_copy_that_lost_nothing_is_the_best_there_is(pair: Pair) -> None:
    await pair.store(1, durable=True)
    assert pair.copies.best(*block_id(1, LOSSY)) is pair.disk
    assert await pair.error(1) == 0.0
    assert not await pair.disk.take_over(block_id(1, LOSSY), pair.redis)


async def test_a_block_that_is_dropped_meanwhile_does_not_come_back(pair: Pair) -> None:
    block = block_id(1, LOSSY)
    await pair.store(1)
    await pair.disk.steps.step(block)
    peek = pair.redis.inner.peek

    async def dropped(*args: object) -> object:
        found = await peek(*args)  # pyright: ignore[reportArgumentType]
        await pair.disk.drop(block)
        return found

    pair.redis.inner.peek = dropped  # pyright: ignore[reportAttributeAccessIssue]
    assert not await pair.disk.take_over(block, pair.redis)
    assert pair.disk.size(block) is None
    assert pair.disk.steps.lost == 0


async def test_what_cannot_be_a_copy_of_it_is_never_read(pair: Pair) -> None:
    block = block_id(1, LOSSY)
    await pair.store(1)
    await pair.disk.steps.step(block)
    view = pages(2 * WHOLE)
    await pair.redis.inner.drop(block)
    assert isinstance(await pair.redis.inner.put(block, BlockHeader(position=64), [view], view.nbytes), Stored)
    assert pair.copies.best(*block) is pair.disk


@pytest.mark.parametrize("what", ["damaged", "of another profile"])
async def test_a_copy_that_cannot_be_believed_replaces_nothing(pair: Pair, what: str) -> None:
    block = block_id(1, LOSSY)
    await pair.store(1)
    for _ in range(2):
        await pair.disk.steps.step(block)
    before = pair.disk.inner.size(block)
    view = pages(pair.redis.inner.size(block) or 0)
    hit = await pair.redis.inner.peek(block, [view])
    assert isinstance(hit, Hit)
    if what == "damaged":
        view[view.nbytes // 2] ^= 1
    else:
        view = encoded_by_an_engine(1, "prerope|kv4(k=8,v=7)")
    await pair.redis.inner.drop(block)
    assert isinstance(await pair.redis.inner.put(block, hit.header, [view], view.nbytes), Stored)
    assert pair.copies.best(*block) is pair.redis
    assert not await pair.disk.take_over(block, pair.redis)
    assert pair.disk.inner.size(block) == before


async def test_what_an_engine_encoded_is_taken_over_in_its_form(pair: Pair) -> None:
    block, data = block_id(1, LOSSY), encoded_by_an_engine(1, CHAINS[0])
    for tier in (pair.disk, pair.redis):
        assert isinstance(await tier.put(block, BlockHeader(position=64), [data], data.nbytes), Stored)
    await pair.disk.steps.step(block)
    assert (pair.disk.size(block) or 0) < data.nbytes
    assert await pair.disk.take_over(block, pair.redis)
    view = pages(data.nbytes)
    assert isinstance(await pair.disk.get(block, [view]), Hit)
    assert bytes(view) == bytes(data)
