"""A primary that becomes a replica, and an address that leads to another server: no wrong byte, no restart."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.testing.tier_kit import block_of, joined, load, pages, payload_of, scope_of, store
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import Dropped, DropReason, Hit, Miss, MissReason, Stored

MIB = 1 << 20
SCOPE = scope_of()


class Address:
    """One address, and the server that whoever connects now is led to; those connected before stay where they are."""

    def __init__(self, server: ValkeyServer) -> None:
        self.server = server
        self.url = ""
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Address:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            await asyncio.gather(_forward(reader, there_writer), _forward(there_reader, writer))


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[ValkeyServer, ValkeyServer]]:
    places = [tmp_path / name for name in ("one", "other")]
    for place in places:
        place.mkdir()
    at_once = ("--repl-diskless-sync-delay", "0")
    with ValkeyServer(places[0], *at_once, tcp=True) as one, ValkeyServer(places[1], *at_once, tcp=True) as other:
        yield one, other


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisTier]:
    tier = RedisTier(url, 64 * MIB, timeout_s=2.0)
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def stored_in_the_end(tier: RedisTier, number: int, nbytes: int) -> None:
    deadline = time.monotonic() + 15
    while (outcome := await store(tier, block_of(number), nbytes)) != Stored():
        assert isinstance(outcome, Dropped)
        assert time.monotonic() < deadline, outcome
        await asyncio.sleep(0.1)


async def follows(replica: ValkeyServer, primary: ValkeyServer) -> None:
    assert replica.ask(f"REPLICAOF 127.0.0.1 {primary.port}").startswith(b"+OK")
    await until(lambda: b"master_link_status:up" in replica.ask("INFO replication"))


def state(tier: RedisTier) -> dict[str, Any]:
    return tier.describe_state()


async def test_a_replica_is_read_and_its_refusals_are_counted(servers: tuple[ValkeyServer, ValkeyServer]) -> None:
    """The address stays with the one that became a replica: blocks are served all the time, writes refused by name."""
    one, other = servers
    async with opened(one.url) as tier:
        for number in range(4):
            assert await store(tier, block_of(number), MIB + 5) == Stored()
        await follows(other, one)
        assert other.ask("REPLICAOF NO ONE").startswith(b"+OK")
        await follows(one, other)
        await until(lambda: state(tier)["connected"])  # the server ends what waits for changes when it is demoted
        for _ in range(20):  # each use is to be told, too, and is refused: that is no reason to stop reading
            assert all([await load(tier, block_of(number), MIB + 5) for number in range(4)])
            assert state(tier)["connected"]
            await asyncio.sleep(0.02)
        assert await store(tier, block_of(9), MIB) == Dropped(DropReason.TIER_DOWN)
        assert state(tier)["failures"].pop("readonly") >= 1
        assert "replica" in state(tier)["last_error"]
        assert tier.size(block_of(9)) is None
        assert await load(tier, block_of(1), MIB + 5)
        assert one.ask("REPLICAOF NO ONE").startswith(b"+OK")
        await stored_in_the_end(tier, 9, MIB)
        assert all([await load(tier, block_of(number), MIB + 5) for number in range(4)])


async def test_an_address_that_moves_to_the_new_primary_is_followed(
    servers: tuple[ValkeyServer, ValkeyServer],
) -> None:
    """What only the old primary had is forgotten, and counted; what both had is right."""
    one, other = servers
    async with Address(one) as address, opened(address.url) as tier:
        for number in range(4):
            assert await store(tier, block_of(number), 3 * MIB) == Stored()
        await follows(other, one)
        assert other.ask("REPLICAOF NO ONE").startswith(b"+OK")  # from here on they part
        assert await store(tier, block_of(4), 3 * MIB) == Stored()
        address.server = other
        await follows(one, other)
        await stored_in_the_end(tier, 5, 3 * MIB)
        assert sum(state(tier)["failures"].values()) >= 1, "a write was refused, or whoever waited was told"
        await until(lambda: state(tier)["forgotten"] == 1 and state(tier)["connected"])
        assert tier.size(block_of(4)) is None
        assert isinstance(await tier.get(block_of(4), pages(3 * MIB)), Miss)
        assert all([await load(tier, block_of(number), 3 * MIB) for number in (0, 1, 2, 3, 5)])
        one.kill()  # nothing depends on it any more
        assert all([await load(tier, block_of(number), 3 * MIB) for number in (0, 1, 2, 3, 5)])


async def test_an_address_that_moves_to_an_empty_server_while_the_old_one_lives(
    servers: tuple[ValkeyServer, ValkeyServer],
) -> None:
    """Some connections are to the one, some to the other: a block is on one of them or is not told of."""
    one, other = servers
    async with Address(one) as address, opened(address.url) as tier:
        for number in range(3):
            assert await store(tier, block_of(number), 3 * MIB) == Stored()
        address.server = other
        numbers = range(10, 18)
        outcomes = await asyncio.gather(*(store(tier, block_of(number), 3 * MIB) for number in numbers))
        assert set(outcomes) <= {Stored(), *map(Dropped, DropReason)}
        for number in (*range(3), *numbers):
            await right_or_missed(tier, number, 3 * MIB)
        one.kill()
        await until(lambda: state(tier)["connected"] and tier.size(block_of(0)) is None)
        for number in (*range(3), *numbers):
            await right_or_missed(tier, number, 3 * MIB)
        deadline = time.monotonic() + 15
        while not await load(tier, block_of(0), 3 * MIB):  # until the last connection to the old one has ended
            assert time.monotonic() < deadline, "it did not recover"
            await store(tier, block_of(0), 3 * MIB)
            await asyncio.sleep(0.05)


async def test_another_server_at_the_same_port_has_nothing(tmp_path: Path) -> None:
    """Swapped between two reads: hits become misses, and it is filled anew."""
    with ValkeyServer(tmp_path, tcp=True) as server:
        async with opened(server.url) as tier:
            for number in range(4):
                assert await store(tier, block_of(number), MIB) == Stored()
            await tier.describe(SCOPE, b"what it is")
            server.kill()
            server.start()
            for number in range(4):
                assert isinstance(await tier.get(block_of(number), pages(MIB)), Miss)
            # A first miss may be that of the connection, which says nothing of the block until the new index is read.
            await until(lambda: state(tier)["connected"] and not any(tier.size(block_of(n)) for n in range(4)))
            assert tier.usage().used == 0
            await stored_in_the_end(tier, 1, MIB)
            assert await load(tier, block_of(1), MIB)
            await tier.describe(SCOPE, b"what it is")
            async with opened(server.url) as another:
                assert another.descriptions() == {SCOPE: b"what it is"}


async def right_or_missed(tier: RedisTier, number: int, nbytes: int) -> None:
    into = pages(nbytes)
    outcome = await tier.peek(block_of(number), into)
    if isinstance(outcome, Hit):
        assert joined(into) == payload_of(block_of(number), nbytes)
    else:
        assert outcome.reason is not MissReason.CORRUPT
