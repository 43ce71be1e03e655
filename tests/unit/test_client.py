"""Both faces of the client against a real daemon: they do the same, and what they hold ends here before it does there.

Most tests have one body, run over the blocking face and the asyncio face.
"""

from __future__ import annotations

import asyncio
import time

import pytest
from client_kit import BIG, Face, MakeFace, soon
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
)

from kvstore import Namespace
from kvstore.client.core import Core
from kvstore.errors import FrameTooLarge, InvalidParams, LeaseExpired, LimitExceeded
from kvstore.types import BlockHeader, Dropped, DropReason, Exists, MissReason, Stored, TierCode
from kvstore.wire import messages as m

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
