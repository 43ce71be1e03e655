"""The contract of `Tier`, space: the budget holds, what is used or pinned stays, the rest leaves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from kvstore.testing.tier_kit import (
    TierMaker,
    block_of,
    load,
    scope_of,
    store,
)
from kvstore.tiers.base import Tier
from kvstore.types import Dropped, DropReason, Stored


class Budget(TierMaker):
    """What is held never exceeds the budget."""

    async def test_usage_returns_to_where_it_was(self, tier: Tier) -> None:
        before = tier.usage()
        for number in range(20):
            await store(tier, block_of(number, scope_of(number % 3)), 1000 * number)
        held = tier.usage()
        assert held.blocks == 20
        assert held.used - before.used >= sum(1000 * number for number in range(20))
        assert sum(blocks for blocks, _ in tier.scopes().values()) in (0, 20)
        for number in range(3):
            await tier.clear(scope_of(number))
        assert tier.usage() == before

    async def test_it_evicts_what_was_not_used(self, tmp_path: Path) -> None:
        tier = await self.small(tmp_path, 8, 40_000)
        for number in range(8):
            assert await store(tier, block_of(number), 40_000) == Stored()
        tier.touch([block_of(0), block_of(1)])
        assert await load(tier, block_of(2), 40_000)
        for number in range(8, 12):
            assert await store(tier, block_of(number), 40_000) == Stored()
            assert tier.usage().used <= tier.usage().capacity
        for number in (0, 1, 2):
            assert await load(tier, block_of(number), 40_000), "what was used is gone"
        assert not tier.contains(*block_of(3))
        assert tier.usage().blocks == 8
        assert tier.counters.evicted == 4
        await tier.close()

    async def test_a_block_larger_than_everything(self, tmp_path: Path) -> None:
        tier = await self.small(tmp_path, 4, 40_000)
        assert await store(tier, block_of(1), 40_000) == Stored()
        assert await store(tier, block_of(2), tier.usage().capacity + 1) == Dropped(DropReason.TOO_LARGE)
        assert await load(tier, block_of(1), 40_000)
        assert tier.counters.dropped == {"too_large": 1}
        await tier.close()

    async def test_a_pinned_block_stays(self, tmp_path: Path) -> None:
        tier = await self.small(tmp_path, 4, 40_000)
        for number in range(4):
            await store(tier, block_of(number), 40_000)
        assert tier.pin(block_of(0), time.monotonic() + 100)
        for number in range(4, 10):
            assert await store(tier, block_of(number), 40_000) == Stored()
        assert await load(tier, block_of(0), 40_000)
        await tier.close()

    async def test_when_all_is_pinned_the_newcomer_is_dropped(self, tmp_path: Path) -> None:
        tier = await self.small(tmp_path, 4, 40_000)
        for number in range(4):
            await store(tier, block_of(number), 40_000)
            assert tier.pin(block_of(number), time.monotonic() + (0.2 if number == 3 else 100))
        used = tier.usage()
        assert await store(tier, block_of(9), 40_000) == Dropped(DropReason.TIER_FULL)
        assert tier.usage() == used
        await asyncio.sleep(0.25)
        assert await store(tier, block_of(9), 40_000) == Stored(), "a pin has its time"
        assert tier.pin(block_of(0), 0)
        assert await store(tier, block_of(10), 40_000) == Stored(), "and may be ended"
        await tier.close()

    async def test_a_crowd_over_the_budget(self, tmp_path: Path) -> None:
        tier = await self.small(tmp_path, 6, 100_000)

        async def one(number: int) -> None:
            outcome = await store(tier, block_of(number), 100_000)
            assert outcome in (Stored(), Dropped(DropReason.TIER_FULL))
            assert tier.usage().used <= tier.usage().capacity
            await load(tier, block_of(number), 100_000)

        await asyncio.gather(*(one(number) for number in range(60)))
        assert 4 <= tier.usage().blocks <= 6
        assert await tier.check() == []
        await tier.close()
