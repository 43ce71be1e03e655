"""Three daemons and one small server: bytes within the budget at every sample, the server's memory as a limit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis

from kvstore.remote.index import Names, Place
from kvstore.testing.tier_kit import block_of, load, store
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import Dropped, DropReason, Stored

KIB, MIB = 1 << 10, 1 << 20
SIZE = 256 * KIB


@contextlib.asynccontextmanager
async def fleet(server: ValkeyServer, capacity: int) -> AsyncIterator[list[RedisTier]]:
    tiers = [RedisTier(server.url, capacity, timeout_s=10) for _ in range(3)]
    for tier in tiers:
        await tier.start()
    try:
        yield tiers
    finally:
        for tier in tiers:
            await tier.close()


class Watched:
    """What a server holds, asked for again and again beside the daemons."""

    def __init__(self, server: ValkeyServer) -> None:
        self.client: Any = blocking_redis.Redis(unix_socket_path=server.socket)
        self.names = Names("kvstore")
        self.most = 0

    def bytes(self) -> int:
        """Bytes that are reserved of the budget."""
        return int(self.client.get(self.names.sum) or 0)

    async def until(self, work: asyncio.Future[Any]) -> None:
        while not work.done():
            self.most = max(self.most, self.bytes())
            await asyncio.sleep(0.002)

    def is_whole(self) -> bool:
        """Whether index, sum and values say the same, and nothing lies there that the index does not name."""
        index = {member: Place.unpack(value) for member, value in self.client.hgetall(self.names.blocks).items()}
        named = {self.names.record(member) for member in index}
        named |= {name for member, place in index.items() if place for name in self.names.parts(member, place)}
        there = {name.decode() for name in self.client.scan_iter("kvstore:*")}
        return there == named and self.bytes() == sum(place.cost for place in index.values() if place)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path, "--maxmemory", "16mb", "--maxmemory-policy", "noeviction") as server:
        yield server


async def fill(tiers: list[RedisTier], count: int, at_once: int) -> list[tuple[int, object]]:
    """Each daemon stores blocks of its own; number and outcome of each."""
    outcomes: list[tuple[int, object]] = []

    async def worker(tier: RedisTier, numbers: Iterator[int]) -> None:
        for number in numbers:
            outcomes.append((number, await store(tier, block_of(number), SIZE)))
            assert tier.describe_state()["connected"], "a full server is no failed one"

    shares = [iter(range(1000 * which, 1000 * which + count)) for which in range(len(tiers))]
    await asyncio.gather(*(worker(tiers[i], shares[i]) for i in range(len(tiers)) for _ in range(at_once)))
    return outcomes


async def test_a_budget_that_three_share_is_kept_at_every_sample(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with fleet(server, 6 * MIB) as tiers:
            watched = Watched(server)
            work = asyncio.ensure_future(fill(tiers, 60, at_once=4))
            await watched.until(work)
            assert 5 * MIB < watched.most <= 6 * MIB
            assert {outcome for _, outcome in work.result()} <= {Stored(), Dropped(DropReason.TIER_FULL)}
            assert watched.is_whole()
            assert sum(tier.counters.evicted for tier in tiers) > 100


async def test_where_the_server_has_less_memory_than_the_budget_the_oldest_leave(small: ValkeyServer) -> None:
    """Without that the first blocks would stay until they expire, and every later one be refused."""
    async with fleet(small, 64 * MIB) as tiers:
        outcomes = await fill(tiers, 80, at_once=1)
        stored = [number for number, outcome in outcomes if outcome == Stored()]
        assert {outcome for _, outcome in outcomes} <= {Stored(), Dropped(DropReason.TIER_FULL)}
        assert len(stored) > 200, "of 240; the server has room for 60"
        assert min(tier.usage().capacity for tier in tiers) < 16 * MIB
        latest = stored[-12:]
        assert sum([await load(tiers[number // 1000], block_of(number), SIZE) for number in latest]) >= 10
        assert Watched(small).is_whole()


async def test_uses_that_a_full_server_does_not_take_are_no_reason_to_stop_reading(small: ValkeyServer) -> None:
    async with fleet(small, 64 * MIB) as tiers:
        tier = tiers[0]
        assert await store(tier, block_of(1), SIZE) == Stored()
        client: Any = blocking_redis.Redis(unix_socket_path=small.socket)
        client.config_set("maxmemory", MIB)  # less than it takes with nothing
        deadline = time.monotonic() + 10
        while tier.describe_state()["failures"].get("full", 0) < 2:  # told with the next look at the log
            assert time.monotonic() < deadline, "the server took them"
            assert await load(tier, block_of(1), SIZE)
            assert tier.describe_state()["connected"]
            await asyncio.sleep(0.02)
        assert tier.describe_state()["failures"].keys() == {"full"}
        client.config_set("maxmemory", 16 * MIB)
        assert await store(tier, block_of(2), SIZE) == Stored()
