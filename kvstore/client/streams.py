"""Subscriptions to a daemon's events, for both faces: the place in the log is kept here, not in the daemon."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from kvstore.client.effects import Call, Flow
from kvstore.client.events import HELD, RESET, Event, Position, read_reply
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.client.aio import AsyncKVStoreClient
    from kvstore.client.sync import KVStoreClient

WAIT_S = 20.0
"""How long one question waits in the daemon for something to happen."""

LIMIT = 4096
"""Blocks in one reply."""


class _Stream:
    """The place of a subscriber in the log."""

    def __init__(self, position: Position, idle_s: float | None) -> None:
        self._at = position
        self._snapshot = 0
        self._idle_s = idle_s
        self._ready: deque[Event] = deque()
        """Came together with others, and were not handed out yet."""

    @property
    def position(self) -> Position:
        """Where to go on later, also in another process: behind the last event that was handed out.

        Empty while a snapshot is being read: it cannot be resumed.
        """
        if not self._ready:
            return Position() if self._snapshot else self._at
        first = self._ready[0]
        return Position() if first.kind in (RESET, HELD) else Position(self._at.boot, first.seq - 1)

    def _ask(self, wait_s: float) -> Flow[list[Event]]:
        params = m.Events(self._at.boot, self._at.after, self._snapshot, wait_s, LIMIT)
        reply: m.EventsReply = yield Call("events", params)
        events = read_reply(reply)
        self._at, self._snapshot = Position(reply.boot, reply.after), reply.snapshot
        return events

    def _left(self) -> list[Event]:
        """What an iteration that was left did not hand out."""
        left = list(self._ready)
        self._ready.clear()
        return left

    def _wait_s(self, since: float) -> float:
        """How long to wait for the next event."""
        if self._idle_s is None:
            return WAIT_S
        return min(WAIT_S, max(0.0, self._idle_s - (time.monotonic() - since)))

    def _over(self, since: float) -> bool:
        """Whether there were no events for long enough."""
        return self._idle_s is not None and not self._snapshot and time.monotonic() - since >= self._idle_s


class EventStream(_Stream):
    """Events as an iterator that waits for them. On a connection of its own, so that other calls need not wait.

    An error (`kvstore.errors.Unavailable` while the daemon is away) does not end it: iterate again, or `poll`, and it
    goes on where it was; after a restart of the daemon with a ``reset``.
    """

    def __init__(self, client: KVStoreClient, position: Position, idle_s: float | None) -> None:
        super().__init__(position, idle_s)
        self._client = client

    def poll(self, wait_s: float = 0.0) -> list[Event]:
        """What happened since, waiting up to `wait_s` for something to happen."""
        return self._left() or self._client.drive(self._ask(wait_s), self._client.timeout_s + wait_s)

    def __iter__(self) -> Iterator[Event]:
        since = time.monotonic()
        while True:
            self._ready.extend(self.poll(self._wait_s(since)))
            if not self._ready and self._over(since):
                return
            while self._ready:
                yield self._ready.popleft()
                since = time.monotonic()

    def close(self) -> None:
        """End the connection. May be called twice."""
        self._client.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncEventStream(_Stream):
    """Events as an asynchronous iterator; see `EventStream`. Shares the client's connection."""

    def __init__(self, client: AsyncKVStoreClient, position: Position, idle_s: float | None) -> None:
        super().__init__(position, idle_s)
        self._client = client

    async def poll(self, wait_s: float = 0.0) -> list[Event]:
        """See `EventStream.poll`."""
        return self._left() or await self._client.drive(self._ask(wait_s), self._client.timeout_s + wait_s)

    async def __aiter__(self) -> AsyncIterator[Event]:
        since = time.monotonic()
        while True:
            self._ready.extend(await self.poll(self._wait_s(since)))
            if not self._ready and self._over(since):
                return
            while self._ready:
                yield self._ready.popleft()
                since = time.monotonic()
