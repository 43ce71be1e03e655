"""The Redis tier when Redis fails: dead, hung, full, locked, lying. Never a wrong byte, and it comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis as blocking_redis
from daemons import NAMESPACE, DaemonProcess, header, is_right, key, payload

from kvstore import KVStoreClient
from kvstore.errors import ConfigError
from kvstore.remote.link import read_key
from kvstore.remote.values import Values
from kvstore.testing.tier_kit import block_of, load, pages, store
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import Dropped, DropReason, Miss, MissReason, Stored, TierCode

MIB = 1 << 20


@contextlib.asynccontextmanager
async def opened(url: str, timeout_s: float = 0.4, **how: Any) -> AsyncIterator[RedisTier]:
    tier = RedisTier(url, 64 * MIB, timeout_s=timeout_s, **how)
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


async def until(condition: Any, seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_what_one_tier_stores_another_finds_and_forgets(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url) as one, opened(server.url) as other:
            assert await store(one, block_of(1), 3 * MIB) == Stored()
            await until(lambda: other.size(block_of(1)) == 3 * MIB)
            assert await load(other, block_of(1), 3 * MIB)
            assert await one.drop(block_of(1))
            await until(lambda: other.size(block_of(1)) is None)


async def test_a_dead_server_is_refused_at_once_and_met_again(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url) as tier:
            assert await store(tier, block_of(1), MIB) == Stored()
            server.kill()
            await until(lambda: not tier.describe_state()["connected"])
            began = time.monotonic()
            assert await store(tier, block_of(2), MIB) == Dropped(DropReason.TIER_DOWN)
            assert await tier.get(block_of(1), pages(MIB)) == Miss(MissReason.TIER_DOWN)
            assert tier.size(block_of(1)) is None
            assert time.monotonic() - began < 0.1
            assert "reached" in tier.describe_state()["last_error"]
            server.start()
            await until(lambda: tier.describe_state()["connected"])
            assert tier.size(block_of(1)) is None, "that server has forgotten it"
            assert await store(tier, block_of(1), MIB) == Stored()
            assert await load(tier, block_of(1), MIB)


async def test_it_starts_without_a_server_and_finds_it_later(tmp_path: Path) -> None:
    server = ValkeyServer(tmp_path)
    async with opened(server.url) as tier:
        assert await store(tier, block_of(1), 1000) == Dropped(DropReason.TIER_DOWN)
        with server:
            await until(lambda: tier.describe_state()["connected"])
            assert await store(tier, block_of(1), 1000) == Stored()


async def test_a_hung_server_costs_its_timeout_and_no_more(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url) as tier:
            assert await store(tier, block_of(1), MIB) == Stored()
            server.signal(signal.SIGSTOP)
            began = time.monotonic()
            assert await tier.get(block_of(1), pages(MIB)) == Miss(MissReason.TIER_DOWN)
            assert time.monotonic() - began < 2
            await until(lambda: not tier.describe_state()["connected"])
            server.signal(signal.SIGCONT)
            await until(lambda: tier.describe_state()["connected"])
            assert await load(tier, block_of(1), MIB)


@contextlib.asynccontextmanager
async def delayed(server: ValkeyServer, seconds: float) -> AsyncIterator[str]:
    """A way to a server on which every answer takes so much longer."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await asyncio.sleep(wait_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_unix_connection(server.socket)
        with contextlib.suppress(asyncio.CancelledError):  # the loop ends before the connection
            await asyncio.gather(forward(reader, there_writer, 0.0), forward(there_reader, writer, seconds))

    way = await asyncio.start_server(meet, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{way.sockets[0].getsockname()[1]}"
    way.close()


async def test_a_slow_server_is_slow_and_not_down(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with delayed(server, 0.03) as url, opened(url, 10.0) as tier:
            assert await store(tier, block_of(1), MIB) == Stored()
            assert await load(tier, block_of(1), MIB)
            assert tier.describe_state()["connected"]


async def test_a_server_that_has_become_slow_is_known_for_it_before_a_block_has_come(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url) as tier:
            assert await store(tier, block_of(1), 32 * MIB) == Stored()
        async with delayed(server, 0.1) as url, opened(url, 60.0) as tier:
            await until(lambda: tier.size(block_of(1)) == 32 * MIB)
            assert tier.pace() is None
            read = asyncio.ensure_future(load(tier, block_of(1), 32 * MIB))
            await asyncio.sleep(0.5)
            told = tier.pace()
            began = time.monotonic() - 0.5
            assert await read
            took = time.monotonic() - began
            assert told is not None
            assert 0.4 * took < told < 2.5 * took
            assert took > 1.0, "else there was nothing to tell"
            assert tier.pace() is None


async def test_where_all_connections_are_busy_that_is_said(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with delayed(server, 0.1) as url, opened(url, 1.0, connections=1) as tier:
            await until(lambda: tier.describe_state()["connected"])
            outcomes = await asyncio.gather(*(store(tier, block_of(number), 1000) for number in range(200)))
            assert set(outcomes) == {Stored(), Dropped(DropReason.TIER_DOWN)}
            assert "all connections are busy" in tier.describe_state()["last_error"]
            await until(lambda: tier.describe_state()["connected"])
            for number in [number for number, outcome in enumerate(outcomes) if outcome == Stored()][::8]:
                assert await tier.get(block_of(number), pages(1000)) != Miss(MissReason.CORRUPT)


async def test_a_full_server_is_a_drop_with_its_reason(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
        async with opened(server.url) as tier:
            outcomes = [await store(tier, block_of(number), 2 * MIB) for number in range(6)]
            assert outcomes[0] == Stored()
            assert Dropped(DropReason.TIER_FULL) in outcomes
            assert tier.describe_state()["failures"].keys() == {"full"}
            there = [await load(tier, block_of(number), 2 * MIB) for number in range(6)]
            assert 1 <= sum(there) <= 3, "what leaves for others is missed, what stays is right"
            assert all(outcomes[number] == Stored() for number in range(6) if there[number])


async def test_a_block_is_told_of_only_if_all_its_values_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server has evicted one, or refused it, before it is told of the block behind it."""
    names = Values.names
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url) as one, opened(server.url) as other:
            with monkeypatch.context() as patch:
                patch.setattr(Values, "names", lambda *which: [*names(*which), "kvstore:nobody wrote this"])
                assert await store(one, block_of(1), MIB) == Dropped(DropReason.ABORTED)
            assert one.size(block_of(1)) is None
            assert one.usage().used == 0
            assert await store(one, block_of(2), MIB) == Stored()
            await until(lambda: other.size(block_of(2)) == MIB)
            assert other.size(block_of(1)) is None


async def test_a_wrong_password_is_said(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path, "--requirepass", "right", tcp=True) as server:
        address = server.url.removeprefix("redis://")
        async with opened(f"redis://:wrong@{address}") as tier:
            assert await store(tier, block_of(1), 1000) == Dropped(DropReason.TIER_DOWN)
            assert tier.describe_state()["last_error"].startswith("refused")
        async with opened(f"redis://:right@{address}") as tier:
            assert await store(tier, block_of(1), 1000) == Stored()


@pytest.mark.parametrize(
    "reply",
    [
        b"+PONG\r\n" * 50,
        b"$-5\r\nabc",
        b"\x00\xff" * 500,
        b"",
        b"$9999999999\r\nabc",
        b"$" + b"9" * 5000 + b"\r\n",
        b"*2147483647\r\n:1\r\n",
        b"%2147483647\r\n:1\r\n",
        b"*1\r\n" * 10_000,
        b"*262144\r\n" * 1000,
        b"+" + b"x" * (1 << 20),
        b":" + b"9" * 5000 + b"\r\n",
    ],
    ids=lambda reply: repr(reply[:12]),
)
async def test_garbage_for_replies(reply: bytes) -> None:
    """Whatever it announces: nothing stands still, and no memory is asked for because of it."""
    stood_still = 0.0

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(reply)
        writer.close()

    async def watch() -> None:
        nonlocal stood_still
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            stood_still = max(stood_still, time.monotonic() - began)

    server = await asyncio.start_server(lie, "127.0.0.1", 0)
    watching = asyncio.create_task(watch())
    async with opened(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}") as tier:
        assert await store(tier, block_of(1), 1000) == Dropped(DropReason.TIER_DOWN)
        assert tier.size(block_of(1)) is None
        assert set(tier.describe_state()["failures"]) <= {"garbage", "slow", "refused"}
    watching.cancel()
    server.close()
    assert stood_still < 1.0


@pytest.mark.parametrize("sealed", [False, True])
async def test_no_foreign_value_is_ever_handed_out(tmp_path: Path, sealed: bool) -> None:
    """Values of one block under the names of another, cut, grown, replaced by other types."""
    how: dict[str, Any] = {"timeout_s": 10.0} | ({"key": bytes(32)} if sealed else {})
    with ValkeyServer(tmp_path) as server, blocking_redis.Redis(unix_socket_path=server.socket) as client:
        async with opened(server.url, **how) as tier:

            def names(kind: bytes) -> list[bytes]:
                return sorted(n for n in client.scan_iter("kvstore:*") if n.endswith(kind))

            async def poisoned(change: Any) -> None:
                for number in (1, 2):
                    await tier.drop(block_of(number))
                    assert await store(tier, block_of(number), 50_000) == Stored()
                change()
                for number in (1, 2):
                    into = pages(50_000)
                    outcome = await tier.get(block_of(number), into)
                    assert outcome in (Miss(MissReason.CORRUPT), Miss(MissReason.TIER_DOWN), Miss(MissReason.LOST))

            def swap(kind: bytes) -> None:
                one, other = names(kind)
                values: Any = [client.get(one), client.get(other)]
                client.set(other, values[0])
                client.set(one, values[1])

            await poisoned(lambda: swap(b":r"))
            await poisoned(lambda: swap(b":0"))
            await poisoned(lambda: [client.append(name, "x") for name in names(b":0")])
            await poisoned(lambda: [client.append(name, "x") for name in names(b":r")])
            await poisoned(lambda: [client.set(name, b"") for name in names(b":r")])
            await poisoned(lambda: [client.delete(name) for name in names(b":0")])
            for kind in (b":r", b":0"):
                await poisoned(lambda kind=kind: [(client.delete(n), client.lpush(n, "x")) for n in names(kind)])
            assert tier.describe_state()["failures"] == {}, "bad values are no failure of the server"


async def test_another_key_reads_nothing(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        async with opened(server.url, 10.0, key=bytes(32)) as tier:
            assert await store(tier, block_of(1), 50_000) == Stored()
        async with opened(server.url, 10.0, key=bytes(31) + b"x") as tier:
            assert await tier.get(block_of(1), pages(50_000)) == Miss(MissReason.CORRUPT)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisTier("http://localhost", MIB)
    with pytest.raises(ConfigError, match="any node"):
        RedisTier("unix:///run/valkey.sock", MIB, cluster=True)
    with pytest.raises(ConfigError, match="32"):
        RedisTier("redis://localhost", MIB, key=b"short")
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="key_file"):
        read_key(file)
    file.write_text("not hex")
    with pytest.raises(ConfigError, match="64 hex digits"):
        read_key(file)
    file.write_text("0f" * 32 + "\n")
    assert read_key(file) == b"\x0f" * 32


def _place(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_daemon_serves_what_one_on_another_host_stored(tmp_path: Path) -> None:
    """Two daemons with nothing in common but a server: own sockets, own disks."""
    blocks = [key(number, "fleet") for number in range(8)]
    (tmp_path / "v").mkdir()
    with ValkeyServer(tmp_path / "v") as server:
        settings = {"redis.url": server.url, "host.bytes": "32MiB"}
        one = DaemonProcess(_place(tmp_path / "a"), settings).start()
        other = DaemonProcess(_place(tmp_path / "b"), settings).start()
        try:
            with KVStoreClient(one.socket, namespace=NAMESPACE) as kv:
                assert all(isinstance(kv.put(k, payload(k, MIB + 5), header(k)), Stored) for k in blocks)
            with KVStoreClient(other.socket, namespace=NAMESPACE) as kv:
                deadline = time.monotonic() + 10
                while len(kv.lookup(blocks)) < len(blocks) and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert kv.lookup(blocks) == [TierCode.REDIS] * len(blocks)
                assert all(is_right(k, kv.get(k, wait_s=5)) for k in blocks)
        finally:
            one.stop()
            other.stop()
