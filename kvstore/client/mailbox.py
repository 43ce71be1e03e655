"""Calls under way on one connection, and what has arrived for them. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from kvstore.errors import FrameTooLarge, KVStoreError, ProtocolError, from_wire
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m

_CONNECTION = 0
"""Call id under which the daemon says what was wrong with the whole connection."""


class Pending:
    """A call whose answer has not come.

    Attributes
    ----------
    result : Message, KVStoreError or None
        The answer, once it is there.
    wake : callable
        Called when it is.
    """

    __slots__ = ("abandoned", "into", "method", "result", "wake")

    def __init__(self, method: str, into: Sequence[memoryview]) -> None:
        self.method = method
        self.into = into
        self.result: m.Message | KVStoreError | None = None
        self.wake: Callable[[], None] = _nothing
        self.abandoned = False


def _nothing() -> None:
    return None


class Mailbox:
    """Matches answers to calls and notices to leases.

    Parameters
    ----------
    tell : callable
        Sends a notice; used to give back what an abandoned call was granted.
    """

    def __init__(self, tell: Callable[[str, m.Message], None]) -> None:
        self._tell = tell
        self._next = _CONNECTION
        self._calls: dict[int, Pending] = {}
        self._arriving: int | None = None
        self._notices: dict[int, deque[m.LeaseNotice]] = {}
        self.wake: dict[int, Callable[[], None]] = {}
        self.reader = frame.FrameReader(self._on_head, self._on_payload, max_payload=(1 << 32) - 1)

    def call(self, method: str, params: m.Message, send: int, into: Sequence[memoryview]) -> tuple[Pending, bytes]:
        """Begin a call: what to wait for, and the frame to send (its payload of `send` bytes follows).

        Raises
        ------
        FrameTooLarge
            If the daemon would refuse it and end the connection.
        """
        self._next = self._next % 0xFFFF_FFFF + 1
        head = envelope.encode_request(self._next, method, params)
        if len(head) > frame.MAX_HEAD_BYTES:
            raise FrameTooLarge(f"{method}: a request of {len(head)} bytes exceeds {frame.MAX_HEAD_BYTES}.")
        pending = self._calls[self._next] = Pending(method, into)
        return pending, frame.pack(head, send)

    def abandon(self, pending: Pending) -> bool:
        """Stop waiting. What the call is granted later is given back at once.

        Returns
        -------
        bool
            Whether the connection is still of use: not if the answer would be written into the caller's buffers.
        """
        pending.abandoned = True
        if pending.result is not None:  # it came in the same moment
            self._keep_or_give_back(pending)
            return True
        return not pending.into and sum(p.abandoned for p in self._calls.values()) <= 64

    def notice(self, lease: int) -> m.LeaseNotice | None:
        """The next notice of a lease, if one has arrived."""
        queue = self._notices.get(lease)
        return queue.popleft() if queue else None

    def forget(self, lease: int) -> None:
        """Drop notices of a lease that was released."""
        self._notices.pop(lease, None)

    def fail(self, error: KVStoreError) -> None:
        """Answer every call with an error: the connection is gone."""
        calls, self._calls = self._calls, {}
        for pending in calls.values():
            pending.result = error
            pending.wake()
        for wake in list(self.wake.values()):
            wake()

    def _on_head(self, head: bytes, payload_bytes: int) -> Sequence[memoryview]:
        answer = envelope.decode_answer(head)
        if isinstance(answer, envelope.Notice):
            notice = cast(m.LeaseNotice, envelope.decode_notice(answer))
            if notice.lease in self._notices:
                self._notices[notice.lease].append(notice)
                self.wake.get(notice.lease, _nothing)()
            return ()
        if answer.id == _CONNECTION and answer.error is not None:
            raise from_wire(*answer.error)
        pending = self._calls.get(answer.id)
        if pending is None:
            raise ProtocolError(f"an answer to call {answer.id} came, which was not made.")
        if payload_bytes:
            self._arriving = answer.id
            return pending.into
        if pending.into and answer.error is None:
            raise ProtocolError("a payload was asked for and none came.")
        self._settle(answer.id, pending, answer)
        return ()

    def _on_payload(self) -> None:
        if self._arriving is not None:
            pending = self._calls.pop(self._arriving)
            self._arriving = None
            pending.result = m.Empty()
            pending.wake()

    def _settle(self, call_id: int, pending: Pending, answer: envelope.Answer) -> None:
        if answer.error is not None:
            pending.result = from_wire(*answer.error)
        else:
            pending.result = envelope.decode_result(pending.method, answer.result)
            self._keep_or_give_back(pending)
        del self._calls[call_id]
        pending.wake()

    def _keep_or_give_back(self, pending: Pending) -> None:
        if isinstance(pending.result, m.LeaseReply):
            if pending.abandoned:
                self.forget(pending.result.lease)
                self._tell("release", m.Release([pending.result.lease]))
            elif pending.result.pending:
                self._notices[pending.result.lease] = deque()
        elif isinstance(pending.result, m.ReserveReply) and pending.abandoned:
            self._tell("abort", m.Abort(pending.result.reservation))
