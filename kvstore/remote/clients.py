"""Clients of the redis library, made for a URL: what a server answers them is bounded, and so is what they end in.

The library's parser makes room for as many items as an array says that it has, and holds whatever comes of a string for
as long as the command may take. A server that lies would have it ask for gigabytes, and the event loop stand still for
seconds. So what has been received is looked at before it is parsed.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import redis.asyncio as redis
from redis._parsers import _AsyncHiredisParser
from redis.asyncio.cluster import RedisCluster
from redis.backoff import NoBackoff
from redis.exceptions import InvalidResponse, RedisClusterException, RedisError
from redis.retry import Retry

from kvstore.errors import ConfigError

Client = redis.Redis | RedisCluster

LIES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What a reply of another shape than was asked for ends in: no server of ours."""
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError, asyncio.TimeoutError, *LIES)
"""What a command can end in that is the server's fault, or the network's."""

MOST_ITEMS = 1 << 18
"""Items of one array: the index is read by the thousand, and what is beside it has one for each namespace. Arrays
in arrays, with the answers that came beside them, have at most twice as many together: each is memory at once."""
MOST_BYTES = 256 << 20
"""Bytes of one answer: the events of some hundred daemons at once are the most that we ask for."""

_STRINGS = frozenset((b"$", b"=", b"!"))
_COUNTED = _STRINGS | {b"*", b"%", b"~", b">", b"|"}
"""What a line begins with that says how much is to come: bytes of a string, or items of an array."""
_LONGEST_LINE = 1 << 16


class Bounds:
    """Follows what one connection receives, and lets nothing pass that is no answer to us."""

    def __init__(self) -> None:
        self._line = b""
        """The beginning of a line whose end has not come yet."""
        self._skip = 0
        """Bytes of a string still to come, with its end."""
        self._bytes = self._items = 0

    def answered(self) -> None:
        """An answer is complete; the next one begins."""
        self._bytes = self._items = 0

    def look(self, data: bytes) -> None:
        """Look at what has been received.

        Raises
        ------
        InvalidResponse
            If it announces, or is, more than any answer has.
        """
        self._bytes += len(data)
        if self._bytes > MOST_BYTES:
            raise InvalidResponse("an answer has no end.")
        at, end = self._skip, len(data)
        while at < end:
            stop = data.find(b"\n", at)
            line = data[at : end if stop < 0 else stop]
            if self._line:
                line, self._line = self._line + line, b""
            if len(line) > _LONGEST_LINE:
                raise InvalidResponse("a line has no end.")
            if stop < 0:
                self._line, at = line, end
            else:
                at = stop + 1
                if line[:1] in _COUNTED:
                    at += self._coming(line)
        self._skip = at - end

    def _coming(self, line: bytes) -> int:
        """Bytes of the string that a line says is to come, with its end; what is announced is bounded."""
        try:
            count = int(line[1:]) if len(line) < 24 else MOST_BYTES + 1
        except ValueError:
            return 0  # the parser says so, too
        string = line[:1] in _STRINGS
        if not string and count > 0:
            self._items += count
        if count > (MOST_BYTES if string else MOST_ITEMS) or self._items > 2 * MOST_ITEMS:
            raise InvalidResponse(f"{line[:24]!r} announces more than any answer has.")
        return count + 2 if string and count >= 0 else 0


class _Reader:
    """A reader of the library that is given only what `Bounds` let pass."""

    def __init__(self, reader: Any, bounds: Bounds) -> None:
        self.gets, self.has_data = reader.gets, reader.has_data
        self._feed, self._bounds = reader.feed, bounds

    def feed(self, data: bytes) -> None:
        self._bounds.look(data)
        self._feed(data)


class Parser(_AsyncHiredisParser):
    """The library's parser, of bounded answers."""

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)
        self._bounds = Bounds()
        self._reader = cast("Any", _Reader(self._reader, self._bounds))

    async def read_response(self, *args: Any, **how: Any) -> Any:
        self._bounds.answered()
        return await super().read_response(*args, **how)


def make_client(url: str, cluster: bool, timeout_s: float, connections: int) -> Client:
    """A client that connects when it is asked something, and asks nothing twice.

    Parameters
    ----------
    url : str
        ``redis://``, ``rediss://`` or ``unix://``, with user and password if there are any.
    cluster : bool
        Whether it is a cluster.
    timeout_s : float
        Longest time one command may take, and longest wait for a connection.
    connections : int
        At most so many.

    Raises
    ------
    ConfigError
        If the URL cannot be used.
    """
    limits = {**_limits(timeout_s), "max_connections": connections}
    try:
        if cluster:
            return _bounded(RedisCluster.from_url(url, retry=Retry(NoBackoff(), 1), **limits))
        return redis.Redis(connection_pool=_pool(redis.BlockingConnectionPool, url, timeout=timeout_s, **limits))
    except (ValueError, RedisError, RedisClusterException) as error:
        remedy = "Write redis://host:6379" + (" of any node." if cluster else ", rediss://… or unix:///path.")
        raise ConfigError(f"redis.url: {error}.", remedy) from None


def make_pool(url: str, timeout_s: float) -> redis.ConnectionPool:
    """What makes connections that speak RESP 2, of which none is shared; the URL is one that `make_client` took."""
    return _pool(redis.ConnectionPool, url, protocol=2, **_limits(timeout_s))


def _pool(kind: Any, url: str, **how: Any) -> Any:
    return kind.from_url(url, retry=Retry(NoBackoff(), 0), parser_class=Parser, **how)


def _bounded(client: RedisCluster) -> RedisCluster:
    """With our parser, which the library lets nobody name here; nodes that it finds later are made the same way."""
    for how in (client.connection_kwargs, *(node.connection_kwargs for node in client.startup_nodes)):
        how["parser_class"] = Parser
    return client


def _limits(timeout_s: float) -> dict[str, Any]:
    return {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
