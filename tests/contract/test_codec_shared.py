"""Blocks in Redis step down before any leaves, whichever of several daemons needs the room, and no reader is harmed."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
import torch
from codec_kit import (
    CHAINS,
    EXACT,
    LOSSY,
    NAMES,
    WHOLE,
    block_id,
    encoded_by_an_engine,
    error,
    load,
    payload,
    profiles,
    rung,
    store,
)

from kvstore.ladder import Ladder
from kvstore.remote.index import Names
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import BlockHeader, Dropped, DropReason, Miss, Stored

_numbers = itertools.count()


class Fleet:
    """Two daemons' Redis tiers of one deployment."""

    def __init__(self, server: ValkeyServer, place: Path, capacity: int, key: bytes) -> None:
        prefix = f"s{next(_numbers)}"
        self.names, self.socket = Names(prefix), server.socket
        self.one, self.two = (
            Ladder(
                RedisTier(server.url, capacity, prefix=prefix, key=key, timeout_s=20),
                NAMES.get,
                profiles=profiles(place / f"p{number}", [rung(chain, 2.0 + i) for i, chain in enumerate(CHAINS[:2])]),
            )
            for number in range(2)
        )

    def order(self) -> list[bytes]:
        """Keys of blocks, those unused for longest first, as the server has them."""
        with blocking_redis.Redis(unix_socket_path=self.socket) as client:
            members: Any = client.zrange(self.names.index[1], 0, -1)
            return [member[-32:] for member in members]

    async def known(self, count: int) -> None:
        """Wait until both know of so many blocks."""
        while {tier.usage().blocks for tier in (self.one, self.two)} != {count}:
            await asyncio.sleep(0.01)


@pytest.fixture
def key() -> bytes:
    return b""


@pytest.fixture
async def fleet(server: ValkeyServer, tmp_path: Path, key: bytes) -> AsyncIterator[Fleet]:
    made = Fleet(server, tmp_path, 1 << 20, key)
    await made.one.start()
    await made.two.start()
    yield made
    await made.one.close()
    await made.two.close()


@pytest.mark.parametrize("key", [b"", bytes(range(32))], ids=["clear", "sealed"])
async def test_blocks_shrink_before_any_is_evicted_and_keep_their_age(fleet: Fleet) -> None:
    count = 36  # on the first rung 27 fit
    for number in range(count):
        tier = fleet.two if number % 2 else fleet.one
        assert isinstance(await store(tier, number, LOSSY), Stored)
        assert tier.usage().used <= tier.usage().capacity
        # A copy of the index is some milliseconds old; what that hides has to fit into what is kept free, and here a
        # block is more than that.
        await fleet.known(number + 1)
    assert fleet.one.steps.down > 0 < fleet.two.steps.down
    assert fleet.one.counters.evicted + fleet.two.counters.evicted == 0
    assert fleet.one.steps.lost + fleet.two.steps.lost == 0
    assert fleet.order() == [number.to_bytes(32, "little") for number in range(count)]
    errors = [error(await load(fleet.two, number, LOSSY), payload(number)) for number in range(count)]
    assert sum(errors[:12]) > 2 * sum(errors[-12:])  # those unused for longest went down
    assert max(errors) < 0.2
    assert await fleet.one.check() == []


async def test_when_all_stand_on_the_last_rung_the_oldest_leave(fleet: Fleet) -> None:
    number = 0
    while not fleet.one.counters.evicted:
        await store(fleet.one, number, LOSSY)
        number += 1
    assert number > 40
    assert fleet.one.size(block_id(0, LOSSY)) is None
    assert fleet.one.size(block_id(number - 1, LOSSY)) == WHOLE


async def test_of_two_who_want_to_one_steps_and_the_block_stays(fleet: Fleet) -> None:
    block = block_id(1, LOSSY)
    await store(fleet.one, 1, LOSSY)
    await fleet.known(1)
    before = fleet.one.inner.size(block)
    await asyncio.gather(fleet.one.steps.step(block), fleet.two.steps.step(block))
    assert fleet.one.steps.down + fleet.two.steps.down == 1
    assert fleet.one.steps.lost + fleet.two.steps.lost == 0
    await fleet.known(1)
    while fleet.one.inner.size(block) != fleet.two.inner.size(block):
        await asyncio.sleep(0.01)
    assert (fleet.one.inner.size(block) or 0) < (before or 0)
    for tier in (fleet.one, fleet.two):
        assert error(await load(tier, 1, LOSSY), payload(1)) < 0.2
    with blocking_redis.Redis(unix_socket_path=fleet.socket) as client:  # and nothing else is kept of it
        counted: Any = client.get(fleet.names.sum)
        assert int(counted) == fleet.one.usage().used


async def test_who_knows_only_what_was_there_before_misses_and_removes_nothing(fleet: Fleet) -> None:
    block = block_id(1, LOSSY)
    await store(fleet.one, 1, LOSSY)
    await fleet.known(1)
    behind = fleet.two.inner
    assert isinstance(behind, RedisTier)
    place = behind._index.mirror.find(block)
    await fleet.one.steps.step(block)
    assert place is not None
    while fleet.one.inner.size(block) != behind.size(block):
        await asyncio.sleep(0.01)
    behind._index.mirror.add(block, place)
    assert isinstance(await load(fleet.two, 1, LOSSY), Miss)
    assert isinstance(await load(fleet.one, 1, LOSSY), torch.Tensor)


async def test_what_is_pinned_exact_durable_or_of_another_profile_stays(fleet: Fleet) -> None:
    await store(fleet.one, 3, LOSSY)
    await store(fleet.one, 4, EXACT)
    other = encoded_by_an_engine(5, "prerope|kv4(k=8,v=7)")
    await fleet.one.inner.put(block_id(5, LOSSY), BlockHeader(position=320), [other], other.nbytes)
    assert fleet.one.pin(block_id(3, LOSSY), time.monotonic() + 60)
    sizes = {block: fleet.one.inner.size(block) for block in (block_id(3, LOSSY), block_id(4), block_id(5, LOSSY))}
    for number in range(10, 60):
        await store(fleet.two, number, LOSSY)
    assert fleet.two.steps.down > 10
    found = {block: fleet.one.inner.size(block) for block in sizes}
    assert found[block_id(3, LOSSY)] == sizes[block_id(3, LOSSY)]
    assert all(found[block] in (None, size) for block, size in sizes.items())  # gone with age, but never smaller
    await fleet.one.steps.step(block_id(3, LOSSY))
    assert fleet.one.inner.size(block_id(3, LOSSY)) == sizes[block_id(3, LOSSY)]


async def test_a_block_that_is_not_there_is_not_replaced(fleet: Fleet) -> None:
    view = memoryview(bytearray(8192))
    outcome = await fleet.one.inner.replace(block_id(9, LOSSY), BlockHeader(), [view], 8192)
    assert outcome == Dropped(DropReason.IN_FLIGHT)
    assert fleet.one.size(block_id(9, LOSSY)) is None
