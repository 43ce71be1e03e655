"""Copies of one block in several lower tiers: which of them a load reads, and how the worse ones are made good again.

A tier under pressure makes blocks smaller; one further down may have kept more of them. A load reads the copy that lost
least, of equal ones the nearest. Nearer copies that lost more are then replaced by it: one at a time, while nobody
waits for a load, and only where there is room without any block leaving for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.tiers.base import Tier
from kvstore.types import BlockId, Scope

log = logging.getLogger("kvstore.copies")

MOST = 256
"""Blocks that wait for a better copy; beyond that those of least weight are forgotten, until they are read again."""
PAUSE_S = 0.05
"""How often it is looked whether loads have ended."""


class Copies:
    """The lower tiers, nearest first, as places that may have the same blocks.

    Parameters
    ----------
    below : list of Tier
    loading : callable
        Whether somebody waits for a load now.
    """

    def __init__(self, below: list[Tier], loading: Callable[[], bool]) -> None:
        self._below = below
        self._loading = loading
        self._worse: dict[BlockId, tuple[float, Tier, Tier]] = {}
        self._task: asyncio.Task[None] | None = None

    def best(self, scope: Scope, key: bytes) -> Tier | None:
        """The tier whose copy of a block a load reads; None if none says that it has one."""
        found: Tier | None = None
        for tier in self._below:
            if found is None:
                found = tier if tier.contains(scope, key) else None
            elif found.outdone(scope, key, tier):
                found = tier
        return found

    def in_order(self, block: BlockId) -> list[Tier]:
        """All lower tiers, in the order in which a load tries them."""
        best = self.best(block.scope, block.key)
        return self._below if best is None else [best, *(tier for tier in self._below if tier is not best)]

    def was_read(self, block: BlockId, source: Tier, weight: float = 1.0) -> None:
        """A load had a block from a tier: have nearer copies that are worse replaced by that one later.

        Those of most weight go first, of equal ones those that were read last.
        """
        for tier in self._below[: self._below.index(source)]:
            if tier.outdone(*block, source):
                self._worse.pop(block, None)
                self._worse[block] = weight, tier, source
        if len(self._worse) > MOST:
            del self._worse[min(self._worse, key=self._weight)]  # the one that has waited longest, of equal ones
        if self._worse and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._make_good())

    def _weight(self, block: BlockId) -> float:
        return self._worse[block][0]

    async def _make_good(self) -> None:
        try:
            while self._worse:
                if self._loading():
                    await asyncio.sleep(PAUSE_S)
                    continue
                block = max(reversed(self._worse), key=self._weight)
                _, tier, source = self._worse.pop(block)
                try:
                    await tier.take_over(block, source)
                except Exception:
                    log.exception("tier %s: a better copy could not be taken over", tier.name)
        finally:
            self._task = None

    async def close(self) -> None:
        """Forget what is to be done, and wait for what is under way."""
        self._worse.clear()
        if self._task is not None:
            await asyncio.wait([self._task])
