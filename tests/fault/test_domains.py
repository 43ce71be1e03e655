"""Trust domains see nothing of one another, memory included."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

import pytest
from daemons import NS, SMALL, key
from service_kit import House

from kvstore.errors import ForeignHandle, UnknownNamespace
from kvstore.leases import Session
from kvstore.types import MissReason
from kvstore.wire import messages as m
from kvstore.wire.fds import FdServer


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
