"""Clients without shared memory: the same answers as with it, only with the token, and bytes whole or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from daemons import (
    NAMESPACE,
    NS,
    SMALL,
    TOKEN,
    Bystander,
    DaemonProcess,
    MakeDaemon,
    Raw,
    free_port,
    header,
    is_right,
    key,
    payload,
    store,
    until,
)

from kvstore import AsyncKVStoreClient, KVStoreClient
from kvstore.client.address import parse_address
from kvstore.errors import AuthenticationFailed, ConfigError, ConnectionLost, DeadlineExceeded, InvalidParams
from kvstore.types import BlockHeader, Exists, MissReason, Stored, TierCode

MIB = 1 << 20


@pytest.fixture(params=["sync", "async"])
async def remote(
    request: pytest.FixtureRequest, shared_daemon: DaemonProcess, tcp_port: int
) -> AsyncIterator[Callable[..., Any]]:
    """Calls an operation of a client on TCP, of either face."""
    make: Any = AsyncKVStoreClient if request.param == "async" else KVStoreClient
    client = make(f"tcp://127.0.0.1:{tcp_port}", namespace=NAMESPACE, token=TOKEN, timeout_s=20)

    async def do(name: str, *args: Any, **how: Any) -> Any:
        operation = getattr(client, name) if isinstance(name, str) else name
        if request.param == "async":
            return await operation(*args, **how)
        return await asyncio.to_thread(operation, *args, **how)

    do.face = request.param  # type: ignore[attr-defined]
    yield do
    await do("close")


def face(remote: Any) -> str:
    return remote.face


SIZES = [1, 100, SMALL - 1, SMALL, SMALL + 1, 100_001, MIB, 3 * MIB + 17]
"""The last takes several slabs of the daemon, so several parts."""


@pytest.mark.parametrize("nbytes", SIZES)
async def test_what_one_stores_the_other_reads(remote: Any, shared_daemon: DaemonProcess, nbytes: int) -> None:
    near = shared_daemon.client()
    far_own, near_own = key(nbytes, f"far {face(remote)}"), key(nbytes, f"near {face(remote)}")
    assert await remote("put", far_own, payload(far_own, nbytes), header(far_own)) == Stored()
    assert await remote("put", far_own, payload(far_own, nbytes), header(far_own)) == Exists()
    assert store(near, [near_own], nbytes) == [Stored()]
    for own in (far_own, near_own):
        seen_near, seen_far = near.get(own), await remote("get", own)
        assert is_right(own, seen_near)
        assert is_right(own, seen_far)
        assert seen_near == seen_far
        assert len(seen_far.data) == nbytes
    assert await remote("drop", [far_own, near_own]) == 2
    assert near.lookup([far_own, near_own], prefix=False) == [TierCode.ABSENT] * 2


async def test_answers_are_those_of_shared_memory(remote: Any, shared_daemon: DaemonProcess) -> None:
    near = shared_daemon.client()
    keys = [key(n, f"same {face(remote)}") for n in range(6)]
    store(near, keys[:3])
    for prefix in (True, False):
        assert await remote("lookup", keys, prefix=prefix) == near.lookup(keys, prefix=prefix)
    assert await remote("get_many", keys) == near.get_many(keys)
    buffers = [bytearray(SMALL) for _ in keys]
    far_buffers = [bytearray(SMALL) for _ in keys]
    assert await remote("get_into", keys, far_buffers) == near.get_into(keys, buffers)
    assert far_buffers == buffers
    items = [(k, payload(k), header(k)) for k in keys]
    assert await remote("put_many", items) == [Exists()] * 3 + [Stored()] * 3
    assert all(map(is_right, keys, near.get_many(keys)))
    for verb in ("pin", "unpin", "prefetch"):
        assert await remote(verb, keys) == getattr(near, verb)(keys)
    assert (await remote("stats"))["boot"] == near.stats()["boot"]


async def test_leases_and_reservations_by_hand(remote: Any, shared_daemon: DaemonProcess) -> None:
    own, other = key(1, f"hand {face(remote)}"), key(2, f"hand {face(remote)}")
    await remote("put", own, payload(own), header(own))
    lease = await remote("lease", [own, other], headers=True)
    block = lease.blocks[0]
    assert (block.parts, block.array, block.header) == ([], None, header(own))
    assert lease.blocks[1].reason == MissReason.ABSENT
    buffer = bytearray(SMALL)
    await remote("read", lease, block, buffer)
    assert bytes(buffer) == payload(own)
    assert lease.valid()
    with pytest.raises(InvalidParams):
        block.copy_into(buffer)
    lease.release()
    reservation = await remote("reserve", [(other, SMALL, BlockHeader())])
    with pytest.raises(InvalidParams):
        reservation.blocks[0].write(payload(other))
    reservation.abort()
    await asyncio.to_thread(until, shared_daemon.nothing_lent, "everything to be given back")


async def test_a_buffer_of_another_size_is_refused_and_the_connection_lives(remote: Any) -> None:
    own = key(3, f"size {face(remote)}")
    await remote("put", own, payload(own), header(own))
    with pytest.raises(InvalidParams):
        await remote("get_into", [own], [bytearray(SMALL + 1)])
    lease = await remote("lease", [own])
    for wrong in (SMALL - 1, SMALL + 1, 0):
        with pytest.raises(InvalidParams):
            await remote("read", lease, lease.blocks[0], bytearray(wrong))
    assert lease.valid()
    assert is_right(own, await remote("get", own))
    lease.release()


# -- the token ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\x00", "ü" * 300])
def test_without_the_token_nothing(shared_daemon: DaemonProcess, tcp_port: int, token: str) -> None:
    with KVStoreClient(f"tcp://127.0.0.1:{tcp_port}", namespace=NAMESPACE, token=token, timeout_s=20) as client:
        for _ in range(2):
            with pytest.raises(AuthenticationFailed):
                client.lookup([])
        assert client.boot is None
    with Raw(("127.0.0.1", tcp_port), hello=False) as raw:
        raw.ask("hello", [1, "raw", [], token])
        raw.send(raw.frame([0, 2, "stats", []]) * 3)  # not waited for
        assert raw.last_words() == ["KV301"]


async def test_without_the_token_nothing_async(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    address = f"tcp://127.0.0.1:{tcp_port}"
    async with AsyncKVStoreClient(address, namespace=NAMESPACE, token="wrong", timeout_s=20) as client:
        outcomes = await asyncio.gather(*[client.lookup([]) for _ in range(5)], return_exceptions=True)
        assert all(isinstance(outcome, AuthenticationFailed) for outcome in outcomes)
        assert client.boot is None


def test_the_token_is_not_repeated_anywhere(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    wrong = "a wrong token that must not be shown"
    with (
        KVStoreClient(f"tcp://127.0.0.1:{tcp_port}", token=wrong, timeout_s=20) as client,
        pytest.raises(AuthenticationFailed) as caught,
    ):
        client.stats()
    shown = str(caught.value) + shared_daemon.log.read_text() + str(shared_daemon.stats())
    assert wrong not in shown
    assert TOKEN not in shown


def test_a_token_is_not_needed_where_the_kernel_tells_who_it_is(shared_daemon: DaemonProcess) -> None:
    with KVStoreClient(shared_daemon.socket, token="irrelevant", timeout_s=20) as client:
        assert client.stats()["ready"]


def test_beyond_loopback_the_daemon_needs_a_token(make_daemon: MakeDaemon) -> None:
    from kvstore.config import load

    with pytest.raises(ConfigError, match="no token"):
        load(make_daemon({"listen.tcp": f"0.0.0.0:{free_port()}"}).settings, env={})


# -- faults ------------------------------------------------------------------------------------------------------------


async def test_nobody_listens(remote: Any) -> None:
    with KVStoreClient(f"tcp://127.0.0.1:{free_port()}", namespace=NAMESPACE, token=TOKEN) as client:
        with pytest.raises(ConnectionLost):
            client.lookup([])
        with pytest.raises(ConnectionLost):
            client.connect()


@pytest.mark.parametrize("bad", ["tcp://", "tcp://host", "tcp://host:", "tcp://:1", "tcp://host:0", "tcp://host:99999"])
def test_addresses_that_are_none(bad: str) -> None:
    with pytest.raises(InvalidParams):
        parse_address(bad)


def test_addresses() -> None:
    assert parse_address("tcp://[::1]:7071") == ("::1", 7071)
    assert parse_address("tcp://localhost:1") == ("localhost", 1)
    assert parse_address("unix:/run/s") == parse_address("/run/s") == "/run/s"


async def test_a_hung_daemon(remote: Any, shared_daemon: DaemonProcess) -> None:
    """A read that was given up may still be on its way into the caller's buffer: so the connection ends with it."""
    own = key(1, f"hung {face(remote)}")
    await remote("put", own, payload(own, MIB), header(own))
    lease = await remote("lease", [own])
    with shared_daemon.hung():
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await remote("lookup", [own], timeout_s=0.1)
        assert time.monotonic() - began < 2
    buffer = bytearray(MIB)
    await remote("read", lease, lease.blocks[0], buffer)
    assert bytes(buffer) == payload(own, MIB)
    lease.release()
    assert is_right(own, await remote("get", own))
    await asyncio.to_thread(until, shared_daemon.nothing_lent, "everything to be given back")


async def test_a_read_given_up_does_not_write_into_the_buffer_later(
    shared_daemon: DaemonProcess, tcp_port: int
) -> None:
    own = key(2, "given up")
    store(shared_daemon.client(), [own], MIB)
    clients: list[Any] = [
        make(f"tcp://127.0.0.1:{tcp_port}", namespace=NAMESPACE, token=TOKEN, timeout_s=20)
        for make in (KVStoreClient, AsyncKVStoreClient)
    ]
    near: KVStoreClient = clients[0]
    far: AsyncKVStoreClient = clients[1]
    near_lease: Any = near.lease([own])
    far_lease: Any = await far.lease([own])
    buffers = [bytearray(MIB), bytearray(MIB)]
    near.timeout_s = far.timeout_s = 0.1
    with shared_daemon.hung():
        with pytest.raises(DeadlineExceeded):
            near.read(near_lease, near_lease.blocks[0], buffers[0])
        with pytest.raises(DeadlineExceeded):
            await far.read(far_lease, far_lease.blocks[0], buffers[1])
    near.timeout_s = far.timeout_s = 20
    assert not near_lease.valid()
    assert not far_lease.valid()
    assert near.lookup([own]) == await far.lookup([own]) == [TierCode.HOST]  # over new connections
    assert buffers == [bytearray(MIB), bytearray(MIB)]
    near.close()
    await far.close()
    await asyncio.to_thread(until, shared_daemon.nothing_lent, "everything to be given back")


def test_killed_in_the_middle_of_a_payload(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    """Half a block is no block, and its memory is given back."""
    own = key(1, "half")
    used = shared_daemon.stats()["tiers"]["host"]["writing_bytes"]
    raw = Raw(("127.0.0.1", tcp_port), token=TOKEN)
    reservation = raw.call("reserve", [NS, [[own, MIB]]])[0]
    raw.send(raw.frame([0, 5, "fill", [reservation, 0]], payload_bytes=MIB) + payload(own, MIB)[: MIB // 2])
    assert shared_daemon.stats()["tiers"]["host"]["writing_bytes"] == used + MIB
    raw.close()
    until(shared_daemon.nothing_lent, "everything to be given back")
    assert shared_daemon.stats()["tiers"]["host"]["writing_bytes"] == used
    assert shared_daemon.client().lookup([own]) == []


def test_a_payload_byte_by_byte(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    own = key(1, "drip")
    content = payload(own, 300)
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
        reservation = raw.call("reserve", [NS, [[own, 300]]])[0]
        stream = raw.frame([0, 5, "fill", [reservation, 0]], payload_bytes=300) + content
        stream += raw.frame([0, 6, "commit", [reservation, [0]]])
        for n in range(len(stream)):
            raw.send(stream[n : n + 1])
        assert raw.answer() == [1, 5, None, []]
        assert raw.answer() == [1, 6, None, [[[0, "stored"]]]]
    loaded: Any = shared_daemon.client().get(own)
    assert loaded
    assert bytes(loaded.data) == content


def test_who_does_not_read_costs_no_memory(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    """256 MiB asked for and never fetched: the daemon sends from where the block lies, and holds nothing more."""
    own = key(1, "unread")
    store(shared_daemon.client(), [own], 4 * MIB)
    before = shared_daemon.own_memory()
    with Bystander(shared_daemon.socket) as other, Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
        lease = raw.call("lease", [NS, own])[0]
        raw.send(b"".join(raw.frame([0, n, "fetch", [lease, 0]]) for n in range(1, 65)))
        other.next_round()
        assert shared_daemon.own_memory() - before < 24 * MIB
        right = payload(own, 4 * MIB)
        for n in range(1, 65):
            answer = raw.answer()
            assert answer[1] == n
            assert answer[-1] == right
        assert shared_daemon.own_memory() - before < 24 * MIB
