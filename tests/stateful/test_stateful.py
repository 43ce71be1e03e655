"""Any order of what clients do, with restarts, crashes, damage and too little room, against a plain dict.

The bytes of a block are a pure function of its namespace and key, so any wrong byte shows. The model knows of each
block whether it can be there (what was never stored, or dropped and not stored again, must not be found) and whether it
must be there (what was acknowledged, while the disk had no reason to lose it).

KVSTORE_TEST_STATEFUL=300 runs 300 examples with fresh randomness instead of the few, always the same, of a normal run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from inprocess import TOKEN, InProcessDaemon

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.client import LeasedBlock, Loaded, Room
from kvstore.client.handles import Lease
from kvstore.keys import namespace_digest
from kvstore.types import BlockId, Dropped, DropReason, Exists, Hit, Miss, MissReason, Scope, Stored, TierCode

HOST_BYTES = 2200 * 1024
DISKS = (3 << 20, 64 << 20)
"""One that has to evict all the time, and one that never has to: from that one nothing acknowledged may be lost."""
SETTINGS = {
    "host.bytes": str(HOST_BYTES),
    "host.ahead_bytes": "1MiB",
    "disk.deadline_s": "120s",  # a disk that is slow for a while does not open its breaker
    "drain_s": "10s",
}
SIZES = (1, 17, 4095, 4096, 16_384, 16_385, 40_000, 65_536, 100_000, 100_000, 1_200_000)
"""The last one is larger than a slab, so it is always split."""
KEYS = 33
NAMESPACES = (Namespace(model="one"), Namespace(model="two"))

Block = tuple[int, int]
"""Namespace and key, by number."""

numbers = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=12, unique=True)
spaces = st.integers(0, len(NAMESPACES) - 1)
remote = st.sampled_from([False, False, False, True])


def key(number: int) -> bytes:
    return hashlib.sha256(f"stateful/{number}".encode()).digest()


def nbytes_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def content(block: Block) -> bytes:
    space, number = block
    return hashlib.shake_128(f"{space}/{number}".encode()).digest(nbytes_of(number))


def header(block: Block) -> BlockHeader:
    space, number = block
    return BlockHeader(parent=key(number), tokens=bytes([space]) * (number % 9), position=number)


def _scope(space: int) -> Scope:
    return Scope(f"uid-{os.getuid()}", namespace_digest(NAMESPACES[space]))


class Machine(RuleBasedStateMachine):
    """One daemon, two kinds of clients, two namespaces."""

    @initialize(disk_bytes=st.sampled_from(DISKS))
    def begin(self, disk_bytes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kv-"))
        self.disk_bytes = disk_bytes
        self.server = InProcessDaemon(self.root, {**SETTINGS, "disk.bytes": str(disk_bytes)})
        self.possible: set[Block] = set()  # stored, and not dropped since
        self.damaged: set[Block] = set()  # files that somebody else has changed
        self.sure: set[Block] = set()  # acknowledged, and the disk had no reason to lose it
        self.durable: set[Block] = set()  # the same, after a crash
        self.held: list[tuple[Lease, int, list[int], float]] = []
        self.rooms: list[Any] = []
        self._start()
        for space in range(len(NAMESPACES)):
            self.put(space, list(range(6)), False, durable=False, wait_s=1.0)

    def _start(self) -> None:
        self.server.start()
        self.lost = 0
        self.clients = {
            False: KVStoreClient(self.server.socket, timeout_s=20),
            True: KVStoreClient(f"tcp://{self.server.tcp}", token=TOKEN, timeout_s=20),
        }

    def _end_clients(self) -> None:
        for client in self.clients.values():
            client.close()
        self.held.clear()
        self.rooms.clear()

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        self._end_clients()
        self._settle()
        used = self.server.ask(lambda: self.server.daemon.chain.host)
        assert used.leased_bytes == used.dirty_bytes == 0
        assert used.arena.used() == used.used_bytes
        assert not self.server.daemon.service.ledger.sessions
        self.server.stop()
        assert not list(self.root.glob("s*.fd"))
        shutil.rmtree(self.root)

    # -- help ----------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until nothing is on its way up or down, and closed connections are known to be closed."""
        until = time.monotonic() + 20
        chain, ledger = self.server.daemon.chain, self.server.daemon.service.ledger
        open_sessions = sum(client.core.link is not None for client in self.clients.values())

        def busy() -> bool:
            return bool(chain._arrivals or chain.dirty_blocks or len(ledger.sessions) > open_sessions)

        while self.server.ask(busy):
            assert time.monotonic() < until, "the daemon does not come to rest"
            time.sleep(0.002)

    def _look_at_disk(self) -> None:
        """Nothing is sure any more once the disk evicted, or did not take what it was given."""
        counters = self.server.daemon.chain.below[0].counters
        refused = sum(count for reason, count in counters.dropped.items() if reason != DropReason.ABORTED)
        if counters.evicted + refused != self.lost:
            self.lost = counters.evicted + refused
            self.sure.clear()
            self.durable.clear()

    def _unsure(self, blocks: set[Block]) -> None:
        self.sure -= blocks
        self.durable -= blocks

    def _right(self, block: Block, got: Loaded | Miss | Hit, data: Any) -> None:
        """What was read is right, or missing for a reason that can be."""
        if isinstance(got, Miss):
            assert got.reason in {
                MissReason.ABSENT,
                MissReason.NO_SPACE,
                MissReason.LOST,
                MissReason.DEADLINE,
                MissReason.CORRUPT,
            }
            if got.reason == MissReason.CORRUPT:
                assert block in self.damaged
            self._look_at_disk()
            room = got.reason in (MissReason.NO_SPACE, MissReason.DEADLINE)
            state = self.server.daemon.chain.below[0].describe_state()
            assert room or block not in self.sure, f"{block} was acknowledged and is {got}; the disk: {state}"
            return
        assert block in self.possible, f"{block} was dropped, or never stored, and was found"
        assert bytes(data) == content(block)
        if isinstance(got, Loaded):
            assert got.header == header(block)
            assert got.tier in (TierCode.HOST, TierCode.DISK)

    def _read(self, lease: Lease, space: int, wanted: list[int]) -> None:
        for number, block in zip(wanted, lease.blocks, strict=True):
            if isinstance(block, Miss):
                self._right((space, number), block, b"")
                continue
            data = bytearray(block.nbytes)
            self._client_of(lease).read(lease, block, data)
            if lease.valid():
                assert (space, number) in self.possible
                assert bytes(data) == content((space, number))
                assert block.header == header((space, number))

    @staticmethod
    def _client_of(lease: Lease) -> KVStoreClient:
        client = lease._client
        assert isinstance(client, KVStoreClient)
        return client

    # -- storing -------------------------------------------------------------------------------------------------------

    @rule(space=spaces, wanted=numbers, far=remote, durable=st.booleans(), wait_s=st.sampled_from([0.0, 1.0]))
    def put(self, space: int, wanted: list[int], far: bool, durable: bool, wait_s: float) -> None:
        client, namespace = self.clients[far], NAMESPACES[space]
        before = client.lookup([key(n) for n in wanted], prefix=False, namespace=namespace)
        items = [(key(n), content((space, n)), header((space, n))) for n in wanted]
        outcomes = client.put_many(items, namespace=namespace, wait_s=wait_s, durable=durable)
        for number, outcome, was in zip(wanted, outcomes, before, strict=True):
            block = (space, number)
            if isinstance(outcome, Dropped):
                assert outcome.reason in {
                    DropReason.HOST_FULL,
                    DropReason.IN_FLIGHT,
                    DropReason.NOT_DURABLE,
                    DropReason.ABORTED,
                }
                assert outcome.reason != DropReason.ABORTED or durable
                if outcome.reason == DropReason.NOT_DURABLE:  # it is in memory all the same
                    self.possible.add(block)
                continue
            assert isinstance(outcome, Stored | Exists)
            self.possible.add(block)
            if isinstance(outcome, Stored):
                self.damaged.discard(block)
                self.sure.add(block)
                if durable:
                    self.durable.add(block)
            else:
                assert was != TierCode.ABSENT
        self._look_at_disk()
        stored = [n for n, outcome in zip(wanted, outcomes, strict=True) if isinstance(outcome, Stored)]
        if stored and not self.server.ask(lambda: bool(self.server.daemon.chain._arrivals)):
            # Acknowledged is readable at once: the last one, which nothing that came after it can have pushed out.
            got = client.get(key(stored[-1]), namespace=namespace)
            assert isinstance(got, Loaded), f"{stored[-1]} was acknowledged and is {got}"
            self._right((space, stored[-1]), got, got.data)

    @rule(space=spaces, first=st.integers(0, KEYS - 1), durable=st.booleans())
    def put_a_run(self, space: int, first: int, durable: bool) -> None:
        """As a prompt does."""
        self.put(space, [(first + i) % KEYS for i in range(10)], False, durable, 1.0)

    @rule(space=spaces, first=st.integers(0, KEYS - 1), wait_s=st.sampled_from([0.0, 1.0]))
    def burst(self, space: int, first: int, wait_s: float) -> None:
        """More than memory holds, faster than the disk takes it."""
        for at in range(0, KEYS, 3):
            self.put(space, [(first + at + i) % KEYS for i in range(3)], False, False, wait_s)
        self.rest()

    @rule(space=spaces, first=st.integers(0, KEYS - 1), into=st.booleans())
    def get_a_run(self, space: int, first: int, into: bool) -> None:
        """As a prompt does."""
        self.get(space, [(first + i) % KEYS for i in range(10)], False, into)

    @rule(space=spaces, wanted=numbers, far=remote, end=st.sampled_from(["abort", "keep", "part", "disconnect"]))
    def reserve(self, space: int, wanted: list[int], far: bool, end: str) -> None:
        """What is not committed was never there."""
        client = self.clients[far]
        offers = [(key(n), nbytes_of(n), header((space, n))) for n in wanted]
        reservation = client.reserve(offers, namespace=NAMESPACES[space])
        rooms = [(n, room) for n, room in zip(wanted, reservation.blocks, strict=True) if isinstance(room, Room)]
        for number, room in rooms:
            whole = content((space, number))
            client.drive(client.core.fill(reservation.id, room, memoryview(whole)), None)
        if end == "abort":
            reservation.abort()
        elif end == "part" and rooms:
            chosen = rooms[:1]
            outcomes = reservation.commit([room.index for _, room in chosen])
            for number, room in chosen:
                assert isinstance(outcomes[room.index], Stored)
                self.possible.add((space, number))
                self.sure.add((space, number))
                self.damaged.discard((space, number))
            for _, room in rooms[1:]:
                assert outcomes[room.index] == Dropped(DropReason.ABORTED)
        elif end == "disconnect":
            self.held = [entry for entry in self.held if self._client_of(entry[0]) is not client]
            self.rooms = [entry for entry in self.rooms if entry._client is not client]
            client.close()
        elif len(self.rooms) < 2:
            self.rooms.append(reservation)
        else:
            reservation.abort()

    @precondition(lambda self: self.rooms)
    @rule()
    def give_back(self) -> None:
        self.rooms.pop().abort()

    # -- reading -------------------------------------------------------------------------------------------------------

    @rule(space=spaces, wanted=numbers, far=remote, into=st.booleans())
    def get(self, space: int, wanted: list[int], far: bool, into: bool) -> None:
        client, namespace = self.clients[far], NAMESPACES[space]
        if into:
            buffers = [np.empty(nbytes_of(n), dtype=np.uint8) for n in wanted]
            hits = client.get_into([key(n) for n in wanted], buffers, namespace=namespace, wait_s=5)
            for number, hit, data in zip(wanted, hits, buffers, strict=True):
                self._right((space, number), hit, data)
            return
        for number, got in zip(wanted, client.get_many([key(n) for n in wanted], namespace=namespace), strict=True):
            self._right((space, number), got, b"" if isinstance(got, Miss) else got.data)

    @rule(space=spaces, wanted=numbers, far=remote, hold=st.booleans(), rest=st.booleans())
    def look_and_lease(self, space: int, wanted: list[int], far: bool, hold: bool, rest: bool) -> None:
        """A promise is kept, or there is a reason; what was said to be nowhere is nowhere."""
        if rest:
            self._settle()
        client, namespace = self.clients[far], NAMESPACES[space]
        keys = [key(n) for n in wanted]
        codes = client.lookup(keys, prefix=False, namespace=namespace)
        closed = client.lookup(keys, prefix=True, namespace=namespace)
        if rest:
            assert closed == codes[: codes.index(TierCode.ABSENT) if TierCode.ABSENT in codes else None]
        lease = client.lease(keys, namespace=namespace, wait_s=5, headers=True)
        for number, code, block in zip(wanted, codes, lease.blocks, strict=True):
            if code == TierCode.ABSENT:
                assert block == Miss(MissReason.ABSENT)
            else:
                assert (space, number) in self.possible
                if rest and code == TierCode.HOST:
                    assert isinstance(block, LeasedBlock)
        self._read(lease, space, wanted)
        if hold and len(self.held) < 2:
            self.held.append((lease, space, wanted, time.monotonic()))
        else:
            lease.release()

    @precondition(lambda self: self.held)
    @rule(keep=st.booleans())
    def read_what_is_held(self, keep: bool) -> None:
        """A lease holds, whatever was dropped, evicted or stored meanwhile."""
        lease, space, wanted, began = self.held.pop(0)
        assert lease.valid() or time.monotonic() - began > 20
        for number, block in zip(wanted, lease.blocks, strict=True):
            if isinstance(block, LeasedBlock):
                data = bytearray(block.nbytes)
                self._client_of(lease).read(lease, block, data)
                assert bytes(data) == content((space, number))
        if keep:
            self.held.append((lease, space, wanted, began))
        else:
            lease.release()

    @rule(space=spaces, wanted=numbers)
    def let_a_lease_expire(self, space: int, wanted: list[int]) -> None:
        """The client knows by its own clock; the daemon gives the memory to others after a little grace."""
        lease = self.clients[False].lease([key(n) for n in wanted], namespace=NAMESPACES[space], ttl_s=0.001)
        time.sleep(0.002)
        assert not lease.valid()
        ledger = self.server.daemon.service.ledger

        def later() -> None:
            for known in ledger.leases.values():
                if known.id == lease.id:
                    known.expires = 0.0
            ledger.expire()

        self.server.ask(later)
        assert self.server.ask(lambda: lease.id not in ledger.leases)
        lease.release()

    @rule(space=spaces, wanted=numbers)
    def prefetch(self, space: int, wanted: list[int]) -> None:
        count = self.clients[False].prefetch([key(n) for n in wanted], namespace=NAMESPACES[space])
        assert count <= len([n for n in wanted if (space, n) in self.possible])

    @rule(space=spaces, wanted=numbers, pin=st.booleans())
    def pin(self, space: int, wanted: list[int], pin: bool) -> None:
        client, keys, namespace = self.clients[False], [key(n) for n in wanted], NAMESPACES[space]
        if pin:
            count = client.pin(keys[:2], namespace=namespace, ttl_s=60)
        else:
            count = client.unpin(keys, namespace=namespace)
        assert count <= len([n for n in wanted if (space, n) in self.possible])

    # -- forgetting ----------------------------------------------------------------------------------------------------

    @rule(space=spaces, wanted=numbers, far=remote)
    def drop(self, space: int, wanted: list[int], far: bool) -> None:
        client, keys, namespace = self.clients[far], [key(n) for n in wanted], NAMESPACES[space]
        client.drop(keys, namespace=namespace)
        self._dropped({(space, n) for n in wanted})
        assert client.lookup(keys, prefix=False, namespace=namespace) == [TierCode.ABSENT] * len(keys)

    @rule(space=spaces)
    def drop_all(self, space: int) -> None:
        self.clients[False].drop(namespace=NAMESPACES[space])
        self._dropped({block for block in self.possible if block[0] == space})
        keys = [key(n) for n in range(KEYS)]
        assert self.clients[False].lookup(keys, prefix=False, namespace=NAMESPACES[space]) == [TierCode.ABSENT] * KEYS

    def _dropped(self, blocks: set[Block]) -> None:
        self._unsure(blocks)
        self.possible -= blocks
        self.damaged -= blocks

    # -- life and damage -----------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        self._end_clients()
        assert self.server.stop() == 0
        self._look_at_disk()  # what was still to be written may have pushed others out
        self._start()

    @rule()
    def crash(self) -> None:
        self._end_clients()
        self._look_at_disk()
        self.sure = set(self.durable)
        self.server.crash()
        self._look_at_disk()  # what was written between the image and the end does not matter, but it may have evicted
        self._start()

    @rule(
        which=st.integers(0, 1 << 16),
        where=st.integers(0, 1 << 30),
        how=st.sampled_from(["flip", "flip", "cut", "remove"]),
        far=remote,
    )
    def damage(self, which: int, where: int, how: str, far: bool) -> None:
        """Somebody else writes into, cuts or removes a stored file: its block is a miss once it has left memory."""
        self._settle()
        files = self._files_in_use()
        if not files:
            return
        file = files[which % len(files)]
        block = self._block_of(file)
        if how == "remove":
            file.unlink()
        elif how == "cut":
            os.truncate(file, where % file.stat().st_size)
        else:
            with open(file, "r+b") as stream:
                at = where % file.stat().st_size
                stream.seek(at)
                byte = stream.read(1)
                stream.seek(at)
                stream.write(bytes([byte[0] ^ (1 + where % 255)]))
        self.damaged.add(block)
        self._unsure({block})
        if self._evict([block]):
            got = self.clients[far].get(key(block[1]), namespace=NAMESPACES[block[0]], wait_s=10)
            assert isinstance(got, Miss), "a changed file was believed"
            expected = MissReason.LOST if how == "remove" else MissReason.CORRUPT
            state = self.server.daemon.chain.below[0].describe_state()
            assert got.reason in (expected, MissReason.NO_SPACE), f"{got}; the disk: {state}"

    def _files_in_use(self) -> list[Path]:
        """Files of blocks that the daemon has on disk; of others it knows nothing any more."""
        disk = self.server.daemon.chain.below[0]
        named = [(file, self._block_of(file)) for file in self.server.files()]
        return self.server.ask(
            lambda: [file for file, (space, number) in named if disk.contains(_scope(space), key(number))]
        )

    def _evict(self, blocks: list[Block]) -> int:
        """Take clean blocks that nobody reads out of memory; how many of them are not in memory now."""
        host = self.server.daemon.chain.host

        def leave() -> int:
            gone = 0
            for space, number in blocks:
                found = host.get(BlockId(_scope(space), key(number)))
                if found is not None and host.evictable(found, time.monotonic()):
                    host.remove(found)
                    found = None
                gone += found is None
            return gone

        return self.server.ask(leave)

    @rule(space=spaces, first=st.integers(0, KEYS - 1), far=remote, rest=st.booleans())
    def read_from_disk(self, space: int, first: int, far: bool, rest: bool) -> None:
        """As after a while in which others were served."""
        if rest:
            self._settle()
        wanted = [(first + i) % KEYS for i in range(6)]
        self._evict([(space, n) for n in wanted])
        self.get(space, wanted, far, into=False)

    @staticmethod
    def _block_of(file: Path) -> Block:
        for space in range(len(NAMESPACES)):
            for number in range(KEYS):
                if file.name.startswith(key(number).hex()) and file.parent.name == _scope(space).ns.hex():
                    return space, number
        raise AssertionError(f"a file of nobody: {file}")

    @rule()
    def rest(self) -> None:
        """When all has settled, everything that was acknowledged is found."""
        self._settle()
        self._look_at_disk()
        for space, namespace in enumerate(NAMESPACES):
            sure = [n for s, n in self.sure if s == space]
            codes = self.clients[False].lookup([key(n) for n in sure], prefix=False, namespace=namespace)
            assert TierCode.ABSENT not in codes

    # -- invariants ----------------------------------------------------------------------------------------------------

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "server"):
            return
        chain = self.server.daemon.chain

        def look() -> None:
            chain.host.check()
            assert chain.host.usage().used <= HOST_BYTES
            assert chain.host.arena.total + chain.host.index_capacity <= HOST_BYTES
            assert chain.below[0].usage().used <= self.disk_bytes
            held = [lease for lease, *_ in self.held]
            ledger = self.server.daemon.service.ledger
            assert {lease.id for lease in held} <= set(ledger.leases)

        self.server.ask(look)
        for _ in range(3):  # a file that is renamed while they are counted is seen twice
            total = self.server.bytes_on_disk()
            if total <= self.disk_bytes:
                return
        raise AssertionError(f"{total} bytes on disk, {self.disk_bytes} allowed")


EXAMPLES = int(os.environ.get("KVSTORE_TEST_STATEFUL", "0"))
Machine.TestCase.settings = settings(
    max_examples=EXAMPLES or 40,
    stateful_step_count=80 if EXAMPLES else 50,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestStateful = Machine.TestCase
