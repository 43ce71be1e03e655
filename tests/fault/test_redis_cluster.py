"""The Redis tier over a real cluster of three nodes: blocks are spread, each on one node, and the budget holds."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.testing.tier_kit import block_of, header_of, load, pages, payload_of, scope_of, store
from kvstore.testing.valkey import ValkeyCluster, ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import Dropped, DropReason, Exists, Hit, LoadOutcome, Miss, MissReason, Stored

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    with ValkeyCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@asynccontextmanager
async def opened(cluster: ValkeyCluster, prefix: str, capacity: int = 64 * MIB, **how: Any) -> AsyncIterator[RedisTier]:
    tier = RedisTier(cluster.url, capacity, prefix=prefix, cluster=True, **{"timeout_s": 1.0, **how})
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


def values(node: ValkeyServer) -> int:
    found = re.search(rb"keys=(\d+)", node.ask("INFO keyspace"))
    return 0 if found is None else int(found[1])


async def until(condition: Any, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_blocks_are_spread_and_found_by_another_daemon(cluster: ValkeyCluster) -> None:
    async with opened(cluster, "spread") as one, opened(cluster, "spread", key=b"") as other:
        blocks = [block_of(number) for number in range(24)]
        assert [await store(one, block, 2 * MIB + 17) for block in blocks] == [Stored()] * 24
        assert all(values(node) >= 4 for node in cluster.nodes)
        await until(lambda: all(other.size(block) == 2 * MIB + 17 for block in blocks))
        assert all(await asyncio.gather(*(load(other, block, 2 * MIB + 17) for block in blocks)))
        assert await other.check() == []
        assert await other.drop(blocks[0])
        await until(lambda: one.size(blocks[0]) is None)
        assert await one.clear(scope_of()) == 23
        assert one.usage().used == 0
        assert sum(values(node) for node in cluster.nodes) <= 6, "values of blocks that are gone"


async def test_two_daemons_keep_one_budget(cluster: ValkeyCluster) -> None:
    async with opened(cluster, "budget", 8 * MIB) as one, opened(cluster, "budget", 8 * MIB) as other:
        for number in range(20):
            tier = (one, other)[number % 2]
            assert await store(tier, block_of(number), MIB) == Stored()
        assert await store(one, block_of(99), MIB) == Stored()
        await until(lambda: one.usage() == other.usage())
        assert 5 <= one.usage().blocks <= 7
        assert one.usage().used <= one.usage().capacity
        assert one.counters.evicted + other.counters.evicted == 21 - one.usage().blocks
        assert await load(one, block_of(99), MIB)
        assert not await load(one, block_of(0), MIB)


async def test_a_block_that_is_replaced_keeps_its_age_and_other_daemons_find_it(cluster: ValkeyCluster) -> None:
    async with opened(cluster, "replace") as one, opened(cluster, "replace") as other:
        blocks = [block_of(number) for number in range(4)]
        for block in blocks:
            assert await store(one, block, 2 * MIB) == Stored()
        await until(lambda: other.usage().blocks == 4)
        assert isinstance(await other.peek(blocks[0], pages(2 * MIB)), Hit)
        assert other.counters.hits == 0
        assert one.pin(blocks[1], time.monotonic() + 60)
        assert await one.oldest(10) == [blocks[0], *blocks[2:]]
        smaller = [(block, header_of(block), pages(MIB, content=payload_of(block, MIB)), MIB) for block in blocks]
        assert await other.replace(*smaller[0]) == Stored()
        assert await other.replace(*smaller[1]) == Dropped(DropReason.IN_FLIGHT)  # pinned by the other daemon
        await until(lambda: one.size(blocks[0]) == MIB)
        assert one.usage() == other.usage()
        assert await one.oldest(10) == [blocks[0], *blocks[2:]]
        assert await load(one, blocks[0], MIB)
        assert await load(one, blocks[1], 2 * MIB)


async def test_a_hung_node_costs_its_timeout_and_comes_back(cluster: ValkeyCluster) -> None:
    async with opened(cluster, "hung", timeout_s=0.4) as tier:
        blocks = [block_of(number) for number in range(9)]
        deadline = time.monotonic() + 15
        while not all([await store(tier, block, MIB) in (Stored(), Exists()) for block in blocks]):
            assert time.monotonic() < deadline, "a busy machine needs more than the timeout at times, not always"
            await asyncio.sleep(0.05)
        cluster.nodes[2].signal(signal.SIGSTOP)
        try:
            for block in blocks:
                began = time.monotonic()
                into = pages(MIB)
                outcome = await tier.get(block, into)
                assert time.monotonic() - began < 2
                assert outcome != Miss(MissReason.CORRUPT)
        finally:
            cluster.nodes[2].signal(signal.SIGCONT)

        async def all_there() -> bool:
            return all([tier.size(block) == MIB and await load(tier, block, MIB) for block in blocks])

        deadline = time.monotonic() + 15
        while not await all_there():
            assert time.monotonic() < deadline, "it did not come back"
            await asyncio.sleep(0.05)


async def test_a_replica_takes_the_place_of_a_node_that_died(tmp_path: Path) -> None:
    """Killed for good: the tier goes on without a restart, and what the replica has is right or a miss."""
    with ValkeyCluster(tmp_path, replicas=True) as cluster:
        async with opened(cluster, "failover", timeout_s=2.0) as tier:
            blocks = [block_of(number) for number in range(12)]
            assert [await store(tier, block, MIB) for block in blocks] == [Stored()] * 12
            assert cluster.nodes[0].ask("WAIT 1 2000")
            cluster.nodes[2].kill()
            answers = [await tier.get(block, pages(MIB)) for block in blocks]
            assert Miss(MissReason.CORRUPT) not in answers

            async def works() -> bool:
                stored = [await store(tier, block_of(number), MIB) for number in range(20, 29)]
                return all(each in (Stored(), Exists()) for each in stored)

            async def answered() -> list[LoadOutcome]:
                """A node that has not heard yet says that the cluster is down, also after others took over; without a
                connection nothing is known to be there."""
                while True:
                    if await works():
                        held = [block for block in blocks if tier.size(block) == MIB]
                        found = [await tier.get(block, pages(MIB)) for block in held]
                        if len(found) >= 6 and Miss(MissReason.TIER_DOWN) not in found:
                            return found  # at least what lies on the other nodes
                    await asyncio.sleep(0.1)

            found = await asyncio.wait_for(answered(), 60)
            assert all(isinstance(each, Hit) or each.reason is MissReason.LOST for each in found), found
            held = [block for block in blocks if tier.size(block) == MIB]
            assert sum(await asyncio.gather(*(load(tier, block, MIB) for block in held))) >= 6


async def test_a_cluster_of_which_no_node_answers_is_met_again(tmp_path: Path) -> None:
    """Dead when the tier starts, and dead once more while it runs."""
    with ValkeyCluster(tmp_path) as cluster:
        for node in cluster.nodes:
            node.kill()
        async with opened(cluster, "dead", timeout_s=0.5) as tier:
            for number in range(2):
                began = time.monotonic()
                assert await store(tier, block_of(number), MIB) == Dropped(DropReason.TIER_DOWN)
                assert time.monotonic() - began < 2
                assert "reached" in tier.describe_state()["last_error"]
                for node in cluster.nodes:
                    node.start()
                await until(lambda: tier.describe_state()["connected"])
                assert await store(tier, block_of(number), MIB) == Stored()
                assert await load(tier, block_of(number), MIB)
                for node in cluster.nodes:
                    node.kill()
                await until(lambda: not tier.describe_state()["connected"])
