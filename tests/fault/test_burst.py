"""More stores than memory holds: what was acknowledged is readable, and what was not is named with its reason.

With the disk tier on no acknowledged block of a burst of twice the capacity of memory is lost or unreadable, neither at
once after the reply nor later; those without room are refused, or wait, as the caller wishes. Never is a block lost
that nobody was told of.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest
from daemons import NAMESPACE, DaemonProcess, MakeDaemon, header, is_miss, is_refused, is_right, key, payload, until

from kvstore import AsyncKVStoreClient, KVStoreClient
from kvstore.types import Dropped, DropReason, Exists, MissReason, Stored, TierCode

MIB = 1 << 20
BLOCK = 128 * 1024
HOST = 8 * MIB
TWICE = 2 * HOST // BLOCK
WITH_DISK = {"host.bytes": "8MiB", "disk.bytes": "64MiB"}


def item(own: bytes, nbytes: int = BLOCK) -> tuple[bytes, bytes, Any]:
    return own, payload(own, nbytes), header(own)


def acknowledged(outcome: object) -> bool:
    return isinstance(outcome, Stored | Exists)


def bounded(daemon: DaemonProcess) -> None:
    """Fail unless memory and disk are within their budgets and accounted for."""
    stats = daemon.stats()
    assert stats["accounts"] == "in order", stats["accounts"]
    for tier in stats["tiers"].values():
        assert tier["used"] <= tier["capacity"]


@pytest.mark.parametrize("batch", [8, TWICE])
@pytest.mark.parametrize("wait_s", [0.0, 5.0])
def test_a_burst_of_twice_the_memory(make_daemon: MakeDaemon, wait_s: float, batch: int) -> None:
    daemon = make_daemon(WITH_DISK).start()
    writer, reader = daemon.client(), daemon.client()
    keys = [key(n, "burst") for n in range(TWICE)]
    kept: list[bytes] = []
    refused: Counter[str] = Counter()
    for start in range(0, TWICE, batch):
        part = keys[start : start + batch]
        outcomes = writer.put_many([item(own) for own in part], wait_s=wait_s)
        assert len(outcomes) == len(part)
        stored = [own for own, outcome in zip(part, outcomes, strict=True) if acknowledged(outcome)]
        # At once after the reply, over another connection, before anything else happens.
        assert reader.lookup(stored, prefix=False).count(TierCode.ABSENT) == 0
        sample = stored[-2:]
        assert all(map(is_right, sample, reader.get_many(sample, wait_s=10)))
        kept += stored
        refused.update(o.reason for o in outcomes if isinstance(o, Dropped))
        bounded(daemon)
    assert len(kept) + sum(refused.values()) == TWICE
    assert set(refused) <= {DropReason.HOST_FULL}
    if wait_s and batch < TWICE:
        assert not refused
    assert len(kept) >= HOST // BLOCK // 2
    until(lambda: daemon.stats()["queue"]["blocks"] == 0, "everything to be written")
    found = [reader.get(own, wait_s=10) for own in kept]
    assert all(map(is_right, kept, found))
    dropped = daemon.stats()["tiers"]["host"]["dropped"]
    assert dropped.get("host_full", 0) == refused[DropReason.HOST_FULL]
    bounded(daemon)
    assert daemon.nothing_lent()


def test_what_a_burst_did_not_take_can_be_offered_again(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(WITH_DISK).start()
    client = daemon.client()
    left = [key(n, "again") for n in range(TWICE)]
    rounds = 0
    while left:
        outcomes = client.put_many([item(own) for own in left], wait_s=1)
        assert all(acknowledged(o) or is_refused(o) for o in outcomes)
        assert any(map(acknowledged, outcomes))
        left = [own for own, outcome in zip(left, outcomes, strict=True) if not acknowledged(outcome)]
        rounds += 1
    assert 1 < rounds < 20
    keys = [key(n, "again") for n in range(TWICE)]
    assert all(map(is_right, keys, [client.get(own, wait_s=10) for own in keys]))


def test_a_burst_survives_the_end_of_the_daemon(make_daemon: MakeDaemon) -> None:
    """Stopped in good order right after the last reply: everything acknowledged is on disk."""
    daemon = make_daemon({**WITH_DISK, "drain_s": "20s"}).start()
    keys = [key(n, "drain") for n in range(TWICE)]
    with daemon.client() as client:
        outcomes = [client.put(*item(own), wait_s=5) for own in keys]
    assert all(map(acknowledged, outcomes))
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client() as client:
        assert client.lookup(keys) == [TierCode.DISK] * TWICE
        assert all(map(is_right, keys, [client.get(own, wait_s=10) for own in keys]))


@pytest.mark.parametrize("durable", [False, True])
def test_many_clients_burst_at_once(make_daemon: MakeDaemon, durable: bool) -> None:
    """Each checks every acknowledged block at once; half of the blocks are offered by two of them."""
    daemon = make_daemon(WITH_DISK).start()
    failures: list[str] = []
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        with KVStoreClient(daemon.socket, namespace=NAMESPACE, timeout_s=30) as client:
            for n in range(TWICE // 4):
                own = key(n, "shared") if n % 2 else key(n, f"own {number}")
                outcome = client.put(*item(own), wait_s=0.5 if number % 2 else 0.0, durable=durable)
                seen = client.get(own, wait_s=10)
                with lock:
                    counts[type(outcome).__name__] += 1
                    if acknowledged(outcome) and not is_right(own, seen):
                        failures.append(f"{number}/{n}: {outcome} but {seen!r:.100}")
                    if not acknowledged(outcome) and not is_refused(outcome):
                        failures.append(f"{number}/{n}: {outcome}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    assert counts["Stored"] + counts["Exists"] + counts["Dropped"] == TWICE
    assert counts["Stored"] > 0
    until(lambda: daemon.stats()["queue"]["blocks"] == 0, "everything to be written")
    bounded(daemon)
    assert daemon.nothing_lent()


async def test_a_burst_of_many_operations_on_one_connection(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(WITH_DISK).start()
    keys = [key(n, "async") for n in range(TWICE)]
    async with AsyncKVStoreClient(daemon.socket, namespace=NAMESPACE, timeout_s=30) as client:
        outcomes = await asyncio.gather(*[client.put(*item(own), wait_s=10) for own in keys])
        # Waiting is for memory that is being written down; what others have reserved is not waited for.
        assert all(acknowledged(o) or o == Dropped(DropReason.HOST_FULL) for o in outcomes)
        kept = [own for own, outcome in zip(keys, outcomes, strict=True) if acknowledged(outcome)]
        assert len(kept) >= HOST // BLOCK // 2
        found = await asyncio.gather(*[client.get(own, wait_s=20) for own in kept])
    assert all(is_miss(f, MissReason.NO_SPACE) or is_right(own, f) for own, f in zip(kept, found, strict=True))
    assert any(map(is_right, kept, found))
    await asyncio.to_thread(until, daemon.nothing_lent, "everything to be given back")
    bounded(daemon)


# -- where nothing can be written down ---------------------------------------------------------------------------------


def test_without_a_disk_the_oldest_leave(make_daemon: MakeDaemon) -> None:
    """Every store is taken, readable at once, and the youngest stay."""
    daemon = make_daemon({"host.bytes": "8MiB"}).start()
    client = daemon.client()
    keys = [key(n, "memory") for n in range(TWICE)]
    for own in keys:
        assert client.put(*item(own), wait_s=0) == Stored()
        assert is_right(own, client.get(own))
    tiers = client.lookup(keys, prefix=False)
    present = tiers.count(TierCode.HOST)
    assert HOST // BLOCK * 0.8 < present < HOST // BLOCK
    assert tiers[-present:] == [TierCode.HOST] * present
    assert all(is_miss(client.get(own), MissReason.ABSENT) for own in keys[:-present])
    assert daemon.stats()["tiers"]["host"]["evicted"] == TWICE - present
    bounded(daemon)


def test_without_a_disk_nothing_waits(make_daemon: MakeDaemon) -> None:
    """What is leased cannot leave, and no waiting makes room: refused at once, with the reason."""
    daemon = make_daemon({"host.bytes": "8MiB"}).start()
    client = daemon.client()
    keys = [key(n, "leased") for n in range(TWICE // 2)]
    kept = [own for own in keys if client.put(*item(own), wait_s=0) == Stored()]
    held = client.lease([own for own in kept if client.lookup([own])])
    began = time.monotonic()
    outcomes = client.put_many([item(key(n, "too many")) for n in range(20)], wait_s=20)
    assert time.monotonic() - began < 10
    assert outcomes[-10:] == [Dropped(DropReason.HOST_FULL)] * 10
    assert held.valid()
    for block in held.blocks:
        assert not is_miss(block)
    held.release()
    assert client.put(*item(key(1, "after")), wait_s=0) == Stored()
    bounded(daemon)


def test_one_request_larger_than_memory(make_daemon: MakeDaemon) -> None:
    """What fits is stored, the rest is named; the blocks of one request do not push each other out."""
    daemon = make_daemon({"host.bytes": "8MiB"}).start()
    client = daemon.client()
    keys = [key(n, "one request") for n in range(TWICE)]
    outcomes = client.put_many([item(own) for own in keys], wait_s=0)
    stored = [own for own, outcome in zip(keys, outcomes, strict=True) if outcome == Stored()]
    assert len(stored) > HOST // BLOCK * 0.8
    assert outcomes == [Stored()] * len(stored) + [Dropped(DropReason.HOST_FULL)] * (TWICE - len(stored))
    assert all(map(is_right, stored, client.get_many(stored)))
    bounded(daemon)


@pytest.mark.parametrize("nbytes", [HOST, HOST + 1, 1 << 31])
def test_a_block_larger_than_memory(make_daemon: MakeDaemon, nbytes: int) -> None:
    daemon = make_daemon(WITH_DISK).start()
    client = daemon.client()
    own = key(1)
    assert client.put(*item(own)) == Stored()
    reservation = client.reserve([(key(2), nbytes, header(own))], wait_s=5)
    assert reservation.blocks == [Dropped(DropReason.TOO_LARGE)]
    assert is_right(own, client.get(own))  # nobody left for it
    bounded(daemon)


def test_a_disk_smaller_than_the_burst(make_daemon: MakeDaemon) -> None:
    """The lower tier evicts too: what was acknowledged is readable at once, later it is right or a miss."""
    daemon = make_daemon({"host.bytes": "8MiB", "disk.bytes": "4MiB"}).start()
    client = daemon.client()
    keys = [key(n, "small disk") for n in range(TWICE)]
    for own in keys:
        assert acknowledged(client.put(*item(own), wait_s=5))
        assert is_right(own, client.get(own, wait_s=10))
    until(lambda: daemon.stats()["queue"]["blocks"] == 0, "everything to be written")
    found = [client.get(own, wait_s=10) for own in keys]
    assert all(is_miss(f, MissReason.ABSENT) or is_right(own, f) for own, f in zip(keys, found, strict=True))
    assert sum(map(is_right, keys, found)) > HOST // BLOCK * 0.8
    bounded(daemon)


def test_blocks_without_number(make_daemon: MakeDaemon) -> None:
    """Tiny blocks fill the index before they fill the memory; that is bounded as well."""
    daemon = make_daemon({"host.bytes": "2MiB"}).start()
    client = daemon.client()
    before = daemon.own_memory()
    for start in range(0, 2000, 100):
        keys = [key(n, "tiny") for n in range(start, start + 100)]
        outcomes = client.put_many([(own, own, header(own)) for own in keys])
        assert all(acknowledged(o) or is_refused(o) for o in outcomes)
        stored = [own for own, outcome in zip(keys, outcomes, strict=True) if acknowledged(outcome)]
        assert len(stored) > 40
        found: list[Any] = client.get_many(stored)
        assert [bytes(f.data) for f in found if f] == stored
    bounded(daemon)
    assert daemon.own_memory() - before < 8 * MIB
