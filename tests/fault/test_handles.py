"""Handles of others, of nobody and of before: each is refused with a typed error and nothing is lent, lost or shown.

Slabs are capabilities, so their descriptors go only to sessions of their trust domain, and no client can change the
size or the seals of one.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from daemons import NAMESPACE, NS, SMALL, TOKEN, DaemonProcess, Raw, key, payload, store, until

from kvstore.chain import TierChain
from kvstore.errors import ForeignHandle, HandshakeRequired, LeaseExpired, LimitExceeded, TierDown, UnknownNamespace
from kvstore.eviction.lru import LRU
from kvstore.leases import Session
from kvstore.service import MAX_HANDLES, MAX_LENT, Service
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.tiers.host import HostTier
from kvstore.types import BlockHeader, BlockId, Dropped, Extent, Hit, LoadOutcome, MissReason, Scope, Stored, TierCode
from kvstore.wire import messages as m
from kvstore.wire.fds import FdServer

FOREIGN, UNKNOWN_NS, NO_HELLO, INVALID, LIMIT = "KV303", "KV302", "KV205", "KV203", "KV402"

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8


@pytest.fixture
def raw(shared_daemon: DaemonProcess) -> Iterator[Raw]:
    with Raw(shared_daemon.socket) as raw:
        yield raw
    until(shared_daemon.nothing_lent, "everything to be given back")


@pytest.fixture
def other(shared_daemon: DaemonProcess) -> Iterator[Raw]:
    with Raw(shared_daemon.socket) as other:
        yield other


def reserve(raw: Raw, *keys: bytes, nbytes: int = SMALL) -> int:
    reservation, _, rooms, others = raw.call("reserve", [NS, [[k, nbytes] for k in keys]])
    assert len(rooms) == len(keys), others
    return reservation


def lookup(raw: Raw, *keys: bytes) -> bytes:
    return raw.call("lookup", [NS, b"".join(keys), False])[0]


# -- over the wire -----------------------------------------------------------------------------------------------------


def test_before_hello_nothing_can_be_called(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket, hello=False) as raw:
        for method, params in {
            "lookup": [NS, b""],
            "lease": [NS, b""],
            "release": [[1]],
            "reserve": [NS, []],
            "commit": [1, []],
            "abort": [1],
            "prefetch": [NS, b""],
            "pin": [NS, b""],
            "unpin": [NS, b""],
            "drop": [NS, None],
            "stats": [],
        }.items():
            assert raw.refusal(method, params) == NO_HELLO


def test_before_the_token_nothing_can_be_called(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    for method, params in {"stats": [], "fetch": [1, 0], "lookup": [NS, b""]}.items():
        with Raw(("127.0.0.1", tcp_port), hello=False) as raw:
            assert raw.refusal(method, params) == NO_HELLO
    with Raw(("127.0.0.1", tcp_port), hello=False) as raw:
        raw.send(raw.frame([0, 1, "fill", [1, 0]], payload_bytes=10) + bytes(10))
        assert raw.last_words() == [NO_HELLO]


def test_a_namespace_never_introduced(raw: Raw) -> None:
    nobody = bytes(32)
    assert raw.refusal("lookup", [nobody, b""]) == UNKNOWN_NS
    assert raw.refusal("lease", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("reserve", [nobody, [[key(1), 100]]]) == UNKNOWN_NS
    assert raw.refusal("prefetch", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("pin", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("unpin", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("drop", [nobody, None]) == UNKNOWN_NS


def test_another_sessions_reservation(raw: Raw, other: Raw) -> None:
    own = key(1, "foreign reservation")
    reservation = reserve(other, own)
    assert raw.refusal("commit", [reservation, [0]]) == FOREIGN
    assert raw.call("abort", [reservation]) == []  # passed over
    assert lookup(other, own) == b"\x00"
    assert other.call("commit", [reservation, [0]]) == [[[0, "stored"]]]
    assert lookup(raw, own) == b"\x01"


def test_another_sessions_lease(shared_daemon: DaemonProcess, raw: Raw, other: Raw) -> None:
    own = key(1, "foreign lease")
    store(shared_daemon.client(), [own])
    lease = other.call("lease", [NS, own])[0]
    assert raw.call("release", [[lease]]) == []  # passed over
    stats = shared_daemon.stats()
    assert stats["leases"] == 1
    assert stats["tiers"]["host"]["leased_bytes"] == SMALL
    assert other.call("release", [[lease, lease, lease + 1]]) == []
    assert shared_daemon.stats()["leases"] == 0


@pytest.mark.parametrize("number", [0, 1, 999_999_999, (1 << 63) - 1])
def test_handles_of_nobody(raw: Raw, number: int) -> None:
    assert raw.refusal("commit", [number, [0]]) == FOREIGN
    assert raw.call("abort", [number]) == []
    assert raw.call("release", [[number] * 100]) == []


@pytest.mark.parametrize("number", [-1, 1 << 63, (1 << 64) - 1, 1.5, "1", None])
def test_handles_that_are_none(raw: Raw, number: Any) -> None:
    for method, params in {"commit": [number, [0]], "abort": [number], "release": [[number]]}.items():
        assert raw.refusal(method, params) == INVALID


@pytest.mark.parametrize("indexes", [[1], [0, 1], [16_384]])
def test_indexes_that_were_not_offered(raw: Raw, indexes: list[int]) -> None:
    """Nothing is stored, not even the index that is right; the reservation is as it was."""
    own = key(indexes[-1], f"index {len(indexes)}")
    reservation = reserve(raw, own)
    assert raw.refusal("commit", [reservation, indexes]) == FOREIGN
    assert lookup(raw, own) == b"\x00"
    assert raw.call("commit", [reservation, [0]]) == [[[0, "stored"]]]


def test_an_index_named_twice(raw: Raw) -> None:
    reservation = reserve(raw, key(1, "twice"))
    assert raw.refusal("commit", [reservation, [0, 0]]) == INVALID
    assert lookup(raw, key(1, "twice")) == b"\x00"


def test_commit_twice(raw: Raw) -> None:
    own = key(1, "commit twice")
    reservation = reserve(raw, own)
    assert raw.call("commit", [reservation, [0]]) == [[[0, "stored"]]]
    assert raw.refusal("commit", [reservation, [0]]) == FOREIGN
    assert raw.call("abort", [reservation]) == []
    assert lookup(raw, own) == b"\x01"


def test_what_a_commit_does_not_name_is_given_back(shared_daemon: DaemonProcess, raw: Raw) -> None:
    keys = [key(n, "in part") for n in range(3)]
    reservation = reserve(raw, *keys)
    assert raw.call("commit", [reservation, [1]]) == [[[1, "stored"]]]
    assert lookup(raw, *keys) == b"\x00\x01\x00"
    assert shared_daemon.nothing_lent()


def test_the_same_key_twice_in_one_request(raw: Raw) -> None:
    own = key(1, "same key")
    reservation, _, rooms, others = raw.call("reserve", [NS, [[own, 100], [own, 100]]])
    assert [room[0] for room in rooms] == [0]
    assert others == [[1, "in_flight"]]
    raw.call("abort", [reservation])
    assert reserve(raw, own)


def test_fetch_and_fill_need_a_remote_session(raw: Raw) -> None:
    assert raw.refusal("fetch", [1, 0]) == INVALID
    assert raw.refusal("fill", [1, 0]) == INVALID


def test_remote_handles_of_others(shared_daemon: DaemonProcess, tcp_port: int, other: Raw) -> None:
    own = key(1, "remote")
    store(shared_daemon.client(), [own])
    lease = other.call("lease", [NS, own])[0]
    reservation = reserve(other, key(2, "remote"))
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as far:
        mine = far.call("lease", [NS, own])[0]
        assert far.refusal("fetch", [lease, 0]) == FOREIGN
        assert far.refusal("fetch", [mine, 1]) == FOREIGN
        assert far.call("fetch", [mine, 0]) is not None
        far.call("release", [[mine]])
        assert far.refusal("fetch", [mine, 0]) == FOREIGN
        far.send(far.frame([0, 50, "fill", [reservation, 0]], payload_bytes=SMALL) + bytes(100))
        assert far.last_words() == [FOREIGN]


def test_so_many_handles_and_no_more(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket, timeout_s=30) as raw:
        for verb, params in {"lease": [NS, b""], "reserve": [NS, []]}.items():
            frames = b"".join(raw.frame([0, n, verb, params]) for n in range(1, 11))
            answers: list[Any] = []
            for _ in range(MAX_HANDLES // 10 + 1):
                raw.send(frames)
                answers = [raw.answer() for _ in range(10)]
            errors = [answer[2][0] for answer in answers if answer[2] is not None]
            # A reservation without rooms ends at once; leases stay until they are released.
            assert set(errors) == ({LIMIT} if verb == "lease" else set())
    until(shared_daemon.nothing_lent, "everything to be given back")


# -- descriptors and seals ---------------------------------------------------------------------------------------------


class Fds:
    """A connection to the descriptor socket, by hand."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(f"{daemon.socket}.fd")

    def ask(self, token: bytes, slab: int) -> tuple[int, list[int]]:
        self.sock.sendall(struct.pack("<16sQ", token, slab))
        return self.answer()

    def answer(self) -> tuple[int, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 8, 4)
        return struct.unpack("<Q", data)[0], list(fds)

    def __enter__(self) -> Fds:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


@pytest.fixture
def slab(shared_daemon: DaemonProcess, raw: Raw) -> int:
    """A slab of the shared daemon."""
    own = key(1, "slab")
    store(shared_daemon.client(), [own])
    lease, _, granted, _, _ = raw.call("lease", [NS, own])
    raw.call("release", [[lease]])
    return granted[0][3][0][0]


def test_a_session_is_handed_its_slab(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        for _ in range(3):
            nbytes, (fd,) = fds.ask(raw.session, slab)
            assert os.fstat(fd).st_size == nbytes == 1 << 20
            os.close(fd)


@pytest.mark.parametrize("wrong", ["token", "slab", "both"])
def test_others_are_handed_nothing(shared_daemon: DaemonProcess, raw: Raw, slab: int, wrong: str) -> None:
    token = raw.session if wrong == "slab" else b"not such a token"
    with Fds(shared_daemon) as fds:
        for number in (slab,) if wrong == "token" else (0, 999_999, (1 << 64) - 1):
            assert fds.ask(token, number) == (0, [])
        nbytes, held = fds.ask(raw.session, slab)  # the connection is still good
        assert nbytes
        os.close(held[0])


def test_a_closed_session_is_handed_nothing(shared_daemon: DaemonProcess, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        with Raw(shared_daemon.socket) as gone:
            nbytes, held = fds.ask(gone.session, slab)
            assert nbytes
            os.close(held[0])
        until(lambda: fds.ask(gone.session, slab) == (0, []), "the session to end")


def test_a_remote_session_is_handed_nothing(shared_daemon: DaemonProcess, tcp_port: int, slab: int) -> None:
    with Fds(shared_daemon) as fds, Raw(("127.0.0.1", tcp_port), token=TOKEN) as far:
        assert fds.ask(far.session, slab) == (0, [])


def test_requests_in_pieces(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    request = struct.pack("<16sQ", raw.session, slab)
    with Fds(shared_daemon) as fds:
        for n in range(len(request)):
            fds.sock.sendall(request[n : n + 1])
        nbytes, (fd,) = fds.answer()
        os.close(fd)
        fds.sock.sendall(request * 3 + request[:10])
        for _ in range(3):
            nbytes, (fd,) = fds.answer()
            assert nbytes == 1 << 20
            os.close(fd)


def test_a_slab_cannot_be_resized_or_sealed_by_a_client(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        nbytes, (fd,) = fds.ask(raw.session, slab)
    try:
        for size in (0, nbytes - 4096, nbytes + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_WRITE)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
        with pytest.raises(PermissionError):
            os.posix_fallocate(fd, nbytes, 4096)  # growing by another way
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # and through another door
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        os.close(again)
    finally:
        os.close(fd)


def test_a_mapping_shows_what_was_stored(shared_daemon: DaemonProcess, raw: Raw) -> None:
    own = key(2, "mapped")
    store(shared_daemon.client(), [own])
    _, _, granted, _, _ = raw.call("lease", [NS, own])
    ((number, offset, nbytes),) = granted[0][3]
    with Fds(shared_daemon) as fds:
        size, (fd,) = fds.ask(raw.session, number)
    with mmap.mmap(fd, size) as mapping:
        assert mapping[offset : offset + nbytes] == payload(own)
    os.close(fd)


# -- two trust domains -------------------------------------------------------------------------------------------------


class House:
    """A service with sessions of several trust domains, without a socket."""

    def __init__(self, nbytes: int = 4 << 20, below: list[Tier] | None = None) -> None:
        self.host = HostTier(nbytes, LRU(), slab_bytes=256 * 1024, ahead_bytes=0)
        self.chain = TierChain(self.host, below or [])
        self.service = Service(self.chain, max_ttl_s=60)
        self.told: list[tuple[str, m.Message]] = []

    def session(self, domain: str, remote: bool = False) -> Session:
        session = self.service.ledger.open(domain, remote, lambda method, params: self.told.append((method, params)))
        if not remote:
            self.ask(session, m.Hello(m.PROTOCOL_VERSION, domain, [NAMESPACE]))
        return session

    def ask(self, session: Session, params: m.Message) -> Any:
        result: Any = self.service.call(session, type(params).__name__.lower(), params)
        assert isinstance(result, m.Message)
        return result

    async def put(self, session: Session, *keys: bytes, nbytes: int = SMALL) -> list[str]:
        offers = [m.Offer(k, nbytes) for k in keys]
        reply = await self.reserve(session, *offers)
        for room in reply.rooms:
            for view in self.host.arena.views(at(room.extents)):
                view[:] = payload(keys[room.index], nbytes)[: len(view)]
        indexes = [room.index for room in reply.rooms]
        return [o.status for o in self.ask(session, m.Commit(reply.reservation, indexes)).outcomes] if indexes else []

    async def reserve(self, session: Session, *offers: m.Offer, wait_s: float = 0.0) -> m.ReserveReply:
        made: Any = self.service.call(session, "reserve", m.Reserve(NS, list(offers), 30.0, wait_s))
        return await made if inspect.isawaitable(made) else made

    def check(self) -> None:
        self.host.check()


def at(extents: Any) -> list[Extent]:
    """Extents as they travel, as the arena knows them."""
    return [Extent(*extent) for extent in extents]


async def test_one_domain_sees_nothing_of_another() -> None:
    house = House()
    a, b = house.session("uid-1"), house.session("uid-2")
    own = key(1, "domains")
    assert await house.put(a, own) == ["stored"]
    assert house.ask(a, m.Lookup(NS, own)).tiers == b"\x01"
    assert house.ask(b, m.Lookup(NS, own)).tiers == b""
    lease = house.ask(b, m.Lease(NS, own))
    assert (lease.granted, [r.reason for r in lease.refused]) == ([], [MissReason.ABSENT])
    assert house.ask(b, m.Pin(NS, own)).count == 0
    assert await house.service.drop(b, m.Drop(NS, None)) == m.CountReply(0)
    # The same key is free for the other domain, with content of its own, in memory of its own.
    assert await house.put(b, own) == ["stored"]
    theirs = house.ask(b, m.Lease(NS, own)).granted[0].extents
    ours = house.ask(a, m.Lease(NS, own)).granted[0].extents
    assert {slab for slab, _, _ in ours}.isdisjoint(slab for slab, _, _ in theirs)
    house.check()


async def test_a_namespace_is_introduced_per_domain() -> None:
    house = House()
    house.session("uid-1")
    b = house.service.ledger.open("uid-2", False, lambda *_: None)
    house.ask(b, m.Hello(m.PROTOCOL_VERSION, "b", []))
    with pytest.raises(UnknownNamespace):
        house.ask(b, m.Lookup(NS, b""))


async def test_handles_do_not_cross_domains() -> None:
    house = House()
    a, b = house.session("uid-1"), house.session("uid-2")
    reply = await house.reserve(a, m.Offer(key(1), SMALL))
    with pytest.raises(ForeignHandle):
        house.ask(b, m.Commit(reply.reservation, [0]))
    house.ask(b, m.Abort(reply.reservation))
    assert house.ask(a, m.Commit(reply.reservation, [0])).outcomes == [m.Outcome(0, "stored")]
    house.check()


async def test_a_slab_is_handed_to_its_domain_only(workdir: Any) -> None:
    """Over a real socket, with sessions of two domains in one daemon."""
    house = House()
    a, b = house.session("uid-1"), house.session("uid-2")
    far = house.session("uid-1", remote=True)
    await house.put(a, key(1))
    number = house.ask(a, m.Lease(NS, key(1))).granted[0].extents[0][0]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(workdir / "s.fd"))
    listening.listen()
    listening.setblocking(False)
    server = FdServer(listening, house.host.arena, house.service.ledger.by_token.get, {os.getuid()}, 10)

    def ask(session: Session) -> tuple[int, list[int]]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(workdir / "s.fd"))
            sock.sendall(struct.pack("<16sQ", session.token, number))
            data, fds, _, _ = socket.recv_fds(sock, 8, 4)
            return struct.unpack("<Q", data)[0], list(fds)

    assert await asyncio.to_thread(ask, b) == (0, [])
    assert await asyncio.to_thread(ask, far) == (0, [])
    nbytes, (fd,) = await asyncio.to_thread(ask, a)
    assert nbytes == 256 * 1024
    os.close(fd)
    house.service.ledger.close(a)
    assert await asyncio.to_thread(ask, a) == (0, [])
    server.close()


async def test_memory_never_changes_its_domain_while_somebody_may_hold_it() -> None:
    """B fills what A has freed only in slabs that were made for B."""
    house = House(2 << 20)
    a, b = house.session("uid-1"), house.session("uid-2")
    await house.put(a, *[key(n) for n in range(100)])
    granted = house.ask(a, m.Lease(NS, b"".join(key(n) for n in range(100)))).granted
    of_a = {slab for grant in granted for slab, _, _ in grant.extents}
    for lease in list(a.leases):
        house.ask(a, m.Release([lease]))
    assert await house.put(b, *[key(n) for n in range(40)])
    granted = house.ask(b, m.Lease(NS, b"".join(key(n) for n in range(40)))).granted
    assert granted
    assert of_a.isdisjoint(slab for g in granted for slab, _, _ in g.extents)
    house.check()


async def test_one_domain_cannot_take_the_memory_that_anothers_clients_hold() -> None:
    """Giving such a slab up would return nothing, so nobody loses a block for it and both go on."""
    house = House(2 << 20)
    a, b = house.session("uid-1"), house.session("uid-2")
    big = 64 * 1024
    keys = [key(n) for n in range(28)]
    assert await house.put(a, *keys, nbytes=big) == ["stored"] * 28
    for number in {slab for g in house.ask(a, m.Lease(NS, b"".join(keys))).granted for slab, _, _ in g.extents}:
        house.host.arena.hold(number, a.id)
    house.ask(a, m.Release(list(a.leases)))
    assert await house.put(b, key(100), nbytes=big) == []
    assert house.ask(a, m.Lookup(NS, b"".join(keys))).tiers == b"\x01" * 28
    assert await house.put(a, key(200), nbytes=big) == ["stored"]
    house.check()
    house.service.ledger.close(a)  # its clients are gone, and with them what they held
    assert await house.put(b, key(100), nbytes=big) == ["stored"]
    house.check()


async def test_a_store_that_finds_no_room_evicts_nothing() -> None:
    house = House(2 << 20)
    a = house.session("uid-1")
    keys = [key(n) for n in range(28)]
    assert await house.put(a, *keys, nbytes=64 * 1024) == ["stored"] * 28
    house.ask(a, m.Lease(NS, b"".join(keys[:20])))
    assert await house.put(a, key(100), nbytes=1 << 20) == []
    assert house.ask(a, m.Lookup(NS, b"".join(keys))).tiers == b"\x01" * 28
    assert await house.put(a, key(100), nbytes=512 * 1024) == ["stored"]
    assert house.ask(a, m.Lookup(NS, b"".join(keys))).tiers == b"\x01" * 20
    house.check()


# -- what ends while something waits -----------------------------------------------------------------------------------


class Gate(Tier):
    """A lower tier that takes as long as it is told for what it is given, and keeps none of that."""

    name = "gate"
    code = TierCode.DISK

    def __init__(self) -> None:
        self.counters = TierCounters()
        self.open = asyncio.Event()
        self.drop_error: Exception | None = None
        self.asked: list[BlockId] = []
        self.here: dict[BlockId, bytes] = {}

    def size(self, block: BlockId) -> int | None:
        return len(self.here[block]) if block in self.here else None

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        content = memoryview(self.here[block])
        for view in into:
            view[:], content = content[: len(view)], content[len(view) :]
        return Hit(BlockHeader(), len(self.here[block]))

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> Stored | Dropped:
        self.asked.append(block)
        await self.open.wait()
        return Stored()

    async def drop(self, block: BlockId) -> bool:
        if self.drop_error is not None and block in self.asked:
            raise self.drop_error
        return False

    async def clear(self, scope: Scope) -> int:
        return 0

    def touch(self, blocks: Iterable[BlockId]) -> None: ...

    def pin(self, block: BlockId, until: float) -> bool:
        return False

    def usage(self) -> Usage:
        return Usage(0, 0, 0)

    async def check(self, fix: bool = False) -> list[Finding]:
        return []

    async def close(self) -> None: ...


async def fill(house: House, session: Session) -> int:
    """Store until memory is full of blocks that the lower tier has yet to be told of; how many there are."""
    stored = 0
    while await house.put(session, key(stored, "filling")) == ["stored"]:
        stored += 1
    return stored


@pytest.mark.parametrize("ending", ["abort", "commit", "close", "nothing"])
async def test_a_reservation_that_ends_while_it_waits_leaks_nothing(ending: str) -> None:
    """Ids can be guessed, so a client can end its own reservation before it was told of it."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    stored = await fill(house, a)
    assert stored >= 16
    waiting = asyncio.ensure_future(house.reserve(a, *[m.Offer(key(n), SMALL) for n in range(3)], wait_s=20))
    while not a.reservations:
        await asyncio.sleep(0)
    (reservation,) = a.reservations
    endings: dict[str, Callable[[], Any]] = {
        "abort": lambda: house.ask(a, m.Abort(reservation)),
        "commit": lambda: house.ask(a, m.Commit(reservation, [])),
        "close": lambda: house.service.ledger.close(a),
        "nothing": lambda: None,
    }
    endings[ending]()
    gate.open.set()
    reply = await waiting
    if ending == "nothing":
        assert [room.index for room in reply.rooms] == [0, 1, 2]
        house.ask(a, m.Abort(reservation))
    else:
        assert reply.rooms == []
    assert await house.chain.drain(5) == 0
    assert house.service.ledger.in_flight == {}
    assert house.service.ledger.reservations == {}
    assert house.host.arena.used() == house.host.used_bytes
    house.check()


async def test_a_store_refused_in_a_burst_costs_no_walk_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be evicted nobody looks for it, or a burst would hold up everybody else."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    stored = await fill(house, a)
    walks: list[int] = []
    order = house.host.order.victims
    monkeypatch.setattr(house.host.order, "victims", lambda *args: walks.append(1) or order(*args))
    reply = await house.reserve(a, *[m.Offer(key(n, "burst"), SMALL) for n in range(100)])
    assert {other.status for other in reply.others} == {"host_full"}
    assert len(reply.others) == 100
    assert walks == []
    gate.open.set()
    assert await house.chain.drain(5) == 0
    reply = await house.reserve(a, *[m.Offer(key(n, "burst"), SMALL) for n in range(stored)])
    assert len(reply.rooms) == stored
    assert walks
    house.check()


async def test_what_is_below_can_be_had_while_memory_waits_to_be_written() -> None:
    """A block that was acknowledged and has gone down is readable also in the middle of a burst."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    scope = house.service.namespaces.find("uid-1", NS).scope
    gate.here[BlockId(scope, key(1, "below"))] = payload(key(1, "below"))
    await fill(house, a)
    lease = house.ask(a, m.Lease(NS, key(1, "below")))
    assert (lease.granted, lease.refused, lease.pending) == ([], [], 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert house.told == []
    gate.open.set()
    async with asyncio.timeout(5):
        while not house.told:
            await asyncio.sleep(0)
    ((method, notice),) = house.told
    assert method == "leased"
    assert isinstance(notice, m.LeaseNotice)
    assert notice.refused == []
    (view,) = house.host.arena.views(at(notice.granted[0].extents))
    assert bytes(view) == payload(key(1, "below"))
    assert await house.chain.drain(5) == 0
    house.check()


async def test_waiting_for_room_while_the_last_write_ends() -> None:
    """The write may end between the refusal and the wait for it."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    await fill(house, a)
    made: Any = house.service.call(a, "reserve", m.Reserve(NS, [m.Offer(key(1), SMALL)], 30.0, 20.0))
    gate.open.set()
    assert await house.chain.drain(5) == 0
    reply = await made
    assert [room.index for room in reply.rooms] == [0]
    house.check()


async def test_a_lower_tier_that_cannot_forget_does_not_hold_memory() -> None:
    """A block dropped while it was being written is to be dropped below as well; if that fails memory still returns."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    reply = await house.reserve(a, m.Offer(key(1), SMALL))
    committed: Any = house.service.call(a, "commit", m.Commit(reply.reservation, [0], True))
    waiting = asyncio.ensure_future(committed)
    while not gate.asked:
        await asyncio.sleep(0)
    gate.drop_error = TierDown("the gate does not forget.")
    with pytest.raises(TierDown):
        await house.service.drop(a, m.Drop(NS, key(1)))
    gate.open.set()
    async with asyncio.timeout(5):
        assert (await waiting).outcomes == [m.Outcome(0, "not_durable")]
    assert await house.chain.drain(5) == 0
    assert house.host.arena.used() == 0
    house.check()


async def test_a_lease_that_has_expired_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    a = house.session("uid-1")
    far = house.session("uid-1", remote=True)
    await house.put(a, key(1), key(2))
    far.greeted = True
    lease = house.ask(far, m.Lease(NS, key(1), 0.5))
    assert len(house.service.payload(far, m.Fetch(lease.lease, 0))[1]) == 1
    late = time.monotonic() + 0.5 + 1.1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    with pytest.raises(LeaseExpired):
        house.service.payload(far, m.Fetch(lease.lease, 0))
    house.service.ledger.expire()
    assert house.service.ledger.leases == {}
    with pytest.raises(ForeignHandle):
        house.service.payload(far, m.Fetch(lease.lease, 0))
    house.check()


async def test_an_expired_reservation_stores_nothing_and_its_memory_waits_for_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that is still running must not land in somebody else's block."""
    house = House()
    a, b = house.session("uid-1"), house.session("uid-1")
    reply = await house.reserve(a, m.Offer(key(1), SMALL))
    late = time.monotonic() + 30 + 1.1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    house.service.ledger.expire()
    used = house.host.arena.used()
    assert used == SMALL
    assert await house.put(b, key(1)) == ["stored"]  # others may store it meanwhile, elsewhere
    assert house.host.arena.used() == 2 * SMALL
    with pytest.raises(LeaseExpired):
        house.ask(a, m.Commit(reply.reservation, [0]))
    assert house.host.arena.used() == SMALL
    house.check()


async def test_limits_of_one_session() -> None:
    house = House()
    a = house.session("uid-1")
    for _ in range(MAX_HANDLES):
        house.ask(a, m.Lease(NS, b""))
    with pytest.raises(LimitExceeded):
        house.ask(a, m.Lease(NS, b""))
    house.ask(a, m.Release(list(a.leases)))
    house.ask(a, m.Lease(NS, b""))


async def test_blocks_lent_to_one_session_are_bounded() -> None:
    """A block may be leased many times over, but what the daemon remembers of that is bounded."""
    house = House()
    a, b = house.session("uid-1"), house.session("uid-1")
    await house.put(a, key(1))
    many = m.Lease(NS, key(1) * m.MAX_KEYS)
    leases = [house.ask(a, many).lease for _ in range(MAX_LENT // m.MAX_KEYS)]
    for too_many in (many, m.Lease(NS, key(1))):
        with pytest.raises(LimitExceeded):
            house.ask(a, too_many)
    assert len(house.ask(b, many).granted) == m.MAX_KEYS
    house.ask(a, m.Release(leases[:1]))
    assert len(house.ask(a, many).granted) == m.MAX_KEYS
    house.service.ledger.close(a)
    house.service.ledger.close(b)
    assert (a.lent, b.lent) == (0, 0)
    house.check()


async def test_nothing_before_hello() -> None:
    house = House()
    session = house.service.ledger.open("uid-1", False, lambda *_: None)
    for method in m.METHODS:
        if method != "hello":
            with pytest.raises(HandshakeRequired):
                house.service.call(session, method, m.Empty())


async def test_a_dropped_block_is_readable_by_who_leased_it_and_by_nobody_else() -> None:
    house = House()
    a = house.session("uid-1")
    await house.put(a, key(1))
    lease = house.ask(a, m.Lease(NS, key(1)))
    assert await house.service.drop(a, m.Drop(NS, key(1))) == m.CountReply(1)
    assert house.ask(a, m.Lookup(NS, key(1))).tiers == b""
    (view,) = house.host.arena.views(at(lease.granted[0].extents))
    assert bytes(view) == payload(key(1))
    house.check()
    view.release()
    house.ask(a, m.Release([lease.lease]))
    assert house.host.arena.used() == 0
    house.check()
