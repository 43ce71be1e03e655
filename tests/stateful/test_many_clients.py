"""Many clients at once on one daemon that has too little room, while somebody damages its files.

What is right of each answer does not depend on the others: bytes are those of the block, or there are none. In the end
nothing is left of anybody, and memory, index, files and totals agree.

KVSTORE_TEST_RACES=50 runs 50 seeds instead of the few of a normal run.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import TOKEN, InProcessDaemon

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.client import LeasedBlock, Loaded
from kvstore.client.handles import Lease
from kvstore.errors import LeaseExpired
from kvstore.tiers.disk import DiskTier
from kvstore.types import Miss

CLIENTS, STEPS, KEYS = 6, 50, 24
NAMESPACES = [Namespace(model=name) for name in ("one", "two", "three")]
SIZES = (1, 17, 4096, 16_385, 40_000, 65_536, 100_000, 300_000)
SETTINGS = {
    "host.bytes": str(2200 * 1024),
    "host.ahead_bytes": "1MiB",
    "disk.bytes": "3MiB",
    "disk.deadline_s": "120s",
}
HOW_OFTEN = {
    "put": 12,
    "get": 10,
    "get_into": 4,
    "lease": 8,
    "read_leased": 6,
    "reserve": 4,
    "abort": 3,
    "drop": 2,
    "drop_all": 0.5,
    "pin": 1,
    "prefetch": 3,
    "look": 2,
    "reconnect": 0.7,
    "damage": 1,
}


def key(number: int) -> bytes:
    return hashlib.sha256(f"many/{number}".encode()).digest()


def content(space: int, number: int) -> bytes:
    return hashlib.shake_128(f"{space}/{number}".encode()).digest(SIZES[number % len(SIZES)])


def header(space: int, number: int) -> BlockHeader:
    return BlockHeader(parent=key(number - 1), tokens=bytes([space]) * (number % 9), position=number)


class Someone:
    """One client and what it does, at random: every fourth comes from another machine."""

    def __init__(self, server: InProcessDaemon, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.far = seed % 4 == 0
        self.client = self._connected()
        self.leases: list[tuple[Lease, int, list[int]]] = []
        self.rooms: list[Any] = []

    def _connected(self) -> KVStoreClient:
        if self.far:
            return KVStoreClient(f"tcp://{self.server.tcp}", token=TOKEN, timeout_s=20)
        return KVStoreClient(self.server.socket, timeout_s=20)

    def live(self) -> None:
        verbs = self.random.choices(list(HOW_OFTEN), list(HOW_OFTEN.values()), k=STEPS)
        for verb in verbs:
            first = self.random.randrange(KEYS)
            wanted = [(first + i) % KEYS for i in range(self.random.randrange(1, 10))]
            getattr(self, verb)(self.random.randrange(len(NAMESPACES)), wanted)
        for lease, *_ in self.leases:
            lease.release()
        self.client.close()

    def put(self, space: int, wanted: list[int]) -> None:
        items = [(key(n), content(space, n), header(space, n)) for n in wanted]
        wait_s, durable = self.random.choice([0.0, 0.0, 1.0]), self.random.random() < 0.15
        self.client.put_many(items, namespace=NAMESPACES[space], wait_s=wait_s, durable=durable)

    def get(self, space: int, wanted: list[int]) -> None:
        wait_s = self.random.choice([0.001, 1.0, 5.0])
        got = self.client.get_many([key(n) for n in wanted], namespace=NAMESPACES[space], wait_s=wait_s)
        for number, block in zip(wanted, got, strict=True):
            if isinstance(block, Loaded):
                assert bytes(block.data) == content(space, number)
                assert block.header == header(space, number)

    def get_into(self, space: int, wanted: list[int]) -> None:
        buffers = [np.empty(SIZES[n % len(SIZES)], np.uint8) for n in wanted]
        got = self.client.get_into([key(n) for n in wanted], buffers, namespace=NAMESPACES[space], wait_s=5)
        for number, block, data in zip(wanted, got, buffers, strict=True):
            assert isinstance(block, Miss) or data.tobytes() == content(space, number)

    def lease(self, space: int, wanted: list[int]) -> None:
        wait_s, ttl_s = self.random.choice([0.0, 0.002, 5.0]), self.random.choice([0.01, 30.0, 30.0])
        lease = self.client.lease([key(n) for n in wanted], namespace=NAMESPACES[space], wait_s=wait_s, ttl_s=ttl_s)
        self.leases.append((lease, space, wanted))
        if len(self.leases) > 2:
            self.leases.pop(0)[0].release()

    def read_leased(self, space: int, wanted: list[int]) -> None:
        if not self.leases:
            return
        lease, space, wanted = self.leases.pop(self.random.randrange(len(self.leases)))
        for number, block in zip(wanted, lease.blocks, strict=True):
            if isinstance(block, LeasedBlock):
                data = bytearray(block.nbytes)
                try:
                    self.client.read(lease, block, data)
                except LeaseExpired:
                    assert not lease.valid()
                    break
                assert not lease.valid() or bytes(data) == content(space, number)
        lease.release()

    def reserve(self, space: int, wanted: list[int]) -> None:
        offers = [(key(n), SIZES[n % len(SIZES)], header(space, n)) for n in wanted]
        self.rooms.append(self.client.reserve(offers, namespace=NAMESPACES[space]))
        if len(self.rooms) > 2:
            self.rooms.pop(0).abort()

    def abort(self, space: int, wanted: list[int]) -> None:
        if self.rooms:
            self.rooms.pop().abort()

    def drop(self, space: int, wanted: list[int]) -> None:
        self.client.drop([key(n) for n in wanted], namespace=NAMESPACES[space])

    def drop_all(self, space: int, wanted: list[int]) -> None:
        self.client.drop(namespace=NAMESPACES[space])

    def pin(self, space: int, wanted: list[int]) -> None:
        keys = [key(n) for n in wanted[:2]]
        if self.random.random() < 0.5:
            self.client.pin(keys, namespace=NAMESPACES[space], ttl_s=self.random.choice([0.05, 60.0]))
        else:
            self.client.unpin(keys, namespace=NAMESPACES[space])

    def prefetch(self, space: int, wanted: list[int]) -> None:
        cancel = self.random.random() < 0.3
        self.client.prefetch([key(n) for n in wanted], namespace=NAMESPACES[space], cancel=cancel)

    def look(self, space: int, wanted: list[int]) -> None:
        prefix = self.random.random() < 0.5
        self.client.lookup([key(n) for n in wanted], prefix=prefix, namespace=NAMESPACES[space])

    def reconnect(self, space: int, wanted: list[int]) -> None:
        """Go without giving anything back."""
        self.client.close()
        self.leases.clear()
        self.rooms.clear()
        self.client = self._connected()

    def damage(self, space: int, wanted: list[int]) -> None:
        """Somebody else removes or changes a stored file."""
        try:
            files = self.server.files()
            file = files[self.random.randrange(len(files))]
            if self.random.random() < 0.4:
                file.unlink()
                return
            with open(file, "r+b") as stream:
                middle = file.stat().st_size // 2
                stream.seek(middle)
                (byte,) = stream.read(1)
                stream.seek(middle)
                stream.write(bytes([byte ^ 1]))
        except (OSError, ValueError):  # there is none, or it has just left
            return


def agrees(server: InProcessDaemon) -> None:
    """Nothing is left of anybody, and what is there is consistent."""
    chain, ledger = server.daemon.chain, server.daemon.service.ledger
    until = time.monotonic() + 20
    while server.ask(lambda: bool(chain._arrivals or chain.dirty_blocks or ledger.sessions)):
        assert time.monotonic() < until, "the daemon does not come to rest"
        time.sleep(0.01)

    def look() -> None:
        chain.host.check()
        assert chain.host.leased_bytes == 0
        assert chain.host.arena.used() == chain.host.used_bytes

    server.ask(look)
    disk: Any = chain.below[0]
    while not isinstance(disk, DiskTier):
        disk = disk.inner
    found = {finding.what for finding in server.run(disk.check(fix=True))}
    assert found <= {"corrupt file", "wrong size", "missing file"}, found
    assert server.run(disk.check()) == []


@pytest.mark.parametrize("seed", range(int(os.environ.get("KVSTORE_TEST_RACES", "3"))))
def test_everything_agrees_after_many_clients_at_once(workdir: Path, seed: int) -> None:
    server = InProcessDaemon(workdir, SETTINGS)
    for life in range(2):
        server.start()
        everybody = [Someone(server, seed * 1000 + life * 100 + number) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as threads:
            for done in [threads.submit(someone.live) for someone in everybody]:
                done.result(timeout=60)
        agrees(server)
        if life == 0 and seed % 2:
            server.crash()
        else:
            server.stop()
