"""The stream of server-sent events: one sample a second, to a bounded number of viewers that may be slow or gone."""

from __future__ import annotations

import asyncio
from collections import deque

from aiohttp import web

from kvstore.errors import LimitExceeded
from kvstore.http.guard import HEADERS

MAX_VIEWERS = 32
QUEUED = 2
"""Samples that wait for a slow viewer; older ones are dropped, since only the newest is of interest."""
HEARTBEAT_S = 5.0
STUCK_S = 30.0
"""A viewer that takes nothing for so long is cut off."""


class Viewer:
    """What waits for one viewer."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque(maxlen=QUEUED)
        self._news = asyncio.Event()
        self.ended = False

    def offer(self, event: bytes) -> None:
        """Queue an event, in place of the oldest where the queue is full."""
        self._waiting.append(event)
        self._news.set()

    def end(self) -> None:
        """Let the stream end."""
        self.ended = True
        self._news.set()

    def waiting(self) -> int:
        """Bytes that are queued."""
        return sum(map(len, self._waiting))

    async def next(self) -> bytes:
        """The next event; a heartbeat where none came in time; empty at the end."""
        while not self._waiting:
            if self.ended:
                return b""
            self._news.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            except TimeoutError:
                return b": alive\n\n"
        return self._waiting.popleft()


class Hub:
    """All viewers. Each sample is encoded once and shared by all of them."""

    def __init__(self) -> None:
        self.viewers: set[Viewer] = set()
        self.closed = False

    def publish(self, event: bytes) -> None:
        """Offer an event to every viewer."""
        for viewer in self.viewers:
            viewer.offer(event)

    def close(self) -> None:
        """End every stream; new ones end at once."""
        self.closed = True
        for viewer in self.viewers:
            viewer.end()

    async def serve(self, request: web.BaseRequest, first: bytes) -> web.StreamResponse:
        """Stream to one viewer until it leaves, is stuck, or the hub closes."""
        if len(self.viewers) >= MAX_VIEWERS:
            raise LimitExceeded(f"{MAX_VIEWERS} viewers are watching already.", "Close another one, or read /v1/stats.")
        response = web.StreamResponse(headers=HEADERS)
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        viewer = Viewer()
        viewer.ended = self.closed
        self.viewers.add(viewer)
        try:
            await response.prepare(request)
            await self._pump(response, viewer, first)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the viewer has left
        finally:
            self.viewers.discard(viewer)
        return response

    async def _pump(self, response: web.StreamResponse, viewer: Viewer, first: bytes) -> None:
        event = b"retry: 2000\n\n" + first
        while event:
            async with asyncio.timeout(STUCK_S):
                await response.write(event)
            event = await viewer.next()
        async with asyncio.timeout(1):
            await response.write(b"event: end\ndata: {}\n\n")
            await response.write_eof()
