"""One connection of the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from kvstore.client.address import at_end
from kvstore.client.effects import Call
from kvstore.client.mailbox import Mailbox, Pending
from kvstore.errors import ConnectionLost, KVStoreError
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.client.aio import AsyncKVStoreClient


class Wire(asyncio.BufferedProtocol):
    """Feeds one connection's bytes into its mailbox."""

    def __init__(self, client: AsyncKVStoreClient) -> None:
        self._client = client
        self._copies = 0
        self._closing = False
        self.transport: asyncio.Transport | None = None
        self.mailbox = Mailbox(self.tell)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.mailbox.reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self.mailbox.reader.advance(nbytes)
        except KVStoreError as error:
            self.mailbox.fail(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._client.lost(self)
        self.mailbox.fail(ConnectionLost("the daemon closed the connection."))

    @property
    def open(self) -> bool:
        """Whether calls can be made."""
        return self.transport is not None and not self._closing and not self.transport.is_closing()

    def at_end(self) -> bool:
        """Whether it cannot be used, or the daemon has closed its end and the loop has yet to notice."""
        return not self.open or at_end(cast(asyncio.Transport, self.transport).get_extra_info("socket"))

    def tell(self, method: str, params: m.Message) -> None:
        """Send a notice, if that can be."""
        if self.transport is not None and self.open:
            self.transport.write(frame.pack(envelope.encode_notice(method, params)))

    def send(self, call: Call) -> Pending:
        """Send a call; raises `ConnectionLost`."""
        if self.transport is None or not self.open:
            raise ConnectionLost("the connection to the daemon is gone.")
        total = sum(len(part) for part in call.send)
        pending, data = self.mailbox.call(call.method, call.params, total, call.into)
        self.transport.write(data)
        for part in call.send:
            self.transport.write(part)
        return pending

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Keep the connection, and with it the right to the memory, while a thread copies."""
        self._copies += 1
        try:
            yield
        finally:
            self._copies -= 1
            if self._closing:
                self.close()

    def close(self) -> None:
        """End the connection, as soon as no copy is running: its memory may be somebody else's afterwards."""
        if self.transport is None:
            return
        if not self._closing and not self.transport.is_closing():
            self.transport.pause_reading()
        self._closing = True
        if not self._copies:
            self.transport.abort()


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run in a thread to the end, even if cancelled: until then the memory belongs to the function."""
    work = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        work.exception()  # nobody is left to be told
        raise
