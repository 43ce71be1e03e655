"""Drives operations over a blocking socket."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import Any, TypeVar

from kvstore.client.address import CONNECT_AGAIN_S, connect_unix
from kvstore.client.core import Core
from kvstore.client.effects import Arrivals, Call, Calls, Effect, Flow, Work
from kvstore.client.mailbox import Mailbox, Pending
from kvstore.errors import ConnectionLost, DeadlineExceeded, KVStoreError
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m

T = TypeVar("T")


class Driver:
    """One connection, made when it is first needed and again after it was lost.

    Parameters
    ----------
    address : (host, port) or str
        A path is that of a Unix socket.
    core : Core
        The operations; the driver gives it the means to speak without waiting.
    timeout_s : float
    """

    def __init__(self, address: tuple[str, int] | str, core: Core, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.core = core
        self.core.tell = self._tell
        self.core.forget = self._forget
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._mailbox = Mailbox(self._tell)

    def drive(self, flow: Flow[T], timeout_s: float | None) -> T:
        """Run an operation to its end, within a deadline."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        with self._lock:
            try:
                self._ensure(deadline)
                return self._run(flow, deadline)
            finally:
                flow.close()

    def _run(self, flow: Flow[T], deadline: float) -> T:
        try:
            effect = next(flow)
            while True:
                try:
                    answer = self._perform(effect, deadline)
                except KVStoreError as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as stop:
            return stop.value

    def _perform(self, effect: Effect, deadline: float) -> Any:
        if isinstance(effect, Call):
            return self._wait(self._send(effect, deadline), deadline)
        if isinstance(effect, Calls):
            pending = [self._send(call, deadline) for call in effect.calls]
            return [self._wait(one, deadline) for one in pending]
        if isinstance(effect, Work):
            return effect.function()
        return self._await_notice(effect)

    def _send(self, call: Call, deadline: float) -> Pending:
        total = sum(len(part) for part in call.send)
        pending, data = self._mailbox.call(call.method, call.params, total, call.into)
        self._write(data, deadline)
        for part in call.send:
            self._write(part, deadline)
        return pending

    def _wait(self, pending: Pending, deadline: float) -> m.Message:
        while pending.result is None:
            if not self._receive(deadline):
                if not self._mailbox.abandon(pending):
                    self._disconnect()
                raise DeadlineExceeded(f"the daemon did not answer {pending.method} in time.")
        if isinstance(pending.result, KVStoreError):
            raise pending.result
        return pending.result

    def _await_notice(self, effect: Arrivals) -> m.LeaseNotice | None:
        while True:
            notice = self._mailbox.notice(effect.lease)
            if notice is not None or not self._receive(effect.deadline):
                return notice

    # -- socket --------------------------------------------------------------------------------------------------------

    def _ensure(self, deadline: float) -> None:
        if self._socket is not None and not any(event & ~select.POLLIN for _, event in self._poll.poll(0)):
            return
        self._disconnect()
        timeout = max(0.001, deadline - time.monotonic())
        self._socket = _connect(self.address, timeout)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN | select.POLLRDHUP)
        self._mailbox = Mailbox(self._tell)
        fd_path = f"{self.address}.fd" if isinstance(self.address, str) else None
        try:
            self._run(self.core.hello(fd_path, self.timeout_s), deadline)
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.core.unlink()

    def _write(self, data: bytes | memoryview, deadline: float) -> None:
        if self._socket is None:
            raise ConnectionLost("the connection to the daemon is gone.")
        try:
            sent = self._send_now(self._socket, data)
            while sent < len(data):
                _wait_to_write(self._socket, deadline)
                sent += self._send_now(self._socket, memoryview(data)[sent:])
        except TimeoutError:
            self._disconnect()  # half a frame may be out
            raise DeadlineExceeded("the daemon did not take a request in time.") from None
        except OSError as error:
            self._disconnect()
            raise ConnectionLost(f"the connection to the daemon broke ({error}).") from None
        except BaseException:  # interrupted: half a frame may be out
            self._disconnect()
            raise

    @staticmethod
    def _send_now(sock: socket.socket, data: bytes | memoryview) -> int:
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    def _receive(self, deadline: float) -> bool:
        """Take in what the daemon sends next; whether something came before the deadline."""
        if self._socket is None:
            raise ConnectionLost("the connection to the daemon is gone.")
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        try:
            if not self._poll.poll(1e3 * left):
                return False
            nbytes = self._socket.recv_into(self._mailbox.reader.buffer())
        except BlockingIOError:  # it seemed to be there
            return True
        except OSError as error:
            self._disconnect()
            raise ConnectionLost(f"the connection to the daemon broke ({error}).") from None
        except BaseException:  # interrupted: bytes may be lost, and the answer to this call would belong to nobody
            self._disconnect()
            raise
        if not nbytes:
            self._disconnect()
            raise ConnectionLost("the daemon closed the connection.")
        try:
            self._mailbox.reader.advance(nbytes)
        except KVStoreError:
            self._disconnect()
            raise
        return True

    def _tell(self, method: str, params: m.Message) -> None:
        with self._lock, contextlib.suppress(KVStoreError):
            if self._socket is not None:
                self._write(frame.pack(envelope.encode_notice(method, params)), time.monotonic() + self.timeout_s)

    def _forget(self, lease: int) -> None:
        self._mailbox.forget(lease)


def _wait_to_write(sock: socket.socket, deadline: float) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(max(1.0, 1e3 * (deadline - time.monotonic()))):
        raise TimeoutError


def _connect(address: tuple[str, int] | str, timeout_s: float) -> socket.socket:
    try:
        if isinstance(address, str):
            deadline = time.monotonic() + timeout_s
            while (sock := connect_unix(address)) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(CONNECT_AGAIN_S)
            return sock
        sock = socket.create_connection(address, timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except TimeoutError:
        raise DeadlineExceeded(f"no connection to the daemon at {address} in time.") from None
    except OSError as error:
        raise ConnectionLost(f"no daemon at {address} ({error.strerror or error}).") from None
