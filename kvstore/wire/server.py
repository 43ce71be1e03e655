"""Connections: bytes to verbs and back.

One `Connection` per client, on a Unix socket (shared memory, identified by its uid) or on TCP (token, payloads in
frames). A peer that breaks the protocol loses its connection and nothing else happens. A peer that does not read its
answers is not read from, so it cannot make the daemon hold more than a bounded amount for it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvstore.errors import InternalError, InvalidParams, KVStoreError, LimitExceeded, ProtocolError
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m
from kvstore.wire.traffic import Traffic

if TYPE_CHECKING:
    from kvstore.leases import Session

log = logging.getLogger("kvstore.wire")

MAX_CALLS = 256
"""Calls of one connection that may be under way at once."""

HANDSHAKE_S = 5.0
"""A connection that has not said `hello` by then is closed."""

LINGER_S = 5.0
"""How long a connection that is being closed may take to fetch what it was sent last."""


class Verbs(Protocol):
    """What a connection needs of the service."""

    def call(self, session: Session, method: str, params: m.Message) -> Any: ...
    def payload(self, session: Session, p: m.Fetch) -> tuple[Any, list[memoryview]]: ...
    def place(self, session: Session, p: m.Fill) -> list[memoryview]: ...


class Listener:
    """Accepts connections on one socket and keeps their number bounded.

    Parameters
    ----------
    service : Verbs
        Runs the verbs; its `ledger` keeps the sessions.
    traffic : Traffic
        Where calls are counted.
    max_connections : int
        Further ones are closed at once.
    allow_uids : set of int or None
        Who may connect to a Unix socket; None for TCP, where the token decides.
    max_payload : int
        Largest payload in a frame; 0 where there is shared memory.
    """

    def __init__(
        self, service: Any, traffic: Traffic, *, max_connections: int, allow_uids: set[int] | None, max_payload: int = 0
    ) -> None:
        self.service = service
        self.traffic = traffic
        self.max_connections = max_connections
        self.allow_uids = allow_uids
        self.max_payload = max_payload
        self.connections: set[Connection] = set()

    @property
    def remote(self) -> bool:
        """Whether clients of this listener have no shared memory."""
        return self.allow_uids is None

    def __call__(self) -> Connection:
        return Connection(self)

    def close_all(self) -> None:
        """Close every connection."""
        for connection in list(self.connections):
            connection.close()


class Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._service = listener.service
        self._loop = asyncio.get_running_loop()
        self._reader = frame.FrameReader(self._on_head, self._on_payload, max_payload=listener.max_payload)
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._filling: tuple[int, m.Fill, float] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # -- transport -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        listener = self._listener
        # A remote client shows the operator's token, so it belongs to the operator's trust domain.
        uid = os.getuid() if listener.remote else peer_uid(transport.get_extra_info("socket"))
        if len(listener.connections) >= listener.max_connections or (
            listener.allow_uids is not None and uid not in listener.allow_uids
        ):
            listener.traffic.refused_connections += 1
            self._reader.paused = True
            self._transport.abort()
            return
        listener.connections.add(self)
        self._session = self._service.ledger.open(f"uid-{uid}", listener.remote, self._notify)
        self._deadline = self._loop.call_later(HANDSHAKE_S, self._check_handshake)

    def _check_handshake(self) -> None:
        if self._session is not None and not self._session.greeted:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
        for task in self._calls:
            task.cancel()
        if self._session is not None:
            self._service.ledger.close(self._session)
        self._transport = None

    def close(self) -> None:
        """End the connection after what was written has been sent. Nothing it sent is run any more."""
        self._reader.paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self._loop.call_later(LINGER_S, self._transport.abort)

    def pause_writing(self) -> None:
        """The peer does not take its answers: run no more of its calls, those received already included."""
        self._reader.paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._reader.paused = False
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._transport is None or self._transport.is_closing() or self._reader.paused:
            return
        self.buffer_updated(0)
        if not self._reader.paused:
            self._transport.resume_reading()

    # -- receiving -----------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._reader.advance(nbytes)
        except KVStoreError as error:
            self._end_with(error)
        except Exception:
            log.exception("a connection failed")
            self._end_with(InternalError("the daemon failed to handle a frame."))

    def _on_head(self, head: bytes, payload_bytes: int) -> Sequence[memoryview]:
        request = envelope.decode_request(head)
        if isinstance(request, envelope.Notice):
            if payload_bytes:
                raise ProtocolError("a notice may not carry a payload.")
            self._run(None, request.method, request.params)
            return ()
        if payload_bytes:
            return self._begin_fill(request, payload_bytes)
        self._run(request.id, request.method, request.params)
        return ()

    def _begin_fill(self, request: envelope.Request, payload_bytes: int) -> list[memoryview]:
        """Say where a payload goes. A wrong one ends the connection: there is nowhere to put its bytes."""
        if request.method != "fill":
            raise ProtocolError(f"{request.method[:40]} may not carry a payload.")
        params = envelope.decode_params("fill", request.params)
        places = self._service.place(self._session, params)
        if sum(len(p) for p in places) != payload_bytes:
            raise ProtocolError(f"fill: {payload_bytes} bytes were sent for a block of another size.")
        self._filling = (request.id, cast(m.Fill, params), time.perf_counter())
        return places

    def _on_payload(self) -> None:
        if self._filling is not None:
            (call_id, params, _), self._filling = self._filling, None
            self._dispatch(call_id, "fill", params)

    # -- running verbs -------------------------------------------------------------------------------------------------

    def _run(self, call_id: int | None, method: str, raw: Any) -> None:
        started = time.perf_counter()
        try:
            params = envelope.decode_params(method, raw)
            if method == "fill":
                raise InvalidParams("fill: a block's bytes come as the payload of this very frame.")
        except KVStoreError as error:
            self._listener.traffic.record(method if method in m.METHODS else "unknown", started, error)
            self._answer(call_id, error)
            return
        if method == "fetch" and self._listener.remote:
            self._send_payload(call_id, cast(m.Fetch, params), started)
        else:
            self._dispatch(call_id, method, params)

    def _dispatch(self, call_id: int | None, method: str, params: m.Message) -> None:
        started = time.perf_counter()
        try:
            result = self._service.call(self._session, method, params)
            if not isinstance(result, m.Message) and inspect.isawaitable(result):
                self._later(call_id, method, result, started)
                return
        except Exception as error:
            result = self._typed(error, method)
        self._finish(call_id, method, result, started)

    def _later(self, call_id: int | None, method: str, result: Any, started: float) -> None:
        if len(self._calls) >= MAX_CALLS:
            result.close()
            raise LimitExceeded(f"{MAX_CALLS} calls of this connection are under way, the most allowed.")
        task = self._loop.create_task(self._await(call_id, method, result, started))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _await(self, call_id: int | None, method: str, result: Any, started: float) -> None:
        try:
            outcome = await result
        except Exception as error:
            outcome = self._typed(error, method)
        self._finish(call_id, method, outcome, started)

    def _typed(self, error: Exception, method: str) -> KVStoreError:
        if isinstance(error, KVStoreError):
            return error
        log.error("verb %s failed", method, exc_info=error)
        return InternalError(f"{method} failed in the daemon ({type(error).__name__}).")

    def _finish(self, call_id: int | None, method: str, result: m.Message | KVStoreError, started: float) -> None:
        failed = result if isinstance(result, KVStoreError) else None
        self._listener.traffic.record(method, started, failed)
        self._answer(call_id, result)
        if method == "hello" and failed is not None:
            self.close()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _answer(self, call_id: int | None, result: m.Message | KVStoreError) -> None:
        if call_id is None or self._transport is None:
            return
        encode = envelope.encode_error if isinstance(result, KVStoreError) else envelope.encode_reply
        self._transport.write(frame.pack(encode(call_id, cast(Any, result))))

    def _send_payload(self, call_id: int | None, params: m.Fetch, started: float) -> None:
        try:
            _, parts = self._service.payload(self._session, params)
        except KVStoreError as error:
            self._finish(call_id, "fetch", error, started)
            return
        if call_id is not None and self._transport is not None:
            self._transport.write(frame.pack(envelope.encode_reply(call_id, m.Empty()), sum(len(p) for p in parts)))
            for part in parts:
                self._transport.write(part)
        self._listener.traffic.record("fetch", started)

    def _notify(self, method: str, params: m.Message) -> None:
        if self._transport is not None:
            self._transport.write(frame.pack(envelope.encode_notice(method, params)))

    def _end_with(self, error: KVStoreError) -> None:
        """Say what was wrong with the stream, under call id 0, and close."""
        self._listener.traffic.errors[error.code] += 1
        self._answer(0, error)
        self.close()


def peer_uid(sock: socket.socket) -> int:
    """User of the process at the other end of a Unix socket, as the kernel knows it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1]
