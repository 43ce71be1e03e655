"""A daemon that hangs, is killed, ends, or was never there, as both faces of the client meet it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from client_kit import SOON_S, Face, MakeFace, soon
from daemons import (
    NAMESPACE,
    SMALL,
    DaemonProcess,
    MakeDaemon,
    header,
    is_right,
    key,
    payload,
    store,
    until,
)

from kvstore import AsyncKVStoreClient
from kvstore.errors import ConnectionLost, DeadlineExceeded, LeaseExpired, Unavailable
from kvstore.types import BlockHeader, TierCode

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
