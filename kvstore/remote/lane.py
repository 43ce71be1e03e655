"""One connection on which values lie where they belong: sent from the caller's memory, received into it.

The client library copies a value several times and each time into fresh pages, which takes longer than the kernel's own
copy. So it only makes the connection (address, TLS, password, database); then its transport is taken over. Of the
protocol (RESP 2) a lane understands what our commands are answered; anything else ends the connection.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)


class WrongType(ResponseError):
    """A value is not of the type that its command is for."""


Command = Sequence[Any]
"""A command and its arguments: bytes, memory, text or numbers."""
Room = memoryview | int
"""Where a string that answers a command goes: into memory, or into new memory of at most so many bytes."""

_LINES = 1 << 14
_SMALL = 1 << 16
"""Bytes of a string that no room was named for, and of an argument that is copied."""
_SEND_BUFFER = 1 << 20
"""Asked for on a Unix socket, where nothing makes it grow: a part is sent, and the next one prepared while the server
takes it. The kernel gives what it allows."""
_GLANCE = 256
"""Bytes in which the end of a line is looked for first: nearly always enough, and what follows is not copied."""
_MOST_ITEMS = 1 << 16
_END = b"\r\n"
_BYTES = (bytes, memoryview)
_ERRORS = {
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "WRONGTYPE": WrongType,
}


class Lane(asyncio.BufferedProtocol):
    """A connection that one caller at a time has.

    Parameters
    ----------
    connection : AbstractConnection
        One of the client library, connected, speaking RESP 2, for the lane alone.
    came : callable, optional
        Told of the bytes that are received, as they are.

    Attributes
    ----------
    closed : bool
        Whether nothing can be asked here any more.
    """

    def __init__(self, connection: AbstractConnection, came: Callable[[int], None] | None = None) -> None:
        self.closed = False
        self._came = came
        self._connection = connection
        self._transport = cast("asyncio.Transport", connection._writer.transport)  # type: ignore[union-attr]
        self._before = self._transport.get_protocol()
        self._lines = memoryview(bytearray(_LINES))
        self._start = self._end = 0
        self._done: asyncio.Future[list[Any]] | None = None
        self._rooms: Sequence[Room] = ()
        self._replies: list[Any] = []
        self._list: list[Any] = []
        self._items = 0
        """Replies that belong to `_list` and are still to come."""
        self._value: Any = None
        self._rest = self._lines[:0]
        """Memory that the value is still to fill."""
        self._skip = 0
        """Bytes still to be passed over: a value's end, or a value that there is no room for."""
        sock = self._transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._transport.pause_reading()
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    async def exchange(self, commands: Iterable[Command], rooms: Sequence[Room] = ()) -> list[Any]:
        """Send commands and receive what each is answered; memory is in use until this returns or raises.

        Parameters
        ----------
        commands : iterable of Command
            A long value is on its way before the command behind it is asked for, which may take its time.
        rooms : sequence of Room
            For each command that is answered with a string; missing ones are small.

        Returns
        -------
        Numbers, bytes, lists, None; for a string the number of its bytes, if it went into memory or had no room.

        Raises
        ------
        ResponseError
            The first error that the server answered, after all answers have come.
        ConnectionError, InvalidResponse
            If the connection ends, or carries what is no answer. A lane on which anything failed is closed.
        """
        if self.closed:
            raise ConnectionError("the connection is closed.")
        self._done = asyncio.get_running_loop().create_future()
        self._replies = []
        try:
            for count, pieces in pack(commands):
                self._transport.writelines(pieces)
                self._rooms = [*rooms, *[_SMALL] * (count - len(rooms))]
            replies = await self._done
            for reply in replies:
                if isinstance(reply, RedisError):
                    raise reply
            if self._transport.get_write_buffer_size():
                raise InvalidResponse("answers came before the commands had been sent.")
        except BaseException:
            self.close()
            raise
        finally:
            self._done, self._rooms = None, ()
        return replies

    def close(self) -> None:
        """End the connection at once: no memory is read from or written to afterwards."""
        self.closed = True
        self._rest, self._value = self._lines[:0], None
        self._start = self._end = 0
        self._transport.abort()

    async def end(self) -> None:
        """As `close`, and let go of what the client library holds."""
        self.close()
        await self._connection.disconnect(nowait=True)

    # -- transport -----------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._rest if len(self._rest) else self._lines[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        if self._came is not None:
            self._came(nbytes)
        if len(self._rest):
            self._rest = self._rest[nbytes:]
        else:
            self._end += nbytes
        try:
            while self._step():
                pass
        except (ValueError, InvalidResponse) as error:
            self._fail(InvalidResponse(str(error)))

    def eof_received(self) -> None:
        self._fail(ConnectionError("the server closed the connection."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionError(f"the connection was lost ({exc})."))
        self._before.connection_lost(exc)

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # -- protocol ------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Take in some of what has been received; whether there may be more to take in."""
        here = self._lines[self._start : self._end]
        if len(self._rest):
            taken = min(len(self._rest), len(here))
            self._rest[:taken] = here[:taken]
            self._rest = self._rest[taken:]
        elif self._skip:
            taken = min(self._skip, len(here))
            self._skip -= taken
            if not self._skip:
                self._take(bytes(self._value) if isinstance(self._value, bytearray) else self._value)
        else:
            taken = self._line(bytes(here[:_GLANCE])) or (self._line(bytes(here)) if len(here) > _GLANCE else 0)
        self._start += taken
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _LINES and not taken:
            self._lines[: len(here)] = bytes(here)
            self._start, self._end = 0, len(here)
            if len(here) == _LINES:
                raise InvalidResponse("a line has no end.")
        return taken > 0

    def _line(self, here: bytes) -> int:
        """Take in a line, if all of it is there; bytes taken."""
        length = here.find(_END)
        if length < 0:
            return 0
        kind, text = here[:1], here[1:length]
        if kind == b"$" and text != b"-1":
            self._string(int(text))
        elif kind == b"*" and not self._items and 0 <= int(text) <= _MOST_ITEMS:
            self._list, self._items = [], int(text)
            if not self._items:
                self._take([])
        elif kind == b":":
            self._take(int(text))
        elif kind == b"+":
            self._take(text)
        elif kind == b"-":
            self._take(_error(text.decode(errors="replace")))
        elif kind == b"$" or here[:length] == b"*-1":
            self._take(None)
        else:
            raise InvalidResponse(f"{here[:20]!r} answers nothing that was asked.")
        return length + len(_END)

    def _string(self, nbytes: int) -> None:
        """Find room for a string that comes now."""
        if nbytes < 0 or len(self._replies) >= len(self._rooms):
            raise InvalidResponse("a string that was not asked for.")
        room = self._rooms[len(self._replies)]
        self._value, self._skip = nbytes, len(_END)
        if isinstance(room, int) and nbytes <= room:
            self._value = bytearray(nbytes)
            self._rest = memoryview(self._value)
        elif isinstance(room, memoryview) and nbytes <= len(room):
            self._rest = room[:nbytes]
        else:
            self._skip += nbytes

    def _take(self, reply: Any) -> None:
        """A reply, or an item of one, is complete."""
        if self._done is None or self._done.done():
            raise InvalidResponse("an answer to nothing.")
        if self._items:
            self._list.append(reply)
            self._items -= 1
            if self._items:
                return
            reply = self._list
        self._replies.append(reply)
        if len(self._replies) == len(self._rooms):
            self._done.set_result(self._replies)


def pack(commands: Iterable[Command]) -> Iterator[tuple[int, list[bytes | memoryview]]]:
    """Commands as they go over the wire, up to each long value, which is not copied, and with how many they are."""
    small, count = bytearray(), 0
    for count, command in enumerate(commands, 1):
        small += b"*%d\r\n" % len(command)
        for argument in command:
            value = argument if isinstance(argument, _BYTES) else str(argument).encode()
            small += b"$%d\r\n" % len(value)
            if len(value) < _SMALL:
                small += value
            else:
                yield count, [bytes(small), value]
                small.clear()
            small += _END
    yield count, [bytes(small)]


def _error(text: str) -> RedisError:
    kind, _, words = text.partition(" ")
    return _ERRORS.get(kind, ResponseError)(words if kind in _ERRORS else text)
