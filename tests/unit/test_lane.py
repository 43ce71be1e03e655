"""A connection to Redis that receives values in place: however the bytes come, and whatever a server says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import redis.asyncio as redis
from redis.exceptions import ConnectionError, InvalidResponse, OutOfMemoryError, ResponseError

from kvstore.remote.lane import Lane, pack

BIG = bytes(range(256)) * 400  # longer than what is received into memory for lines


@contextlib.asynccontextmanager
async def answering(chunks: Sequence[bytes], came: Callable[[int], None] | None = None) -> AsyncIterator[Lane]:
    """A lane to a server that answers one request with these bytes, a write each."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                if said := data.count(b"SETINFO"):  # what the client library says of itself first
                    writer.write(b"+OK\r\n" * said)
                    continue
                for chunk in chunks:
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = redis.ConnectionPool.from_url(f"redis://127.0.0.1:{port}", protocol=2)
    connection = pool.make_connection()
    await connection.connect()
    lane = Lane(connection, came)
    try:
        yield lane
    finally:
        await lane.end()
        server.close()


def single(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


REPLIES = b"+OK\r\n:-7\r\n$-1\r\n$0\r\n\r\n$5\r\na\r\nbc\r\n*3\r\n$1\r\nx\r\n:2\r\n$-1\r\n*0\r\n*-1\r\n"
MEANT: list[Any] = [b"OK", -7, None, b"", b"a\r\nbc", [b"x", 2, None], [], None]


@pytest.mark.parametrize("chunks", [[REPLIES], single(REPLIES)])
async def test_replies_however_they_are_cut(chunks: list[bytes]) -> None:
    async with answering(chunks) as lane:
        assert await lane.exchange([("PING",)] * len(MEANT)) == MEANT
        assert not lane.closed


@pytest.mark.parametrize("step", [1021, 1 << 14, 1 << 20])
async def test_strings_come_to_where_they_belong(step: int) -> None:
    said = b"$%d\r\n%b\r\n:1\r\n$%d\r\n%b\r\n+OK\r\n" % (len(BIG), BIG, len(BIG), BIG)
    into = memoryview(bytearray(len(BIG)))
    came: list[int] = []
    async with answering([said[at : at + step] for at in range(0, len(said), step)], came.append) as lane:
        replies = await lane.exchange([("GET", "a"), ("X",), ("GET", "b"), ("X",)], [into, 0, len(BIG)])
        assert sum(came) == len(said), "what is received is told as it comes"
        assert len(came) > 1
        assert replies == [len(BIG), 1, BIG, b"OK"]
        assert into == BIG


@pytest.mark.parametrize("room", [memoryview(bytearray(10)), 10])
async def test_a_string_without_room_is_passed_over(room: Any) -> None:
    async with answering([b"$%d\r\n%b\r\n:5\r\n" % (len(BIG), BIG)]) as lane:
        assert await lane.exchange([("GET", "a"), ("X",)], [room]) == [len(BIG), 5]
        assert not lane.closed


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"-OOM no memory\r\n", OutOfMemoryError),
        (b"-ERR what\r\n", ResponseError),
        (b"?\r\n", InvalidResponse),
        (b"$x\r\n", InvalidResponse),
        (b"$-5\r\n", InvalidResponse),
        (b"*2\r\n*1\r\n:1\r\n", InvalidResponse),
        (b"*99999999\r\n", InvalidResponse),
        (b"x" * 100_000, InvalidResponse),
    ],
)
async def test_what_is_wrong_ends_the_connection(said: bytes, error: type[Exception]) -> None:
    async with answering([said]) as lane:
        with pytest.raises(error):
            await lane.exchange([("X",)])
        assert lane.closed
        with pytest.raises(ConnectionError):
            await lane.exchange([("X",)])


async def test_memory_is_left_alone_once_a_call_is_cancelled() -> None:
    into = memoryview(bytearray(len(BIG)))
    async with answering([b"$%d\r\n%b" % (len(BIG), BIG[:50_000])]) as lane:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await lane.exchange([("GET", "a")], [into])
        assert lane.closed
        assert into[:50_000] == BIG[:50_000]
        seen = bytes(into)
        await asyncio.sleep(0.05)
        assert bytes(into) == seen


def test_long_arguments_are_not_copied() -> None:
    value = memoryview(BIG)
    counts, pieces = zip(*pack([("SET", "é", value, "EX", 5), ("PING",)]), strict=True)
    assert counts == (1, 2)
    parts = [part for some in pieces for part in some]
    assert parts[1] is value
    assert b"".join(parts) == (
        b"*5\r\n$3\r\nSET\r\n$2\r\n\xc3\xa9\r\n$%d\r\n%b\r\n$2\r\nEX\r\n$1\r\n5\r\n*1\r\n$4\r\nPING\r\n"
        % (len(BIG), BIG)
    )


async def test_an_answer_to_nothing_ends_the_connection() -> None:
    async with answering([b"+OK\r\n", b"+OK\r\n"]) as lane:
        with contextlib.suppress(InvalidResponse):  # both may come at once
            assert await lane.exchange([("X",)]) == [b"OK"]
        await asyncio.sleep(0.05)
        assert lane.closed
