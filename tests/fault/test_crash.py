"""kill -9 of daemon and client at every named point of put, commit, promote, flush and recover.

Afterwards, each time: every block that is found is right, what was acknowledged as durable is found, nothing is left in
the directory of unfinished files or in shared memory, every byte of host memory is accounted for, nothing stays lent.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import NAMESPACE, DaemonProcess, MakeDaemon, Raw, header, is_miss, is_right, key, payload, process, until

from kvstore import KVStoreClient, Namespace
from kvstore.errors import DirectoryUnusable, KVStoreError, Unavailable
from kvstore.testing import kill
from kvstore.tiers.disk import DiskTier
from kvstore.types import Exists, MissReason, Stored

KIB = 1024
SIZES = [100, 4096, 50_000, 200 * KIB, 64 * KIB]
SMALL_HOST = {"host.bytes": "3MiB", "disk.bytes": "64MiB"}
"""Memory for few blocks, so that they go down and come up all the time."""


class Record:
    """What was stored where, as far as the daemon said so before it died."""

    def __init__(self) -> None:
        self.durable: dict[bytes, Namespace] = {}
        self.offered: dict[bytes, Namespace] = {}
        self.runs = 0

    def work(self, client: KVStoreClient, rounds: int = 20) -> None:
        """Store, some of it durably, and read, some of it from disk; until the daemon dies, or for some rounds."""
        self.runs += 1
        fresh = Namespace(model=f"crash {self.runs}")
        old = list(self.offered.items())
        for n in range(rounds):
            own = key(n, f"run {self.runs}")
            namespace = fresh if n % 4 == 3 else NAMESPACE
            nbytes = SIZES[n % len(SIZES)]
            self.offered[own] = namespace
            item = (own, payload(own, nbytes), header(own))
            (outcome,) = client.put_many([item], namespace=namespace, wait_s=10, durable=n % 2 == 0)
            if n % 2 == 0 and isinstance(outcome, Stored | Exists):
                self.durable[own] = namespace
            for back, where in old[-3 * n - 3 : -3 * n or None]:
                self.read(client, back, where)

    def read(self, client: KVStoreClient, own: bytes, namespace: Namespace) -> None:
        """Read a block: it is right, or a miss that was to be expected."""
        found = client.get(own, namespace=namespace, wait_s=10)
        if own in self.durable:
            if is_miss(found, MissReason.LOST):  # the daemon died under the lease: then it does not answer any more
                found = client.get(own, namespace=namespace, wait_s=10)
            assert is_right(own, found), found
        else:
            assert is_miss(found) or is_right(own, found), found

    def read_all(self, client: KVStoreClient) -> None:
        """Read everything there ever was."""
        for own, namespace in self.offered.items():
            self.read(client, own, namespace)


def in_order(daemon: DaemonProcess) -> None:
    """Fail unless a daemon that has just started left nothing behind of the one before."""
    assert daemon.tmp_files() == []
    assert not [name for name in os.listdir("/dev/shm") if "kvstore" in name]
    assert daemon.nothing_lent()
    stats = daemon.stats()
    assert stats["in_flight"] == 0
    assert stats["tiers"]["host"]["writing_bytes"] == 0
    assert stats["tiers"]["disk"]["used"] <= stats["tiers"]["disk"]["capacity"]
    assert stats["tiers"]["disk"]["quarantined_files"] == 0
    assert stats["tiers"]["disk"]["corrupt"] == 0


async def findings(path: Path, capacity: int = 64 << 20) -> list[Any]:
    """What a full walk of the directory finds wrong, every byte of it read."""
    tier = DiskTier(path, capacity)
    await tier.start()
    try:
        return await tier.check()
    finally:
        await tier.close()


def killed(daemon: DaemonProcess, work: Callable[[], None], where: object = "") -> None:
    """Run until the daemon kills itself, which it must."""
    try:
        work()
    except Unavailable:
        pass
    else:
        pytest.fail(f"{where} was never passed")
    assert daemon.wait() == -signal.SIGKILL


POINTS = [
    "put.allocate",
    "put.reserved",
    "commit.begin",
    "commit.insert",
    "commit.queue",
    "commit.durable",
    "flush.begin",
    "flush.create",
    "flush.written",
    "flush.sync",
    "flush.publish",
    "flush.published",
    "flush.make_dir",
    "flush.sync_dir",
    "promote.begin",
    "promote.read",
    "promote.got",
]
TIMES = (1, 3, 8)
ONCE = {"flush.make_dir"}
"""Passed once in a run only."""


def test_a_daemon_killed_anywhere_in_its_work(make_daemon: MakeDaemon) -> None:
    """One directory through all the deaths: each start finds what the daemon before it left."""
    daemon = make_daemon(SMALL_HOST)
    record = Record()
    with daemon.start().client() as client:
        record.work(client)
    assert daemon.stop() == 0
    for point in POINTS:
        for nth in TIMES if point not in ONCE else TIMES[:1]:
            daemon.start(die_at=point, nth=nth)
            in_order(daemon)
            with daemon.client() as client:
                killed(daemon, lambda client=client: record.work(client), (point, nth))
    daemon.start()
    in_order(daemon)
    with daemon.client() as client:
        record.read_all(client)
    assert len(record.durable) > 80
    stats = daemon.stats()
    assert stats["tiers"]["disk"]["corrupt"] == 0
    assert stats["accounts"] == "in order"
    assert daemon.stop() == 0
    assert asyncio.run(findings(daemon.disk)) == []


@pytest.mark.parametrize("nth", [1, 5])
@pytest.mark.parametrize("point", ["flush.evict", "flush.take"])
def test_a_daemon_killed_while_it_makes_room(make_daemon: MakeDaemon, point: str, nth: int) -> None:
    """A disk budget of few blocks, all of different sizes or all of one: evicting, and writing over what leaves."""
    capacity = 1 << 20
    daemon = make_daemon({"host.bytes": "3MiB", "disk.bytes": str(capacity)})
    sizes = [64 * KIB] if point == "flush.take" else [10_000, 90_000, 40_000, 64 * KIB]
    keys = [key(n, "room") for n in range(60)]

    def fill(client: KVStoreClient) -> None:
        for n, own in enumerate(keys):
            client.put(own, payload(own, sizes[n % len(sizes)]), header(own), wait_s=10, durable=True)

    daemon.start(die_at=point, nth=nth)
    with daemon.client() as client:
        killed(daemon, lambda: fill(client))
    daemon.start()
    in_order(daemon)
    with daemon.client() as client:
        found = client.get_many(keys, wait_s=10)
        assert all(is_miss(f) or is_right(own, f) for own, f in zip(keys, found, strict=True))
        assert sum(is_right(own, f) for own, f in zip(keys, found, strict=True)) >= 4
        fill(client)
    assert daemon.stats()["tiers"]["disk"]["corrupt"] == 0
    assert daemon.stop() == 0
    assert asyncio.run(findings(daemon.disk, capacity)) == []


@pytest.mark.parametrize("point", ["recover.lock", "recover.format", "recover.wipe", "recover.list", "recover.listed"])
def test_a_daemon_killed_while_it_starts(make_daemon: MakeDaemon, point: str) -> None:
    """In a new directory, then in one where another was killed while it wrote; the start after that is as any other."""
    daemon = make_daemon(SMALL_HOST)
    record = Record()
    deaths = 0
    late = point == "recover.listed"  # passed once in a start, when the daemon answers already
    for nth in range(1, 5):
        daemon.start(die_at=point, nth=1 if late else nth, until_ready=False)
        until(lambda: not daemon.alive or (not late and daemon._answers()), "the daemon to die or to answer")
        if daemon.alive:
            daemon.kill()
        else:
            deaths += 1
            assert daemon.wait() == -signal.SIGKILL
        daemon.start(die_at="flush.written", nth=5)
        in_order(daemon)
        with daemon.client() as client:
            killed(daemon, lambda client=client: record.work(client))
        assert daemon.tmp_files() != []
    assert deaths >= {"recover.lock": 1, "recover.format": 1, "recover.listed": 4}.get(point, 2)
    daemon.start()
    in_order(daemon)
    with daemon.client() as client:
        record.read_all(client)
    assert len(record.durable) >= 5


def test_a_second_daemon_does_not_take_what_the_first_one_uses(make_daemon: MakeDaemon) -> None:
    """Neither its socket nor its directory; and a dead one's are taken over at once."""
    first = make_daemon(SMALL_HOST).start()
    own = key(1)
    with first.client() as client:
        client.put(own, payload(own), header(own), durable=True)
        for settings in ({"listen.socket": first.socket}, {"disk.path": str(first.disk)}):
            second = make_daemon({**SMALL_HOST, **settings})
            second.start(until_ready=False)
            assert second.wait() != 0
            assert ("listening" if "listen.socket" in settings else DirectoryUnusable.code) in second.log.read_text()
        assert is_right(own, client.get(own))
    first.kill()
    third = make_daemon({**SMALL_HOST, "listen.socket": first.socket, "disk.path": str(first.disk)})
    third.socket, third.disk = first.socket, first.disk
    third.start()
    with third.client() as client:
        assert is_right(own, client.get(own))


# -- clients -----------------------------------------------------------------------------------------------------------


def work_until_killed(address: str, point: str, nth: int) -> None:
    """In another process: store and read with every sort of handle open, and die at a point."""
    kill.arm(point, nth)
    with KVStoreClient(address, namespace=NAMESPACE, timeout_s=20) as client:
        for n in range(20):
            keys = [key(2 * n, f"client {point}"), key(2 * n + 1, f"client {point}")]
            client.put_many([(own, payload(own, SIZES[n % len(SIZES)]), header(own)) for own in keys], wait_s=10)
            client.get_many(keys, wait_s=10)
            client.lease(keys)
            client.reserve([(key(n, f"never {point}"), 50_000, header(keys[0]))])


CLIENT_POINTS = ["client.reserve", "client.write", "client.written", "client.commit", "client.lease", "client.copy"]


def test_a_client_killed_anywhere_in_its_work(make_daemon: MakeDaemon) -> None:
    """The daemon and everybody else go on; half a block is no block; its memory and leases are free at once."""
    daemon = make_daemon({"host.bytes": "8MiB", "disk.bytes": "64MiB"}).start()
    bystander = daemon.client()
    for point in CLIENT_POINTS:
        for nth in (1, 6):
            other = process(work_until_killed, daemon.socket, point, nth)
            other.join(30)
            assert other.exitcode == -signal.SIGKILL, (point, nth)
            until(daemon.nothing_lent, "everything to be given back", 5)
            stats = daemon.stats()
            assert stats["in_flight"] == 0
            assert stats["tiers"]["host"]["writing_bytes"] == 0
            keys = [key(n, f"client {point}") for n in range(40)]
            found = bystander.get_many(keys, wait_s=10)
            assert all(is_miss(f) or is_right(own, f) for own, f in zip(keys, found, strict=True))
            never = [key(n, f"never {point}") for n in range(20)]
            assert not any(bystander.lookup(never, prefix=False))
            # What it was about to store, others can store.
            (outcome,) = bystander.put_many([(never[0], payload(never[0]), header(never[0]))], wait_s=10)
            assert outcome == Stored()
            bystander.drop(never)
    daemon.check()


def test_client_and_daemon_killed_together(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(SMALL_HOST).start()
    own = key(1)
    with daemon.client() as client:
        assert client.put(own, payload(own), header(own), durable=True) == Stored()
    for point in ("client.write", "client.lease"):
        other = process(work_until_killed, daemon.socket, point, 3)
        other.join(30)
        daemon.kill()
        daemon.start()
        in_order(daemon)
        with daemon.client() as client:
            assert is_right(own, client.get(own, wait_s=10))


def test_memory_of_a_dead_daemon_is_readable_but_worth_nothing(make_daemon: MakeDaemon) -> None:
    """Who holds a mapping when the daemon dies gets no signal, and what it writes there reaches nobody."""
    daemon = make_daemon(SMALL_HOST).start()
    own, other = key(1), key(2)
    client = daemon.client()
    client.put(own, payload(own), header(own), durable=True)
    lease = client.lease([own])
    reservation = client.reserve([(other, 50_000, header(other))])
    daemon.kill()
    daemon.start()
    array: Any = lease.blocks[0]
    assert array.array.tobytes() == payload(own)
    room: Any = reservation.blocks[0]
    room.write(bytes(50_000))
    array.array[:] = 0
    assert not lease.valid()
    with pytest.raises(KVStoreError):
        reservation.commit()
    fresh = daemon.client()
    assert is_right(own, fresh.get(own, wait_s=10))
    assert is_miss(fresh.get(other))
    in_order(daemon)


def test_every_point_is_passed_by_a_test() -> None:
    """A point that no test passes, or that is named wrong, would guard nothing."""
    used = {*POINTS, *CLIENT_POINTS}
    used |= {"flush.evict", "flush.take"}
    used |= {"recover.lock", "recover.format", "recover.wipe", "recover.list", "recover.listed"}
    assert used == set(kill.POINTS)


def test_a_raw_client_killed_with_a_frame_half_sent(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(SMALL_HOST).start()
    for cut in (1, 7, 8, 9, 20):
        raw = Raw(daemon.socket)
        raw.send(raw.frame([0, 1, "stats", []])[:cut])
        raw.close()
    until(daemon.nothing_lent, "everything to be given back")
    daemon.check()
