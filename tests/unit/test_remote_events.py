"""Events between daemons through a real Valkey: what one has the other knows, or knows that it does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis as blocking_redis
from daemons import NS, key
from test_events import SCOPE, Held

from kvstore import peers, remote_events
from kvstore.errors import ProtocolError
from kvstore.peers import Peer
from kvstore.remote_events import EventExchange
from kvstore.testing.valkey import ValkeyCluster, ValkeyServer
from kvstore.types import TierCode

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_events, "BEAT_S", 0.05)
    monkeypatch.setattr(remote_events, "PAGE", 8)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path) as server:
        yield server


@asynccontextmanager
async def sharing(url: str, name: str, held: Held | None = None, **how: Any) -> AsyncIterator[EventExchange]:
    held = held or Held(capacity=1000)
    exchange = EventExchange(
        url, prefix="test", name=name, feed=held.feed, domain="uid-7", timeout_s=how.pop("timeout_s", 0.5), **how
    )
    exchange.start()
    try:
        yield exchange
    finally:
        await exchange.close()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def seen(follower: EventExchange, name: str) -> set[bytes] | None:
    """What a follower believes that another has."""
    peer = follower.peers.get(name)
    if peer is None or not peer.believed or not peer.alive():
        return None
    return set(peer.mirror.tiers.get(TierCode.HOST, {}).get(NS, {}))


def has(held: Held) -> set[bytes]:
    return set(held.scopes.get(SCOPE, {}))


async def test_one_knows_what_the_other_has(server: ValkeyServer) -> None:
    one, two = Held(1000), Held(1000)
    one.store(*range(50))
    async with sharing(server.url, "one", one), sharing(server.url, "two", two) as follower:
        await until(lambda: seen(follower, "one") == has(one))
        one.store(*range(100, 140))
        one.remove(3, 4, 101)
        await until(lambda: seen(follower, "one") == has(one))
        assert follower.state()["garbage"] == follower.state()["missed"] == 0
        assert "two" not in follower.peers, "nobody follows himself"


async def test_who_joins_later_and_who_leaves(server: ValkeyServer) -> None:
    one = Held(1000)
    async with sharing(server.url, "two") as follower:
        async with sharing(server.url, "one", one):
            one.store(*range(30))
            await until(lambda: seen(follower, "one") == has(one))
        await until(lambda: "one" not in follower.peers)
        async with sharing(server.url, "three", one), sharing(server.url, "four") as late:
            await until(lambda: seen(late, "three") == has(one) == seen(follower, "three"))


async def test_a_short_stream_begins_again_before_it_is_trimmed(server: ValkeyServer) -> None:
    one = Held(1000)
    async with sharing(server.url, "one", one, length=20) as publisher:
        for number in range(60):
            one.store(number)
            before = publisher.counts["published"]
            await until(lambda before=before: publisher.counts["published"] > before)
        assert publisher.counts["snapshots"] > 2
        async with sharing(server.url, "late") as follower:
            await until(lambda: seen(follower, "one") == has(one))
    client = blocking_redis.Redis.from_url(server.url)
    assert not client.exists("{test}:events:one"), "it says goodbye"


async def test_a_publisher_that_fell_behind_its_ring_publishes_a_snapshot(server: ValkeyServer) -> None:
    one = Held(capacity=10)
    async with sharing(server.url, "one", one) as publisher, sharing(server.url, "two") as follower:
        await until(lambda: seen(follower, "one") == set())
        server.signal(signal.SIGSTOP)
        for number in range(100):
            one.store(number)
        await asyncio.sleep(0.1)
        server.signal(signal.SIGCONT)
        await until(lambda: seen(follower, "one") == has(one))
        assert publisher.counts["snapshots"] >= 2


async def test_a_dead_server_is_met_again_and_nobody_waits(server: ValkeyServer) -> None:
    one = Held(1000)
    async with sharing(server.url, "one", one) as publisher, sharing(server.url, "two") as follower:
        one.store(1)
        await until(lambda: seen(follower, "one") == has(one))
        server.kill()
        await until(lambda: publisher.error)
        began = time.monotonic()
        one.store(*range(10, 60))
        assert time.monotonic() - began < 0.05
        server.start()  # it has forgotten everything
        await until(lambda: seen(follower, "one") == has(one))


async def test_a_daemon_that_died_without_goodbye_is_not_believed_for_long(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "DEAD_S", 0.5)
    one = Held(1000)
    async with sharing(server.url, "two") as follower, sharing(server.url, "one", one) as publisher:
        one.store(1)
        await until(lambda: seen(follower, "one") == has(one))
        for task in publisher._tasks:
            task.cancel()
        await until(lambda: seen(follower, "one") is None)
        assert follower.state()["peers"] == 0
        # Another life under the same name: nothing of the one before is believed.
        again = Held(1000)
        again.feed.boot = b"c" * 16
        again.store(2, 3)
        async with sharing(server.url, "one", again):
            await until(lambda: seen(follower, "one") == {key(2), key(3)})


@pytest.mark.parametrize("damage", ["hole", "garbage", "foreign"])
async def test_a_damaged_stream_is_not_believed_until_the_next_snapshot(server: ValkeyServer, damage: str) -> None:
    one = Held(1000)
    client = blocking_redis.Redis.from_url(server.url)
    async with sharing(server.url, "one", one, length=20) as publisher, sharing(server.url, "two") as follower:
        one.store(*range(9))
        await until(lambda: seen(follower, "one") == has(one))
        number = publisher._number
        last: Any = client.xrevrange("{test}:events:one", count=1)
        body = last[0][1][b"e"] if damage == "hole" else os.urandom(50)
        fields: Any = {"wrong": "fields"} if damage == "foreign" else {"n": number + 5, "e": body}
        client.xadd("{test}:events:one", fields)
        await until(lambda: seen(follower, "one") is None)
        for more in range(100, 130):
            one.store(more)
            before = publisher.counts["published"]
            await until(lambda before=before: publisher.counts["published"] > before)
        await until(lambda: seen(follower, "one") == has(one))


async def test_with_a_key_only_what_is_sealed_is_believed(server: ValkeyServer) -> None:
    one = Held(1000)
    one.store(1, 2)
    async with (
        sharing(server.url, "one", one, key=KEY),
        sharing(server.url, "liar", one),
        sharing(server.url, "two", key=KEY) as follower,
    ):
        await until(lambda: seen(follower, "one") == has(one))
        await until(lambda: follower.counts["garbage"] > 0)
        assert seen(follower, "liar") is None


async def test_nonsense_on_cards_is_passed_over(server: ValkeyServer) -> None:
    client = blocking_redis.Redis.from_url(server.url)
    client.hset(
        "{test}:daemons", mapping={"a": b"\xc1", "b": b"", b"\xff": os.urandom(40), "c": b"\x94\xa0\xa0\x00\xa1x"}
    )
    one = Held(1000)
    one.store(5)
    async with sharing(server.url, "one", one), sharing(server.url, "two") as follower:
        await until(lambda: seen(follower, "one") == has(one))


async def test_a_snapshot_of_whole_pages_is_believed_though_nothing_follows(server: ValkeyServer) -> None:
    one = Held(1000)
    one.store(*range(2 * remote_events.PAGE))
    async with sharing(server.url, "one", one), sharing(server.url, "two") as follower:
        await until(lambda: seen(follower, "one") == has(one))


@pytest.mark.parametrize("start", ["99999999999999999999999-0", "5--3", "5-99999999999999999999999", "-5-1", "1_0-1"])
async def test_a_place_that_is_none_keeps_nobody_from_following_others(server: ValkeyServer, start: str) -> None:
    client = blocking_redis.Redis.from_url(server.url)
    liar = msgspec.msgpack.encode(remote_events.Card(b"x" * 16, "", 1, start))
    client.hset("{test}:daemons", mapping={"liar": liar})  # pyright: ignore[reportArgumentType]
    one = Held(1000)
    one.store(5)
    async with sharing(server.url, "one", one), sharing(server.url, "two") as follower:
        await until(lambda: seen(follower, "one") == has(one))
        assert "liar" not in follower.peers


async def test_all_peers_together_may_not_have_without_end(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MAX_BLOCKS", 50)
    houses = [Held(1000) for _ in range(4)]
    for held in houses:
        held.store(*range(20))
    async with contextlib.AsyncExitStack() as stack:
        follower = await stack.enter_async_context(sharing(server.url, "zero"))
        for number, held in enumerate(houses):
            await stack.enter_async_context(sharing(server.url, f"n{number}", held))
        await until(lambda: follower.counts["garbage"] > 1 and len(follower.known()) == 2)
        assert sum(peer.mirror.blocks for peer in follower.peers.values()) <= 50


def test_a_peer_may_not_have_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_BLOCKS", 10)
    held = Held()
    held.store(*range(11))
    peer = Peer(b"", b"0-0")
    with pytest.raises(ProtocolError):
        peer.take(1, held.ask(held))


async def test_through_a_cluster(tmp_path: Path) -> None:
    one = Held(1000)
    one.store(*range(20))
    with ValkeyCluster(tmp_path) as cluster:
        async with (
            sharing(cluster.url, "one", one, cluster=True),
            sharing(cluster.url, "two", cluster=True) as follower,
        ):
            await until(lambda: seen(follower, "one") == has(one))
            one.store(100)
            await until(lambda: seen(follower, "one") == has(one))
