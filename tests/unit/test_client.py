"""Both faces of the client against a real daemon: they do the same, they keep their deadlines, they leak nothing.

A daemon that hangs, dies or restarts costs an error and no more. What a call was granted after its caller had given up
is given back. Most tests have one body, run over the blocking face and the asyncio face.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from daemons import (
    NAMESPACE,
    SMALL,
    DaemonProcess,
    MakeDaemon,
    header,
    is_miss,
    is_right,
    key,
    payload,
    process,
    store,
    until,
)

from kvstore import AsyncKVStoreClient, KVStoreClient, Namespace
from kvstore.client.core import Core
from kvstore.client.mailbox import Mailbox
from kvstore.errors import (
    ConnectionLost,
    DeadlineExceeded,
    FrameTooLarge,
    InvalidParams,
    KVStoreError,
    LeaseExpired,
    LimitExceeded,
    ProtocolError,
    Unavailable,
)
from kvstore.types import BlockHeader, Dropped, DropReason, Exists, MissReason, Stored, TierCode
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m

BIG = 1 << 20
"""Bytes of a block that the asyncio face copies in a thread."""
SOON_S = 1.5
"""What a busy machine may add to a deadline."""


class Face:
    """One face of the client, called the same way whichever it is."""

    def __init__(self, is_async: bool, address: str, **how: Any) -> None:
        make: Any = AsyncKVStoreClient if is_async else KVStoreClient
        self.is_async = is_async
        self.client = make(address, **{"namespace": NAMESPACE, "timeout_s": 20, **how})

    async def do(self, method: Callable[..., Any], *args: Any, **how: Any) -> Any:
        """Run a method of the client, or of a reservation."""
        if self.is_async:
            return await method(*args, **how)
        return await asyncio.to_thread(method, *args, **how)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda *args, **how: self.do(getattr(self.client, name), *args, **how)


MakeFace = Callable[..., Face]


@pytest.fixture(params=["sync", "async"])
async def make_face(request: pytest.FixtureRequest) -> AsyncIterator[MakeFace]:
    """Makes clients of one face."""
    made: list[Face] = []

    def make(address: str, **how: Any) -> Face:
        made.append(Face(request.param == "async", address, **how))
        return made[-1]

    yield make
    for face in made:
        await face.close()


@pytest.fixture
async def face(make_face: MakeFace, shared_daemon: DaemonProcess) -> Face:
    """A client of the shared daemon."""
    return make_face(shared_daemon.socket)


async def soon(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition without holding up the loop."""
    await asyncio.to_thread(until, condition, what)


# -- what it does ------------------------------------------------------------------------------------------------------


async def test_put_get_lookup_drop(face: Face) -> None:
    kind = f"round {face.is_async}"
    keys = [key(n, kind) for n in range(5)]
    items = [(k, payload(k, 1000 + n), header(k)) for n, k in enumerate(keys)]
    assert await face.lookup(keys) == []
    assert await face.put_many(items[:3]) == [Stored()] * 3
    assert await face.put_many(items) == [Exists()] * 3 + [Stored()] * 2
    assert await face.put(*items[0]) == Exists()
    assert await face.lookup([*keys, key(99, kind)]) == [TierCode.HOST] * 5
    assert await face.lookup([key(99, kind), *keys]) == []
    assert await face.lookup([key(99, kind), *keys], prefix=False) == [TierCode.ABSENT, *[TierCode.HOST] * 5]
    assert all(map(is_right, keys, await face.get_many(keys)))
    assert is_right(keys[0], await face.get(keys[0]))
    assert is_miss(await face.get(key(99, kind)), MissReason.ABSENT)
    assert await face.pin(keys) == 5
    assert await face.unpin([*keys, key(99, kind)]) == 5
    assert await face.prefetch(keys) == 0
    assert await face.drop(keys[:2]) == 2
    assert await face.drop(keys[:2]) == 0
    assert await face.lookup(keys, prefix=False) == [TierCode.ABSENT] * 2 + [TierCode.HOST] * 3
    assert await face.drop() >= 3
    assert await face.lookup(keys, prefix=False) == [TierCode.ABSENT] * 5


async def test_get_into_buffers(face: Face) -> None:
    kind = f"into {face.is_async}"
    keys = [key(n, kind) for n in range(3)]
    await face.put_many([(k, payload(k, BIG), header(k)) for k in keys[:2]])
    buffers = [bytearray(BIG) for _ in keys]
    found = await face.get_into(keys, buffers)
    assert [bytes(b) == payload(k, BIG) for k, b in zip(keys, buffers, strict=True)] == [True, True, False]
    assert [o.nbytes for o in found[:2]] == [BIG] * 2
    assert is_miss(found[2], MissReason.ABSENT)
    for wrong in ([bytearray(BIG - 1)], [bytes(BIG)], [memoryview(bytearray(2 * BIG))[::2]]):
        with pytest.raises(InvalidParams):
            await face.get_into(keys[:1], wrong)
    with pytest.raises(InvalidParams):
        await face.get_into(keys, buffers[:2])


async def test_lease_and_reserve_in_place(face: Face, shared_daemon: DaemonProcess) -> None:
    kind = f"place {face.is_async}"
    keys = [key(n, kind) for n in range(3)]
    reservation = await face.reserve([(k, SMALL, header(k)) for k in keys])
    for k, room in zip(keys[:2], reservation.blocks[:2], strict=True):
        room.write(payload(k))
    assert reservation.valid()
    outcomes = await face.do(reservation.commit, [0, 1])
    assert outcomes == [Stored(), Stored(), Dropped(DropReason.ABORTED)]
    assert not reservation.valid()
    lease = await face.lease(keys, headers=True)
    with lease:
        assert lease.valid()
        for k, block in zip(keys[:2], lease.blocks[:2], strict=True):
            with pytest.raises(InvalidParams):
                await face.read(lease, block, bytearray(SMALL + 1))
            buffer = bytearray(SMALL)
            await face.read(lease, block, buffer)
            assert bytes(buffer) == block.array.tobytes() == payload(k)
            assert block.header == header(k)
        assert is_miss(lease.blocks[2], MissReason.ABSENT)
        assert lease.valid()
    assert not lease.valid()
    lease.release()
    await soon(shared_daemon.nothing_lent, "everything to be given back")


async def test_a_reservation_left_alone_is_given_back(face: Face, shared_daemon: DaemonProcess) -> None:
    reservation = await face.reserve([(key(1, "left"), SMALL, BlockHeader())])
    reservation.abort()
    reservation.abort()
    await soon(shared_daemon.nothing_lent, "everything to be given back")
    assert await face.do(reservation.commit) == [Dropped(DropReason.ABORTED)]


async def test_several_namespaces_in_one_round_trip(face: Face) -> None:
    spaces = [Namespace(model="ranks", tp_rank=n, tp_size=3) for n in range(3)]
    own = key(1, f"ranks {face.is_async}")
    await face.put(own, b"x", namespace=spaces[1])
    queries = [(space, [own]) for space in spaces]
    assert await face.lookup_many(queries) == [[], [TierCode.HOST], []]


@pytest.mark.parametrize("bad", [b"short", b"", bytes(33)])
async def test_keys_that_are_none(face: Face, bad: bytes) -> None:
    for call in (face.lookup, face.lease, face.get_many, face.pin, face.unpin, face.drop, face.prefetch):
        with pytest.raises(InvalidParams):
            await call([key(1), bad])
    with pytest.raises(InvalidParams):
        await face.put(bad, b"data")
    assert await face.lookup([key(1, "none")]) == []


async def test_without_a_namespace(make_face: MakeFace, shared_daemon: DaemonProcess) -> None:
    face = make_face(shared_daemon.socket, namespace=None)
    with pytest.raises(InvalidParams):
        await face.lookup([key(1)])
    assert await face.lookup([key(1, "nowhere")], namespace=NAMESPACE) == []


async def test_blocks_with_large_headers(make_face: MakeFace, make_daemon: MakeDaemon) -> None:
    """More header bytes than a reply holds: the client asks in parts."""
    face = make_face(make_daemon({"host.bytes": "128MiB"}).start().socket)
    kind = "headers"
    keys = [key(n, kind) for n in range(40)]
    large = [BlockHeader(tokens=k * 1900) for k in keys]
    for k, h in zip(keys, large, strict=True):
        assert await face.put(k, payload(k, 100), h) == Stored()
    with pytest.raises(LimitExceeded):
        await face.lease(keys, headers=True)
    found = await face.get_many(keys)
    assert [f.header for f in found] == large
    assert [bytes(f.data) for f in found] == [payload(k, 100) for k in keys]
    buffers = [bytearray(100) for _ in keys]
    await face.get_into(keys, buffers)
    assert [bytes(b) for b in buffers] == [payload(k, 100) for k in keys]


async def test_a_request_too_large_does_not_cost_the_connection(face: Face) -> None:
    lease = await face.lease([])
    items = [(key(n, "large"), b"x", BlockHeader(tokens=bytes(60_000))) for n in range(80)]
    with pytest.raises(FrameTooLarge):
        await face.put_many(items)
    assert lease.valid()
    assert await face.lookup([key(1, "large")]) == []


async def test_after_close_it_connects_again(face: Face) -> None:
    await face.lookup([])
    lease = await face.lease([])
    await face.close()
    await face.close()
    assert not lease.valid()
    assert face.client.boot is None
    assert await face.lookup([]) == []
    assert not lease.valid()
    lease.release()


async def test_many_at_once_from_the_start(face: Face) -> None:
    """All wait for the one connection that the first of them makes."""
    tasks = []
    for n in range(20):
        tasks.append(asyncio.ensure_future(face.lookup([key(n, "at once")])))
        await asyncio.sleep(0)
        if n % 4 == 0:
            await asyncio.sleep(0.0005)
    assert await asyncio.gather(*tasks) == [[]] * 20


# -- a daemon that hangs -----------------------------------------------------------------------------------------------


def calls(face: Face, kind: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """A call of each sort, on blocks of their own."""
    fresh = iter(range(1000))
    return {
        "lookup": lambda: face.lookup([key(0, kind)]),
        "lease": lambda: face.lease([key(0, kind)], wait_s=0),
        "get": lambda: face.get(key(0, kind), wait_s=0),
        "reserve": lambda: face.reserve([(key(next(fresh), kind + " new"), SMALL, BlockHeader())]),
        "put": lambda: face.put(key(next(fresh), kind + " new"), payload(key(0)), wait_s=0),
        "stats": lambda: face.stats(),
    }


@pytest.mark.parametrize("name", ["lookup", "lease", "get", "reserve", "put", "stats"])
async def test_a_hung_daemon_costs_one_deadline_and_nothing_stays_lent(
    make_face: MakeFace, shared_daemon: DaemonProcess, name: str
) -> None:
    kind = f"hung {name}"
    await asyncio.to_thread(store, shared_daemon.client(), [key(0, kind)])
    face = make_face(shared_daemon.socket, timeout_s=0.15)
    call = calls(face, kind)[name]
    with shared_daemon.hung():
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):  # connects, and gets no answer to its hello
            await call()
        assert 0.14 < time.monotonic() - began < 0.15 + SOON_S
    face.client.timeout_s = 20
    await call()
    face.client.timeout_s = 0.15
    with shared_daemon.hung():
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await call()
            assert 0.14 < time.monotonic() - began < 0.15 + SOON_S
    face.client.timeout_s = 20
    boot = face.client.boot
    assert await face.lookup([key(0, kind)]) == [TierCode.HOST]
    assert face.client.boot == boot  # the same connection
    del call
    gc.collect()
    if name in ("lease", "reserve"):  # the call that went well still holds what it was granted; the late ones do not
        field = name + "s" if name == "lease" else "reservations"
        await soon(lambda: shared_daemon.stats()[field] == 1, "late grants to be given back")
        await face.close()
    await soon(shared_daemon.nothing_lent, "everything to be given back")


async def test_after_too_many_lost_answers_the_connection_is_replaced(
    make_face: MakeFace, shared_daemon: DaemonProcess
) -> None:
    face = make_face(shared_daemon.socket)
    lease = await face.lease([])
    shared_daemon.pause()
    try:
        for _ in range(70):
            with pytest.raises(Unavailable):
                await face.lookup([], timeout_s=0.002)
        assert not lease.valid()
    finally:
        shared_daemon.resume()
    assert await face.lookup([]) == []


async def test_each_keeps_its_own_deadline_while_another_connects(shared_daemon: DaemonProcess) -> None:
    async with AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20) as client:
        with shared_daemon.hung():
            patient = asyncio.ensure_future(client.lookup([]))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.lookup([], timeout_s=0.1)
            assert time.monotonic() - began < 0.1 + SOON_S
        assert await patient == []


async def test_an_interrupted_call_does_not_spoil_the_next(shared_daemon: DaemonProcess) -> None:
    """Ctrl-C while waiting: the answer that comes later is not taken for that of the next call."""
    client = shared_daemon.client()
    store(client, [key(1, "interrupted")])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with shared_daemon.hung():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                client.lease([key(1, "interrupted")])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert client.lookup([key(2, "interrupted")]) == []
    assert client.lookup([key(1, "interrupted")]) == [TierCode.HOST]
    until(shared_daemon.nothing_lent, "everything to be given back")


# -- a daemon that goes away -------------------------------------------------------------------------------------------


async def test_a_killed_daemon_and_its_successor(make_face: MakeFace, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    face = make_face(daemon.socket)
    own = key(1)
    await face.put(own, payload(own), header(own))
    boot = face.client.boot
    lease = await face.lease([own])
    reservation = await face.reserve([(key(2), SMALL, BlockHeader())])
    assert lease.valid()
    assert reservation.valid()
    daemon.kill()
    assert not lease.valid()
    assert not reservation.valid()
    assert bytes(lease.blocks[0].array) == payload(own)  # memory that is still mapped is no crash
    with pytest.raises(ConnectionLost):
        await face.lookup([own])
    with pytest.raises(ConnectionLost):
        await face.lookup([own])
    daemon.start()
    assert await face.lookup([own]) == []
    assert face.client.boot not in (None, boot)
    assert not lease.valid()
    with pytest.raises(LeaseExpired):
        await face.do(reservation.commit)
    lease.release()
    await face.put(own, payload(own), header(own))
    assert is_right(own, await face.get(own))
    assert daemon.stats()["leases"] == 0


async def test_killed_while_calls_wait(make_face: MakeFace, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    face = make_face(daemon.socket)
    await face.lookup([])
    daemon.pause()
    waiting = asyncio.ensure_future(face.lookup([key(1)]))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    daemon.kill()
    with pytest.raises(ConnectionLost):
        await waiting
    assert time.monotonic() - began < SOON_S


async def test_nobody_there(make_face: MakeFace, workdir: Any) -> None:
    face = make_face(str(workdir / "nobody"))
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(ConnectionLost):
            await face.lookup([])
    assert time.monotonic() - began < SOON_S
    assert face.client.boot is None


async def test_a_daemon_that_stops_in_good_order(make_face: MakeFace, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    face = make_face(daemon.socket)
    lease = await face.lease([])
    assert await asyncio.to_thread(daemon.stop) == 0
    assert not lease.valid()
    with pytest.raises(ConnectionLost):
        await face.lookup([])
    assert not os.path.exists(daemon.socket)


async def test_a_handle_of_the_daemon_before_is_no_handle_of_this_one(make_daemon: MakeDaemon) -> None:
    """Numbers of handles do not begin again, so an operation that was overtaken by a restart cannot hit another's."""
    daemon = make_daemon()
    seen: set[int] = set()
    for _ in range(3):
        daemon.start()
        with daemon.client() as client:
            for _ in range(20):
                number = client.lease([]).id
                assert number not in seen
                seen.add(number)
        daemon.kill()


# -- time --------------------------------------------------------------------------------------------------------------


async def test_a_lease_ends_here_before_it_ends_there(face: Face, shared_daemon: DaemonProcess) -> None:
    own = key(1, f"expiry {face.is_async}")
    await face.put(own, payload(own), header(own))
    lease = await face.lease([own], ttl_s=0.5)
    was_valid = lease.valid()
    assert was_valid

    def ended_there() -> bool:
        ended = shared_daemon.stats()["leases"] == 0
        assert not (ended and lease.valid())
        return ended

    await soon(ended_there, "the lease to end")
    assert shared_daemon.stats()["leases_expired"] >= 1
    buffer = bytearray(SMALL)
    await face.read(lease, lease.blocks[0], buffer)  # mapped memory can be read, but it counts for nothing
    assert not lease.valid()
    lease.release()


async def test_an_expired_reservation_cannot_be_committed(face: Face, shared_daemon: DaemonProcess) -> None:
    own = key(2, f"expiry {face.is_async}")
    reservation = await face.reserve([(own, SMALL, BlockHeader())], ttl_s=0.05)
    await soon(lambda: not reservation.valid(), "the reservation to expire")
    with pytest.raises(LeaseExpired):
        await face.do(reservation.commit)
    assert await face.lookup([own]) == []
    await soon(shared_daemon.nothing_lent, "everything to be given back")


async def test_times_are_cut_to_the_daemons_limit(face: Face) -> None:
    lease = await face.lease([], ttl_s=80_000)
    assert lease._expires - time.monotonic() <= 30
    lease.release()
    with pytest.raises(InvalidParams):
        await face.lease([], ttl_s=-1)


# -- cancellation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "lease", "get", "reserve", "put"])
async def test_cancelled_at_any_await_nothing_stays_lent(shared_daemon: DaemonProcess, name: str) -> None:
    """Turns of the loop before the cancellation, one more each time, until the operation ends before it."""
    kind = f"cancel {name}"
    own = key(0, kind)
    await asyncio.to_thread(store, shared_daemon.client(), [own], BIG)
    fresh = iter(range(1, 10_000))

    def operation(client: AsyncKVStoreClient) -> Awaitable[Any]:
        new = key(next(fresh), kind)
        return {
            "lookup": lambda: client.lookup([own]),
            "lease": lambda: client.lease([own]),
            "get": lambda: client.get(own),
            "reserve": lambda: client.reserve([(new, SMALL, BlockHeader())]),
            "put": lambda: client.put(new, payload(new, BIG)),
        }[name]()

    cancelled = 0
    for warm in (False, True):
        for turns in range(200):
            client = AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20)
            if warm:
                await client.lookup([])
            task = asyncio.ensure_future(operation(client))
            for _ in range(turns):
                await asyncio.sleep(0)
                if not turns % 3:
                    time.sleep(0.0002)  # let the daemon's answer come in this very turn
            task.cancel()
            try:
                outcome = await task
            except asyncio.CancelledError:
                cancelled += 1
                if turns % 8 == 0:
                    await client.stats()  # what was granted too late has come by now, and was given back
                    stats = await client.stats()
                    assert stats["leases"] == stats["reservations"] == 0, turns
                await client.close()
                continue
            await client.close()
            del outcome
            break
        else:
            pytest.fail("the operation never ended")
    assert cancelled > 4
    await soon(shared_daemon.nothing_lent, "everything to be given back")


async def test_cancelled_while_a_thread_copies_the_memory_stays_ours_until_it_has_ended(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither cancelling nor closing gives memory back that a thread is still writing into."""
    begun, go = threading.Event(), threading.Event()

    def slow_write(self: Any, buffer: Any) -> None:
        begun.set()
        assert go.wait(20)

    monkeypatch.setattr("kvstore.client.blocks.Room.write", slow_write)
    client = AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20)
    task = asyncio.ensure_future(client.put(key(1, "slow"), bytes(BIG)))
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    await client.close()
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    assert shared_daemon.stats()["reservations"] == 1
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await soon(shared_daemon.nothing_lent, "everything to be given back")


async def test_operations_that_wait_are_told_when_the_client_is_closed(shared_daemon: DaemonProcess) -> None:
    client = AsyncKVStoreClient(shared_daemon.socket, namespace=NAMESPACE, timeout_s=20)
    await client.lookup([])
    with shared_daemon.hung():
        waiting = [asyncio.ensure_future(client.lookup([])) for _ in range(3)]
        await asyncio.sleep(0.02)
        await client.close()
        began = time.monotonic()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, ConnectionLost)
        assert time.monotonic() - began < SOON_S


# -- a client that dies ------------------------------------------------------------------------------------------------


def hold_everything(address: str, ready: Connection) -> None:
    """In another process: take leases and reservations, say so, and wait to be killed."""
    client = KVStoreClient(address, namespace=NAMESPACE)
    held: list[Any] = [client.lease([key(n, "held") for n in range(4)]) for _ in range(5)]
    held += [client.reserve([(key(n, "room"), SMALL, BlockHeader())]) for n in range(5)]
    ready.send(len(held))
    signal.pause()


async def test_a_client_killed_frees_what_it_held_at_once(shared_daemon: DaemonProcess) -> None:
    import multiprocessing

    with shared_daemon.client() as client:
        store(client, [key(n, "held") for n in range(4)])
    here, there = multiprocessing.Pipe()
    other = process(hold_everything, shared_daemon.socket, there)
    try:
        assert here.poll(20)
        assert here.recv() == 10
        stats = shared_daemon.stats()
        assert (stats["leases"], stats["reservations"]) == (5, 5)
        assert stats["tiers"]["host"]["leased_bytes"] == 4 * SMALL
        assert stats["tiers"]["host"]["writing_bytes"] == 5 * SMALL
    finally:
        other.kill()
        other.join()
    until(shared_daemon.nothing_lent, "everything to be given back", 2)
    assert shared_daemon.stats()["tiers"]["host"]["writing_bytes"] == 0


# -- several threads ---------------------------------------------------------------------------------------------------


async def test_threads_share_a_client(shared_daemon: DaemonProcess) -> None:
    client = shared_daemon.client()
    failures: list[BaseException] = []

    def work(own: int) -> None:
        try:
            for n in range(20):
                mine = key(n, f"thread {own}")
                assert client.put(mine, payload(mine, 500), header(mine)) == Stored()
                assert is_right(mine, client.get(mine))
                client.lease([mine]).release()
                assert client.drop([mine]) == 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(shared_daemon.nothing_lent, "everything to be given back")


# -- the mailbox, without a daemon -------------------------------------------------------------------------------------


class Told:
    """A mailbox and what it told the daemon."""

    def __init__(self) -> None:
        self.said: list[tuple[str, m.Message]] = []
        self.mailbox = Mailbox(lambda method, params: self.said.append((method, params)))

    def hear(self, data: bytes) -> None:
        self.mailbox.reader.buffer()[: len(data)] = data
        self.mailbox.reader.advance(len(data))

    def reply(self, call_id: int, result: m.Message) -> None:
        self.hear(frame.pack(envelope.encode_reply(call_id, result)))


def test_a_late_lease_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("lease", m.Lease(bytes(32), b""), 0, [])
    assert told.mailbox.abandon(pending)
    told.reply(1, m.LeaseReply(77, 30.0, [], [], 3))
    assert told.said == [("release", m.Release([77]))]


def test_a_late_reservation_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("reserve", m.Reserve(bytes(32), []), 0, [])
    assert told.mailbox.abandon(pending)
    told.reply(1, m.ReserveReply(78, 30.0, [], []))
    assert told.said == [("abort", m.Abort(78))]


def test_a_grant_that_comes_in_the_moment_of_giving_up_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("lease", m.Lease(bytes(32), b""), 0, [])
    told.reply(1, m.LeaseReply(77, 30.0, [], [], 0))
    assert told.said == []
    assert told.mailbox.abandon(pending)
    assert told.said == [("release", m.Release([77]))]


def test_an_answer_into_a_callers_buffer_cannot_be_abandoned() -> None:
    told = Told()
    pending, _ = told.mailbox.call("fetch", m.Fetch(1, 0), 0, [memoryview(bytearray(10))])
    assert not told.mailbox.abandon(pending)


@pytest.mark.parametrize(
    "answer",
    [
        envelope.encode_reply(2, m.Empty()),  # to a call that was not made
        envelope.encode_reply(1, m.CountReply(1)),  # of another verb
        envelope.encode_request(1, "lookup", m.Lookup(bytes(32), b"")),
        envelope.encode_notice("unknown", m.Empty()),
        b"\xc1",
        b"",
    ],
)
def test_an_answer_that_cannot_be_is_a_protocol_error(answer: bytes) -> None:
    told = Told()
    pending, _ = told.mailbox.call("lookup", m.Lookup(bytes(32), b""), 0, [])
    with pytest.raises(ProtocolError):
        told.hear(frame.pack(answer))
    woken: list[bool] = []
    pending.wake = lambda: woken.append(True)
    told.mailbox.fail(ConnectionLost("gone."))  # what the face does next reaches the caller who waits
    assert woken == [True]
    assert isinstance(pending.result, KVStoreError)


def test_what_the_daemon_says_of_the_connection_is_raised() -> None:
    told = Told()
    with pytest.raises(FrameTooLarge):
        told.hear(frame.pack(envelope.encode_error(0, FrameTooLarge("too large."))))


def test_a_payload_that_nobody_asked_for_is_refused() -> None:
    told = Told()
    told.mailbox.call("lookup", m.Lookup(bytes(32), b""), 0, [])
    with pytest.raises(ProtocolError):
        told.hear(frame.pack(envelope.encode_reply(1, m.LookupReply(b"")), 1 << 30))


def test_numbers_of_calls_go_round() -> None:
    told = Told()
    told.mailbox._next = 0xFFFF_FFFE
    for expected in (0xFFFF_FFFF, 1, 2):
        pending, _ = told.mailbox.call("stats", m.Stats(), 0, [])
        told.reply(expected, m.StatsReply({}))
        assert pending.result == m.StatsReply({})


async def test_nothing_is_kept_of_leases_that_have_ended(make_face: MakeFace, make_daemon: MakeDaemon) -> None:
    """Blocks that come from disk are announced by notices; whoever stops listening leaves nothing behind."""
    daemon = make_daemon({"disk.bytes": "64MiB", "host.bytes": "2MiB"}).start()
    face = make_face(daemon.socket)
    keys = [key(n) for n in range(20)]
    for k in keys:
        assert await face.put(k, payload(k, 256 * 1024), header(k), wait_s=20, durable=True) == Stored()
    for k in keys:
        assert is_right(k, await face.get(k, wait_s=20))
    for k in keys[:5]:
        (await face.lease([k], wait_s=0)).release()
    mailbox = face.client._wire.mailbox if face.is_async else face.client._mailbox
    assert mailbox._notices == {}
    assert mailbox._calls == {}
    await soon(daemon.nothing_lent, "everything to be given back")


def test_a_core_needs_a_face() -> None:
    core = Core(None, "", "")
    with pytest.raises(NotImplementedError):
        core.tell("release", m.Release([]))
    with pytest.raises(NotImplementedError):
        core.forget(1)
