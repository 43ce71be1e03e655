"""The way to a Redis server: some connections, a time limit on each command, and a name for each kind of failure."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, cast

import redis.asyncio as redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from kvstore.errors import ConfigError
from kvstore.remote.clients import FAILURES, LIES, make_client, make_pool
from kvstore.remote.lane import Command, Lane, Room
from kvstore.under_way import UnderWay

T = TypeVar("T")

GRAIN = 1 << 20
"""Bytes of a block that may be on their way before the first is told: a server answers after a moment."""

RENEW_S = 5.0
"""Connections are given up for newer ones at most so often."""


class Exhausted(RedisError):
    """All connections were busy for as long as a command may take."""


class Link:
    """Connections to a server or a cluster.

    Parameters
    ----------
    url : str
        ``redis://``, ``rediss://`` or ``unix://``, with user and password if there are any.
    cluster : bool
        Whether it is a cluster.
    lanes : int
        Connections over which the values of one block travel.
    timeout_s : float
        Longest time one command may take, and longest wait for a connection.

    Raises
    ------
    ConfigError
        If the URL cannot be used.

    Attributes
    ----------
    is_cluster : bool
        Whether the keys are spread over several servers.
    age : int
        How often all connections have been given up for newer ones.
    """

    def __init__(self, url: str, cluster: bool, lanes: int, timeout_s: float) -> None:
        self.is_cluster = cluster
        self.lanes = lanes
        self.timeout_s = timeout_s
        self.client = make_client(url, cluster, timeout_s, 2 * lanes + 4)
        self._makers = None if cluster else make_pool(url, timeout_s)
        self._idle: list[Lane] = []
        self.under_way = UnderWay(GRAIN)
        self.age = 0
        self._renewed = -RENEW_S
        self.error = "not started"
        self.failures: dict[str, int] = {}
        self._free = asyncio.Semaphore(2 * lanes + 3)  # and one connection follows the log

    async def ask(self, reply: Any) -> Any:
        """What a command answers, once a connection is free for it; each may take the time limit."""
        try:
            await (self._wait() if self._free.locked() else self._free.acquire())
        except BaseException as error:
            reply.close()
            if isinstance(error, TimeoutError):
                raise Exhausted(f"no connection was free for {self.timeout_s:g} s") from None
            raise
        try:
            async with asyncio.timeout(self.timeout_s):
                return await reply
        finally:
            self._free.release()

    async def _wait(self) -> None:
        async with asyncio.timeout(self.timeout_s):
            await self._free.acquire()

    def getting(self, name: str, most: int) -> Command:
        """The command that reads a value, of which not much more than `most` bytes are taken in whatever it holds."""
        return ("GETRANGE", name, 0, most) if self.is_cluster else ("GET", name)

    async def exchange(self, commands: Iterable[Command], rooms: Sequence[Room] = ()) -> list[Any]:
        """What commands are answered, in order, as `Lane.exchange` has it; in a cluster in that of each node."""
        if self.is_cluster:
            return await self.ask(self._through_client(list(commands), rooms))
        try:
            return await self.ask(self._lane(commands, rooms))
        except ReadOnlyError:
            await self.renew()
            raise

    async def renew(self) -> None:
        """Give up all connections, those in use when they are done: the address may lead to another server by now.

        A primary that became a replica keeps its connections, and refuses every write on them. In a cluster the library
        looks where a key is.
        """
        if self.is_cluster or time.monotonic() < self._renewed + RENEW_S:
            return
        self._renewed = time.monotonic()
        self.age += 1
        while self._idle:
            await self._idle.pop().end()

    async def reconnect(self) -> None:
        """Have the client library connect anew; nobody is waiting for it."""
        if not self.is_cluster:
            await cast("redis.Redis", self.client).connection_pool.disconnect()

    async def _lane(self, commands: Iterable[Command], rooms: Sequence[Room]) -> list[Any]:
        age, lane = self.age, await self._free_lane()
        try:
            return await lane.exchange(commands, rooms)
        finally:
            if lane.closed or age != self.age:
                await lane.end()
            else:
                self._idle.append(lane)

    async def _free_lane(self) -> Lane:
        while self._idle:
            lane = self._idle.pop()
            if not lane.closed:
                return lane
            await lane.end()
        connection = cast("redis.ConnectionPool", self._makers).make_connection()
        await connection.connect()
        return Lane(connection, self.under_way.came)

    async def _through_client(self, commands: Sequence[Command], rooms: Sequence[Room]) -> list[Any]:
        """Through the client library, which knows where in a cluster a key is."""
        client: Any = self.client
        if len(commands) == 1:
            replies = [await client.execute_command(*commands[0])]
        else:
            pipe = client.pipeline()
            for command in commands:
                pipe.execute_command(*command)
            replies = await pipe.execute()
        return [_placed(reply, room) for reply, room in zip_longest(replies, rooms)]

    def note(self, error: BaseException) -> None:
        """Count a failure by its kind and keep what it says."""
        kind, words = kind_of(error)
        self.failures[kind] = self.failures.get(kind, 0) + 1
        self.error = f"{words}: {error}"

    async def quietly(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of some work; a failure of it is noted, and then there is none."""
        try:
            return await work
        except FAILURES as error:
            self.note(error)
            return None

    async def synced_to_disk(self, counter: str) -> bool:
        """Whether everything written so far is in the server's append-only file and synced.

        The server waits for what its connection has written, so a write to `counter`, a number, goes before; the file
        has one order for all. Blocks of a cluster are on other nodes than the index: there nothing is promised.
        """
        if self.is_cluster:
            return False
        wait = ("WAITAOF", 1, 0, int(self.timeout_s * 900))
        try:
            return int((await self.exchange([("INCRBY", counter, 0), wait]))[1][0]) >= 1
        except FAILURES:
            return False

    async def close(self) -> None:
        """Disconnect."""
        while self._idle:
            await self._idle.pop().end()
        with contextlib.suppress(*FAILURES):
            await self.client.aclose()


def kind_of(error: BaseException) -> tuple[str, str]:
    """Kind of a failure, and how it is said."""
    if isinstance(error, RedisClusterException) and error.__cause__ is not None:
        return kind_of(error.__cause__)  # no node answered, the last one like this
    if isinstance(error, Exhausted):
        return "exhausted", "all connections are busy"
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return "denied", "refused"
    if isinstance(error, TimeoutError | redis.TimeoutError):
        return "slow", "does not answer in time"
    if isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM" in str(error)):
        return "full", "has no memory left"
    if isinstance(error, ReadOnlyError):
        return "readonly", "is a replica, which takes no writes"
    if isinstance(error, (InvalidResponse, *LIES)):
        return "garbage", "answers what was not asked"
    if isinstance(error, ResponseError):
        return "error", "answers with an error"
    return "refused", "cannot be reached"


def _placed(reply: Any, room: Room | None) -> Any:
    """A reply as a lane has it: a string in the memory that was meant for it, if it fits."""
    if not isinstance(reply, bytes) or room is None:
        return reply
    if isinstance(room, int):
        return reply if len(reply) <= room else len(reply)
    if len(reply) <= len(room):
        room[: len(reply)] = reply
    return len(reply)


def read_key(file: Path) -> bytes:
    """The key in a file of 64 hex digits.

    Raises
    ------
    ConfigError
        If it cannot be read or is anything else.
    """
    try:
        key = bytes.fromhex(file.read_text("ascii"))
    except OSError as error:
        raise ConfigError(f"redis.key_file: {file}: {error.strerror or error}.") from None
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(
            f"redis.key_file: {file} does not hold 64 hex digits.", "Make one with `openssl rand -hex 32`."
        )
    return key


async def all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run some work at the same time; if one fails the others end first, and then that error is raised."""
    done = await asyncio.gather(*works, return_exceptions=True)
    for error in done:
        if error is not None:
            raise error
