"""The contract of `Tier`, from start to end: damage, durability, counters, closing, and what outlives it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvstore.testing.tier_kit import (
    MIB,
    SIZES,
    TierMaker,
    block_of,
    load,
    pages,
    scope_of,
    store,
)
from kvstore.tiers.base import Tier
from kvstore.types import Dropped, DropReason, Miss, MissReason, Stored


class Life(TierMaker):
    """Damage is a counted miss; what was accepted survives."""

    # -- trouble -------------------------------------------------------------------------------------------------------

    async def test_a_damaged_block_is_a_counted_miss_and_then_gone(self, tier: Tier) -> None:
        block, other = block_of(1), block_of(2)
        await store(tier, block, 2 * MIB + 100)
        await store(tier, other, 2 * MIB + 100)
        await self.damage(tier, block)
        assert await tier.get(block, pages(2 * MIB + 100)) == Miss(MissReason.CORRUPT)
        assert tier.counters.corrupt == 1
        assert tier.size(block) is None
        assert await tier.get(block, pages(2 * MIB + 100)) == Miss(MissReason.ABSENT)
        assert await load(tier, other, 2 * MIB + 100)
        assert await store(tier, block, 2 * MIB + 100) == Stored()
        assert await load(tier, block, 2 * MIB + 100)

    async def test_check_finds_damage_and_mends_it(self, tier: Tier) -> None:
        for number in range(5):
            await store(tier, block_of(number), 50_000)
        assert await tier.check() == []
        await self.damage(tier, block_of(3))
        findings = await tier.check()
        assert len(findings) == 1
        assert not findings[0].fixed
        assert [f.fixed for f in await tier.check(fix=True)] == [True]
        assert await tier.check() == []
        assert not tier.contains(*block_of(3))
        assert tier.usage().blocks == 4

    # -- life ----------------------------------------------------------------------------------------------------------

    async def test_a_durable_put_is_readable(self, tier: Tier) -> None:
        outcomes = await asyncio.gather(*(store(tier, block_of(n), 30_000, durable=True) for n in range(10)))
        assert outcomes == [Stored()] * 10
        assert all([await load(tier, block_of(n), 30_000) for n in range(10)])

    async def test_counters_tell_what_happened(self, tier: Tier) -> None:
        await store(tier, block_of(1), 10_000)
        await store(tier, block_of(1), 10_000)
        await load(tier, block_of(1), 10_000)
        await load(tier, block_of(2), 10_000)
        counters = tier.counters
        assert (counters.stored, counters.exists, counters.hits, counters.misses) == (1, 1, 1, 1)
        assert (counters.bytes_written, counters.bytes_read) == (10_000, 10_000)
        assert counters.read_s > 0
        assert counters.write_s > 0

    async def test_closing_twice_and_asking_afterwards(self, tmp_path: Path) -> None:
        tier = await self.make(self.capacity, tmp_path / "tier")
        await tier.start()
        await store(tier, block_of(1), 10_000)
        await tier.close()
        await tier.close()
        assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
        assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.TIER_DOWN)

    async def test_close_waits_for_what_was_accepted(self, tmp_path: Path) -> None:
        tier = await self.make(self.capacity, tmp_path / "tier")
        await tier.start()
        tasks = [asyncio.ensure_future(store(tier, block_of(n), 500_000)) for n in range(12)]
        await asyncio.sleep(0.001)
        await tier.close()
        outcomes = await asyncio.gather(*tasks)
        assert all(o in (Stored(), Dropped(DropReason.TIER_DOWN)) for o in outcomes)
        if self.persistent:
            again = await self.make(self.capacity, tmp_path / "tier")
            await again.start()
            for number, outcome in enumerate(outcomes):
                assert await load(again, block_of(number), 500_000) == (outcome == Stored())
            await again.close()

    async def test_blocks_outlive_the_process(self, tmp_path: Path) -> None:
        if not self.persistent:
            pytest.skip("this tier keeps nothing")
        tier = await self.make(self.capacity, tmp_path / "tier")
        await tier.start()
        for number, nbytes in enumerate(SIZES):
            await store(tier, block_of(number, scope_of(number % 3, f"u{number % 2}")), nbytes)
        held, scopes = tier.usage(), tier.scopes()
        await tier.close()
        again = await self.make(self.capacity, tmp_path / "tier")
        await again.start()
        assert again.usage() == held
        assert again.scopes() == scopes
        for number, nbytes in enumerate(SIZES):
            assert await load(again, block_of(number, scope_of(number % 3, f"u{number % 2}")), nbytes)
        assert await again.check() == []
        await again.close()
