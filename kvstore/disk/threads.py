"""The I/O threads of a disk tier, and work that runs to its end whoever asked for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """Threads that read, and as many that do everything else: somebody waits for a read, and it waits for no write."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._readers = ThreadPoolExecutor(count, "kvstore-read")
        self._writers = ThreadPoolExecutor(count, "kvstore-write")
        self._running: set[asyncio.Future[Any]] = set()

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run in a thread that only reads."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, partial(function, *args, **kwargs))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run in a thread for everything else."""
        return await asyncio.get_running_loop().run_in_executor(self._writers, partial(function, *args, **kwargs))

    async def to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end even if the caller is cancelled: a thread may be using the caller's buffers."""
        task = self.begin(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Begin some work that nobody need wait for, but `close`."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        """Wait for what was begun, and end the threads."""
        while self._running:
            await asyncio.wait(self._running)
        self._readers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
