"""Subscriptions to a daemon's events, for both faces: the place in the log is kept here, not in the daemon."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from kvstore.client.core import Call, Flow
from kvstore.client.events import Event, Position, read_reply
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

    @property
    def position(self) -> Position:
        """Where to go on later, also in another process. Empty while a snapshot is being read: it cannot be resumed."""
        return Position() if self._snapshot else self._at

    def _ask(self, wait_s: float) -> Flow[list[Event]]:
        params = m.Events(self._at.boot, self._at.after, self._snapshot, wait_s, LIMIT)
        reply: m.EventsReply = yield Call("events", params)
        events = read_reply(reply)
        self._at, self._snapshot = Position(reply.boot, reply.after), reply.snapshot
        return events

    def _wait_s(self, since: float) -> float | None:
        """How long to wait for the next event, or None if there were none for long enough."""
        if self._idle_s is None:
            return WAIT_S
        left = self._idle_s - (time.monotonic() - since)
        return min(WAIT_S, max(0.0, left)) if left > 0 or self._snapshot else None


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
        return self._client.drive(self._ask(wait_s), self._client.timeout_s + wait_s)

    def __iter__(self) -> Iterator[Event]:
        since = time.monotonic()
        while (wait_s := self._wait_s(since)) is not None:
            for event in self.poll(wait_s):
                yield event
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
        return await self._client.drive(self._ask(wait_s), self._client.timeout_s + wait_s)

    async def __aiter__(self) -> AsyncIterator[Event]:
        since = time.monotonic()
        while (wait_s := self._wait_s(since)) is not None:
            for event in await self.poll(wait_s):
                yield event
                since = time.monotonic()
