"""Throttled(DiskTier(...), 50 MB/s): a tier that takes no more of its medium's bandwidth than it is given.

For machines whose disk serves others, too. Reads and writes share the bandwidth; a read never waits for a write that
has not begun, since somebody may be waiting for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from kvstore.tiers.base import Tier
from kvstore.tiers.wrappers import WrappedTier
from kvstore.types import BlockHeader, BlockId, LoadOutcome, StoreOutcome

GRAIN = 1 / 64
"""Share of a transfer that has to come before it tells how long the whole takes. Until then, so much may have come."""


class Pace:
    """Hands out a bandwidth in turns.

    Parameters
    ----------
    bytes_per_s : float
        The bandwidth.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._urgent: deque[tuple[asyncio.Future[None], int]] = deque()
        self._calm: deque[tuple[asyncio.Future[None], int]] = deque()
        self._busy = False
        self._turn = (0.0, 1.0)
        """When the transfer under way began, and how long it is made to take."""

    def seconds(self) -> float | None:
        """What the transfer under way takes, going by the share that has come of it; None if there is none.

        A bandwidth is given evenly, so half of the time has brought half of the bytes.
        """
        began, takes = self._turn
        passed = asyncio.get_running_loop().time() - began
        return passed / max(min(passed / takes, 1.0), GRAIN) if self._busy else None

    async def take(self, nbytes: int, *, urgent: bool) -> None:
        """Wait for the turn of a transfer, and for as long as it may take."""
        done = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._calm).append((done, nbytes))
        if not self._busy:
            self._next()
        await done

    def _next(self) -> None:
        self._busy = False
        for queue in (self._urgent, self._calm):
            while queue:
                done, nbytes = queue.popleft()
                if not done.done():  # else whoever waited has given up
                    self._busy = True
                    loop, takes = asyncio.get_running_loop(), nbytes / self.bytes_per_s
                    self._turn = loop.time(), takes
                    loop.call_later(takes, self._end, done)
                    return

    def _end(self, done: asyncio.Future[None]) -> None:
        if not done.done():
            done.set_result(None)
        self._next()


class Throttled(WrappedTier):
    """Keep a tier's reads and writes within a bandwidth.

    Goes around the circuit breaker, not into it: waiting for one's turn is no failure of the medium.

    Parameters
    ----------
    inner : Tier
        The tier.
    bytes_per_s : float
        Payload bytes a second, reads and writes together.
    """

    def __init__(self, inner: Tier, bytes_per_s: float) -> None:
        super().__init__(inner)
        self._pace = Pace(bytes_per_s)

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """As the tier, in its turn; what is not there takes no turn."""
        if self.inner.contains(block.scope, block.key):
            await self._pace.take(sum(view.nbytes for view in into), urgent=True)
        return await self.inner.get(block, into)

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """As the tier, in its turn; what is there already takes no turn."""
        if not self.inner.contains(block.scope, block.key):
            await self._pace.take(nbytes, urgent=False)
        return await self.inner.put(block, header, payload, nbytes, durable=durable)

    def pace(self) -> float | None:
        """What the transfer whose turn it is takes, or a block of the tier if that is slower."""
        return max(self._pace.seconds() or 0.0, self.inner.pace() or 0.0) or None

    def describe_state(self) -> dict[str, Any]:
        """State of the tier, and `max_bandwidth` in bytes a second."""
        return {**self.inner.describe_state(), "max_bandwidth": self._pace.bytes_per_s}
