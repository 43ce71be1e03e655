"""The contract of `Tier`, contents: what is stored is what is loaded, and nothing else is there."""

from __future__ import annotations

import asyncio
import random
import time

from kvstore.testing.tier_kit import (
    MIB,
    PAGE,
    SIZES,
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
from kvstore.types import BlockHeader, Exists, Hit, Miss, MissReason, Stored


class Contents(TierMaker):
    """What comes back is what was stored."""

    # -- what is stored is what is loaded ------------------------------------------------------------------------------

    async def test_every_size_comes_back_exactly(self, tier: Tier) -> None:
        for number, nbytes in enumerate(SIZES):
            block = block_of(number)
            assert await store(tier, block, nbytes) == Stored()
            assert tier.size(block) == nbytes
            assert await load(tier, block, nbytes)

    async def test_buffers_may_be_cut_anywhere_on_a_page(self, tier: Tier) -> None:
        rng = random.Random(3)
        nbytes = 2 * MIB + 4099
        for number in range(8):
            cuts = [sorted(rng.sample(range(1, 128), rng.randrange(0, 40))) for _ in range(2)]
            assert await store(tier, block_of(number), nbytes, cuts=cuts[0]) == Stored()
            assert await load(tier, block_of(number), nbytes, cuts[1])

    async def test_more_buffers_than_one_system_call_takes(self, tier: Tier) -> None:
        nbytes = 20 * MIB + 5
        every_page = range(1, nbytes // PAGE + 1)
        assert await store(tier, block_of(1), nbytes, cuts=every_page) == Stored()
        assert await load(tier, block_of(1), nbytes, every_page)

    async def test_memory_that_is_not_aligned_works_too(self, tier: Tier) -> None:
        block, nbytes = block_of(1), 300_001
        payload = payload_of(block, nbytes)
        odd = memoryview(bytearray(b"-" + payload))[1:]
        assert await tier.put(block, header_of(block), [odd[:7], odd[7:100_000], odd[100_000:]], nbytes) == Stored()
        into = memoryview(bytearray(nbytes + 1))[1:]
        assert isinstance(await tier.get(block, [into[:12_345], into[12_345:]]), Hit)
        assert into == payload

    async def test_a_header_without_anything(self, tier: Tier) -> None:
        block = block_of(1)
        assert await tier.put(block, BlockHeader(), pages(5, content=b"hello"), 5) == Stored()
        assert await tier.get(block, pages(5)) == Hit(BlockHeader(), 5)

    async def test_the_callers_memory_is_not_kept(self, tier: Tier) -> None:
        block, nbytes = block_of(1), 100_000
        views = pages(nbytes, content=payload_of(block, nbytes))
        assert await tier.put(block, header_of(block), views, nbytes) == Stored()
        views[0][:] = bytes(nbytes)
        assert await load(tier, block, nbytes)

    async def test_memory_behind_the_payload_is_not_written(self, tier: Tier) -> None:
        block, nbytes = block_of(1), 4096 + 100
        await store(tier, block, nbytes)
        memory = pages(3 * 4096, content=b"\xaa" * (3 * 4096))[0]
        assert isinstance(await tier.get(block, [memory[:nbytes]]), Hit)
        assert memory[8192:] == b"\xaa" * 4096

    async def test_a_thousand_blocks(self, tier: Tier) -> None:
        blocks = [block_of(number) for number in range(1000)]
        assert all(o == Stored() for o in await asyncio.gather(*(store(tier, b, 1000) for b in blocks)))
        assert tier.usage().blocks == 1000
        assert all(await asyncio.gather(*(load(tier, b, 1000) for b in blocks)))

    # -- what is not there ---------------------------------------------------------------------------------------------

    async def test_an_unknown_block_is_absent(self, tier: Tier) -> None:
        block = block_of(1)
        assert tier.size(block) is None
        assert not tier.contains(*block)
        assert await tier.get(block, pages(10)) == Miss(MissReason.ABSENT)
        assert not await tier.drop(block)
        assert await tier.clear(block.scope) == 0
        assert not tier.pin(block, time.monotonic() + 10)
        tier.touch([block])

    async def test_a_second_put_changes_nothing(self, tier: Tier) -> None:
        block = block_of(1)
        assert await store(tier, block, 10_000) == Stored()
        used = tier.usage()
        assert await tier.put(block, BlockHeader(), pages(10_000), 10_000) == Exists()
        assert await tier.put(block, BlockHeader(), pages(10_000), 10_000, durable=True) == Exists()
        assert tier.usage() == used
        assert await load(tier, block, 10_000)

    async def test_scopes_never_meet(self, tier: Tier) -> None:
        scopes = [scope_of(0), scope_of(1), scope_of(0, "u1"), scope_of(1, "u1")]
        blocks = [block_of(7, scope) for scope in scopes]
        for block in blocks[:-1]:
            assert await store(tier, block, 5000) == Stored()
        assert await tier.get(blocks[-1], pages(5000)) == Miss(MissReason.ABSENT)
        for block in blocks[:-1]:
            assert await load(tier, block, 5000)
        assert await tier.clear(scopes[0]) == 1
        assert [tier.contains(*block) for block in blocks] == [False, True, True, False]

    async def test_buffers_of_another_length_are_a_miss(self, tier: Tier) -> None:
        await store(tier, block_of(1), 5000)
        for wrong in (4999, 5001):
            assert isinstance(await tier.get(block_of(1), pages(wrong)), Miss)

    async def test_dropped_is_gone_and_may_come_back(self, tier: Tier) -> None:
        block = block_of(1)
        await store(tier, block, 9000)
        assert await tier.drop(block)
        assert not await tier.drop(block)
        assert tier.size(block) is None
        assert not await load(tier, block, 9000)
        assert await store(tier, block, 9000) == Stored()
        assert await load(tier, block, 9000)

    async def test_clear_takes_one_scope_only(self, tier: Tier) -> None:
        mine, other = scope_of(0), scope_of(1)
        for number in range(10):
            await store(tier, block_of(number, mine), 3000)
            await store(tier, block_of(number, other), 3000)
        assert await tier.clear(mine) == 10
        assert tier.usage().blocks == 10
        assert not any([await load(tier, block_of(number, mine), 3000) for number in range(10)])
        assert all([await load(tier, block_of(number, other), 3000) for number in range(10)])
