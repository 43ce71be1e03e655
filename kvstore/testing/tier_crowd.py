"""The contract of `Tier`, many at a time: calls that meet, are cancelled or run out of time."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.testing.tier_kit import (
    MIB,
    TierMaker,
    block_of,
    header_of,
    load,
    pages,
    payload_of,
    scope_of,
    store,
)
from kvstore.tiers.base import Tier
from kvstore.types import Dropped, DropReason, Exists, Stored


class Crowd(TierMaker):
    """Calls that overlap never give a wrong byte, and leave nothing behind."""

    async def test_one_block_put_by_many(self, tier: Tier) -> None:
        outcomes = await asyncio.gather(*(store(tier, block_of(1), 200_000) for _ in range(8)))
        assert outcomes.count(Stored()) == 1
        assert all(o in (Stored(), Exists(), Dropped(DropReason.IN_FLIGHT)) for o in outcomes)
        assert await load(tier, block_of(1), 200_000)
        assert tier.usage().blocks == 1

    async def test_a_drop_during_a_put_wins(self, tier: Tier) -> None:
        for number in range(20):
            block = block_of(number)
            putting = asyncio.ensure_future(store(tier, block, 300_000))
            for _ in range(number % 5):
                await asyncio.sleep(0)
            if number % 2:
                await asyncio.sleep(0.0003 * number)
            await tier.drop(block)
            assert tier.size(block) is None
            outcome = await putting
            if tier.size(block) is not None:  # the put had not begun when the block was dropped
                assert outcome == Stored()
                assert await tier.drop(block)
            assert not await load(tier, block, 300_000)

    async def test_everything_at_once_never_gives_a_wrong_byte(self, tier: Tier) -> None:
        rng = random.Random(5)
        sizes = {number: rng.choice((100, 5000, 70_000)) for number in range(12)}

        async def worker(seed: int) -> int:
            rng, hits = random.Random(seed), 0
            for _ in range(60):
                number = rng.randrange(12)
                action = rng.random()
                if action < 0.4:
                    await store(tier, block_of(number), sizes[number], durable=action < 0.02)
                elif action < 0.8:
                    hits += await load(tier, block_of(number), sizes[number])
                else:
                    await tier.drop(block_of(number))
            return hits

        assert sum(await asyncio.gather(*(worker(seed) for seed in range(8)))) > 0
        assert await tier.check() == []

    async def test_a_cancelled_put_is_all_or_nothing(self, tier: Tier) -> None:
        before = tier.usage()
        for number in range(30):
            block, nbytes = block_of(number), 400_000
            views = pages(nbytes, content=payload_of(block, nbytes))
            task = asyncio.ensure_future(tier.put(block, header_of(block), views, nbytes, durable=number % 7 == 0))
            await asyncio.sleep(0 if number < 5 else 0.0001 * number)
            task.cancel()
            try:
                outcome = await task
            except asyncio.CancelledError:
                views[0][:] = bytes(nbytes)  # the memory is the caller's again
                if tier.contains(*block):
                    assert await load(tier, block, nbytes)
            else:
                assert outcome == Stored()
                assert await load(tier, block, nbytes)
        await tier.clear(scope_of())
        assert tier.usage() == before

    async def test_a_cancelled_get_leaves_the_memory_alone(self, tier: Tier) -> None:
        block, nbytes = block_of(1), 2 * MIB
        await store(tier, block, nbytes)
        for number in range(30):
            into = pages(nbytes)
            task = asyncio.ensure_future(tier.get(block, into))
            await asyncio.sleep(0 if number < 5 else 0.0001 * number)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                into[0][:] = b"\x55" * nbytes
                await asyncio.sleep(0.002)
                assert into[0] == b"\x55" * nbytes, "written after the call had ended"
        assert await load(tier, block, nbytes)

    async def test_a_timeout_around_a_call_is_a_timeout(self, tier: Tier) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await store(tier, block_of(1), 1 * MIB)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(tier.get(block_of(1), pages(MIB)), 0)
