"""Events: numbered without a hole, merged along chains, caught up with after any absence, and nobody sees another's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from daemons import NAMESPACE, NS, TOKEN, DaemonProcess, MakeDaemon, key, payload, store

from kvstore import AsyncKVStoreClient, KVStoreClient
from kvstore.client import EventStream, Mirror
from kvstore.client.effects import Call
from kvstore.client.events import RESET, Event, Position, read_event
from kvstore.errors import ConnectionLost, InvalidParams, ProtocolError
from kvstore.events import Entry, EventLog, merge
from kvstore.feed import Feed
from kvstore.namespaces import NamespaceRegistry
from kvstore.types import BlockHeader, BlockId, Gone, Scope, TierCode
from kvstore.wire import messages as m

HOST = TierCode.HOST
SCOPE = Scope("uid-7", NS)
BOOT = b"b" * 16


def entry(number: int, parent: bytes = b"", reason: Gone | None = None, scope: Scope = SCOPE) -> Entry:
    return Entry(HOST, BlockId(scope, key(number)), 10 + number, parent, reason)


# -- merging -----------------------------------------------------------------------------------------------------------


def test_a_chain_becomes_one_event() -> None:
    (event,) = merge([entry(1, key(0)), entry(2, key(1)), entry(3, key(2))], 5, {SCOPE: 256})
    assert (event.seq, event.kind, event.parent, event.chained, event.block_tokens) == (5, "stored", key(0), True, 256)
    assert event.keys == key(1) + key(2) + key(3)
    assert event.nbytes == [11, 12, 13]


def test_a_chain_from_the_first_block_on_and_blocks_without_parents_are_told_apart() -> None:
    chain, loose = merge([entry(1), entry(2, key(1)), entry(3), entry(4)], 1, {})
    assert (chain.chained, chain.parent, chain.nbytes) == (True, b"", [11, 12])
    assert (loose.chained, loose.parent, loose.nbytes, loose.seq) == (False, b"", [13, 14], 3)
    # A first block, another first block, and one that follows that: a chain must not swallow the first.
    events = merge([entry(1), entry(2), entry(3, key(2))], 1, {})
    assert [(event.seq, event.chained, len(event.nbytes)) for event in events] == [(1, False, 2), (3, True, 1)]


def test_another_kind_tier_reason_or_namespace_is_another_event() -> None:
    other = Scope("uid-7", b"o" * 32)
    entries = [
        entry(1),
        entry(1, reason=Gone.EVICTED),
        entry(2, reason=Gone.EVICTED),
        entry(3, reason=Gone.DROPPED),
        entry(4, scope=other),
        Entry(TierCode.DISK, BlockId(other, key(5)), 1, b"", None),
    ]
    events = merge(entries, 1, {})
    assert [event.seq for event in events] == [1, 2, 4, 5, 6]
    assert [event.reason for event in events] == ["", "evicted", "dropped", "", ""]
    assert events[1].nbytes == []


def test_an_event_that_makes_no_sense_is_refused() -> None:
    good = m.Event(1, "stored", NS, 1, key(1), [5])
    assert read_event(good).keys == [key(1)]
    for wrong in (
        {"kind": "eaten"},
        {"tier": 9},
        {"tier": 0},
        {"keys": b"short"},
        {"nbytes": []},
        {"nbytes": [-1]},
        {"ns": b""},
        {"reason": "bored"},
    ):
        fields: dict[str, Any] = {name: getattr(good, name) for name in m.Event.__struct_fields__} | wrong
        with pytest.raises(ProtocolError):
            read_event(m.Event(**fields))


# -- the log and its feed ----------------------------------------------------------------------------------------------


class Held:
    """Blocks of one tier, as a feed reads them; tells the log of every change."""

    def __init__(self, capacity: int = 100) -> None:
        self.log = EventLog(capacity)
        self.scopes: dict[Scope, dict[bytes, Any]] = {}
        holdings = {HOST: (lambda: self.scopes, lambda scope: self.scopes.get(scope, {}))}
        self.feed = Feed(self.log, holdings, NamespaceRegistry(), BOOT)

    def store(self, *numbers: int, scope: Scope = SCOPE) -> None:
        for number in numbers:
            self.scopes.setdefault(scope, {})[key(number)] = entry(number)
            self.log.stored(HOST, BlockId(scope, key(number)), 10 + number, b"")

    def remove(self, *numbers: int) -> None:
        for number in numbers:
            del self.scopes[SCOPE][key(number)]
            self.log.removed(HOST, BlockId(SCOPE, key(number)), Gone.EVICTED)

    def ask(self, who: object, **p: Any) -> m.EventsReply:
        reply = self.feed.answer(who, "uid-7", m.Events(**p))
        assert isinstance(reply, m.EventsReply)
        return reply


class Subscriber:
    """Asks as a client does."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.mirror = Mirror()
        self.next: dict[str, Any] = {}
        self.resets = 0

    def step(self, limit: int = 1000) -> int:
        reply = self.held.ask(self, **self.next, limit=limit)
        self.next = {"boot": reply.boot, "after": reply.after, "snapshot": reply.snapshot}
        self.resets += reply.reset
        if reply.reset:
            self.mirror.apply(Event(RESET, reply.after))
        for event in reply.events:
            self.mirror.apply(read_event(event))
        return len(reply.events) + reply.reset + bool(reply.snapshot)

    def catch_up(self, limit: int = 1000) -> None:
        while self.step(limit):
            pass
        truth = {ns: {k: v.nbytes for k, v in held.items()} for (_, ns), held in self.held.scopes.items() if held}
        assert self.mirror.tiers.get(HOST, {}) == truth
        assert self.mirror.blocks == sum(map(len, truth.values()))


def test_nothing_is_kept_until_somebody_asks() -> None:
    held = Held()
    held.store(*range(50))
    assert held.feed.state()["logged"] == 0
    Subscriber(held).catch_up()
    held.store(51)
    assert held.feed.state()["logged"] == 1


def test_a_snapshot_in_pages_while_the_world_goes_on_ends_right() -> None:
    held = Held()
    held.store(*range(20))
    other = Scope("uid-7", b"o" * 32)
    held.store(*range(5), scope=other)
    subscriber = Subscriber(held)
    assert subscriber.step(limit=5)
    held.remove(1, 2, 18, 19)
    held.store(30, 1)
    assert subscriber.step(limit=5)
    held.remove(30)
    subscriber.catch_up(limit=5)
    assert subscriber.resets == 1


def test_a_page_that_ends_with_a_namespace_does_not_begin_it_again() -> None:
    held = Held()
    held.store(*range(8))
    subscriber = Subscriber(held)
    pages = 0
    while subscriber.step(limit=4):
        pages += 1
        assert pages < 6
    assert subscriber.mirror.blocks == 8


def test_who_fell_behind_gets_a_snapshot_and_who_did_not_gets_none() -> None:
    held = Held(capacity=10)
    subscriber = Subscriber(held)
    subscriber.catch_up()
    held.store(*range(10))
    subscriber.catch_up()
    assert (subscriber.resets, held.feed.state()["gaps"]) == (1, 0)
    held.store(*range(10, 21))
    subscriber.catch_up()
    assert (subscriber.resets, held.feed.state()["gaps"]) == (2, 1)


def test_a_place_of_another_life_or_from_the_future_is_no_place() -> None:
    held = Held()
    held.log.of("uid-7")
    held.store(1, 2)
    somebody = Subscriber(held)
    assert held.ask(somebody, boot=BOOT, after=1).events[0].seq == 2
    assert held.ask(somebody, boot=b"x" * 16, after=1).reset
    assert held.ask(somebody, boot=BOOT, after=3).reset
    assert held.ask(somebody, boot=BOOT, after=0, snapshot=77).reset, "a snapshot of another connection"


def test_other_domains_are_not_even_counted() -> None:
    held = Held()
    subscriber = Subscriber(held)
    subscriber.catch_up()
    foreign = Scope("uid-8", NS)
    held.log.of("uid-8")
    held.store(*range(9), scope=foreign)
    held.store(100)
    (event,) = held.ask(subscriber, **subscriber.next).events
    assert (event.seq, event.keys) == (1, key(100))
    assert not any(read_event(e).keys != [key(100)] for e in held.ask(subscriber).events)


async def test_waiting_ends_with_the_first_event_or_the_time() -> None:
    held = Held()
    somebody = Subscriber(held)
    held.ask(somebody)
    began = time.monotonic()
    late = await held.feed.answer(somebody, "uid-7", m.Events(BOOT, 0, 0, 0.05))  # type: ignore[misc]
    assert (late.events, late.after) == ([], 0)
    assert 0.04 < time.monotonic() - began < 5
    waiting = asyncio.ensure_future(held.feed.answer(somebody, "uid-7", m.Events(BOOT, 0, 0, 30)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert held.feed.state()["waiting"] == 1
    held.store(1, 2, 3)
    reply = await asyncio.wait_for(waiting, 5)
    assert reply.after == 3, "what happened in one go comes in one reply"
    assert held.feed.state()["waiting"] == 0


async def test_who_is_overrun_while_he_waits_gets_a_snapshot() -> None:
    held = Held(capacity=4)
    waiting = asyncio.ensure_future(held.feed.answer(held, "uid-7", m.Events(BOOT, 0, 0, 30)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    held.store(*range(9))
    assert (await asyncio.wait_for(waiting, 5)).reset


# -- over the socket ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[KVStoreClient]:
    with KVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20) as client:
        yield client
        client.drop(None)


def drain(stream: EventStream, mirror: Mirror) -> list[Event]:
    """Everything there is now."""
    seen: list[Event] = []
    while events := stream.poll():
        for event in events:
            mirror.apply(event)
        seen += events
    return seen


def test_a_subscriber_sees_what_is_stored_and_dropped(client: KVStoreClient) -> None:
    store(client, [key(1)])
    mirror = Mirror()
    with client.events() as stream:
        assert [event.kind for event in drain(stream, mirror)] == ["reset", "held"]
        chain = client.keys(range(1024))
        header = [BlockHeader(parent=b"" if not i else chain[i - 1]) for i in range(4)]
        client.put_many([(k, payload(k), h) for k, h in zip(chain, header, strict=True)])
        (event,) = drain(stream, mirror)
        assert (event.kind, event.keys, event.chained, event.parent) == ("stored", chain, True, b"")
        assert (event.tier, event.ns, event.block_tokens) == (HOST, NS, 256)
        assert mirror.locate(NAMESPACE, chain) == [(HOST, len(payload(chain[0])))] * 4
        client.drop(chain[1:2])
        (event,) = drain(stream, mirror)
        assert (event.kind, event.keys, event.reason) == ("removed", chain[1:2], Gone.DROPPED)
        assert len(mirror.locate(NAMESPACE, chain)) == 1
        place = stream.position
    client.drop(chain[2:3])
    with client.events(place) as stream:
        (event,) = drain(stream, mirror)
        assert event.keys == chain[2:3], "goes on where it was"


def test_the_iteration_waits_and_ends_when_nothing_happens(client: KVStoreClient) -> None:
    with client.events(idle_s=0.2) as stream:
        seen = [event.kind for event in stream]
        assert seen[0] == "reset"
        store(client, [key(2)])
        began = time.monotonic()
        assert [event.kind for event in stream] == ["stored"]
        assert time.monotonic() - began >= 0.2


def test_an_iteration_that_is_left_loses_nothing(client: KVStoreClient) -> None:
    """Events come many in one reply: what was not handed out yet is neither behind the position nor gone."""
    with client.events() as stream:
        stream.poll()
        store(client, [key(1)])
        client.drop([key(1)])
        store(client, [key(2)])
        for event in stream:
            assert (event.kind, event.keys) == ("stored", [key(1)])
            break
        place = stream.position
        left = [(event.kind, event.keys) for event in stream.poll()]
        assert left == [("removed", [key(1)]), ("stored", [key(2)])]
    with client.events(place, idle_s=0.05) as again:
        assert [(event.kind, event.keys) for event in again] == left


def test_a_snapshot_that_was_not_read_to_its_end_is_not_a_position(client: KVStoreClient) -> None:
    store(client, [key(1)])
    with client.events() as stream:
        for event in stream:
            assert event.kind == "reset"
            break
        assert stream.position == Position()
        assert [event.kind for event in stream.poll()] == ["held"]
        assert stream.position.boot


def test_who_waits_for_nothing_sees_what_is_there(client: KVStoreClient) -> None:
    store(client, [key(1)])
    with client.events(idle_s=0) as stream:
        assert [event.kind for event in stream] == ["reset", "held"]


async def test_asyncio_subscribers_wait_without_holding_up_other_calls(shared_daemon: DaemonProcess) -> None:
    async with AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20) as client:
        stream = client.events()
        await stream.poll()
        waiting = asyncio.ensure_future(stream.poll(30))
        await asyncio.sleep(0.02)
        await client.put(key(3), payload(key(3)))
        (event,) = await asyncio.wait_for(waiting, 10)
        assert event.keys == [key(3)]
        await client.drop([key(3)])
        assert [event.kind async for event in client.events(stream.position, idle_s=0.05)] == ["removed"]


def test_remote_subscribers_too(shared_daemon: DaemonProcess, tcp_port: int, client: KVStoreClient) -> None:
    mirror = Mirror()
    store(client, [key(4)])
    with KVStoreClient(f"tcp://127.0.0.1:{tcp_port}", token=TOKEN).events() as stream:
        drain(stream, mirror)
    assert mirror.locate(NAMESPACE, [key(4)]) != []


def test_bad_questions_are_refused(client: KVStoreClient) -> None:
    def ask(params: m.Events) -> Any:
        yield Call("events", params)

    for bad in (m.Events(limit=0), m.Events(limit=m.MAX_KEYS + 1), m.Events(after=-1), m.Events(boot=b"x" * 17)):
        with pytest.raises(InvalidParams):
            client.drive(ask(bad), None)


def test_eviction_and_disk_are_told_and_a_restart_is_a_reset(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"disk.bytes": "64MiB", "host.bytes": "2MiB"})
    daemon.start()
    mirror = Mirror()
    with KVStoreClient(daemon.socket, namespace=NAMESPACE, timeout_s=20) as client, client.events() as stream:
        drain(stream, mirror)
        for first in range(0, 150, 10):
            store(client, [key(n) for n in range(first, first + 10)], wait_s=5)
        kinds: set[tuple[str, TierCode, Gone | None]] = set()
        deadline = time.monotonic() + 20
        while len(mirror.tiers.get(TierCode.DISK, {}).get(NS, {})) < 150:
            kinds |= {(event.kind, event.tier, event.reason) for event in drain(stream, mirror)}
            assert time.monotonic() < deadline
        assert ("removed", HOST, Gone.EVICTED) in kinds
        assert mirror.locate(NAMESPACE, [key(0)])[0][0] == TierCode.DISK
        held = client.stats()["tiers"]["host"]["blocks"]
        assert len(mirror.tiers[HOST][NS]) == held < 150
        daemon.kill()
        with pytest.raises(ConnectionLost):
            stream.poll()
        daemon.start()
        seen = drain(stream, mirror)
        assert seen[0].kind == "reset"
        assert HOST not in mirror.tiers
        assert len(mirror.tiers[TierCode.DISK][NS]) == 150
