"""Calls that are cancelled, clients that die, and threads that share one: nothing stays lent."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable
from multiprocessing.connection import Connection
from typing import Any

import pytest
from client_kit import BIG, SOON_S, soon
from daemons import (
    NAMESPACE,
    SMALL,
    DaemonProcess,
    header,
    is_right,
    key,
    payload,
    process,
    store,
    until,
)

from kvstore import AsyncKVStoreClient, KVStoreClient
from kvstore.errors import ConnectionLost
from kvstore.types import BlockHeader, Stored

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
