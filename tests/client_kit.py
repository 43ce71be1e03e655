"""Both faces of the client for tests, called the same way whichever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from daemons import NAMESPACE, until

from kvstore import AsyncKVStoreClient, KVStoreClient

BIG = 1 << 20
"""Bytes of a block that the asyncio face copies in a thread."""
SOON_S = 1.5
"""What a busy machine may add to a deadline."""


class Face:
    """One face of the client, called the same way whichever it is."""

    def __init__(self, is_async: bool, address: str, **how: Any) -> None:
        make: Any = AsyncKVStoreClient if is_async else KVStoreClient
        self.is_async = is_async
        self.client = make(address, **{"namespace": NAMESPACE, "timeout_s": 20, **how})

    async def do(self, method: Callable[..., Any], *args: Any, **how: Any) -> Any:
        """Run a method of the client, or of a reservation."""
        if self.is_async:
            return await method(*args, **how)
        return await asyncio.to_thread(method, *args, **how)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda *args, **how: self.do(getattr(self.client, name), *args, **how)


MakeFace = Callable[..., Face]


async def soon(condition: Callable[[], Any], what: str) -> None:
    """Wait for a condition without holding up the loop."""
    await asyncio.to_thread(until, condition, what)
