"""The contract of `Tier` as tests. A tier's test file subclasses `TierSuite` and says how to make one.

    class TestMyTier(TierSuite):
        persistent = True

        async def make(self, capacity: int, place: Path) -> Tier:
            return MyTier(place, capacity)

        async def damage(self, tier: Tier, block: BlockId) -> None:
            ...  # flip a stored byte, past the tier

Payloads are a pure function of the block's identity, so that a wrong byte is seen without any bookkeeping.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import mmap
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kvstore.tiers.base import Tier
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Exists, Hit, Miss, MissReason, Scope, Stored

PAGE = 16 * 1024
KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 4095, 4096, 4097, PAGE, PAGE + 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17)


def scope_of(number: int = 0, domain: str = "u0") -> Scope:
    """A scope of its own for each number."""
    return Scope(domain, hashlib.sha256(f"ns {number}".encode()).digest())


def block_of(number: int, scope: Scope | None = None) -> BlockId:
    """A block of its own for each number."""
    return BlockId(scope if scope is not None else scope_of(), hashlib.sha256(f"key {number}".encode()).digest())


def payload_of(block: BlockId, nbytes: int) -> bytes:
    """The bytes that this block holds in every test."""
    seed = int.from_bytes(hashlib.sha256(repr(block).encode()).digest()[:8], "little")
    return np.random.default_rng(seed).bytes(nbytes)


def header_of(block: BlockId) -> BlockHeader:
    """The header that this block has in every test."""
    return BlockHeader(parent=block.key[::-1], tokens=block.key * 4, position=block.key[0] * 256)


def pages(nbytes: int, cuts: Sequence[int] = (), content: bytes | None = None) -> list[memoryview]:
    """Page-aligned memory of `nbytes`, cut after some pages, as an arena gives it."""
    memory = memoryview(mmap.mmap(-1, -(-max(nbytes, 1) // PAGE) * PAGE))[:nbytes]
    if content is not None:
        memory[:] = content
    edges = [0, *(cut * PAGE for cut in cuts if cut * PAGE < nbytes), nbytes]
    return [memory[a:b] for a, b in itertools.pairwise(edges)]


def joined(views: Sequence[memoryview]) -> bytes:
    """The bytes of some buffers."""
    return b"".join(views)


async def store(tier: Tier, block: BlockId, nbytes: int, *, durable: bool = False, cuts: Sequence[int] = ()) -> object:
    """Put a block's own payload."""
    views = pages(nbytes, cuts, payload_of(block, nbytes))
    return await tier.put(block, header_of(block), views, nbytes, durable=durable)


async def load(tier: Tier, block: BlockId, nbytes: int, cuts: Sequence[int] = ()) -> bool:
    """Get a block; whether it was there. A hit with one wrong byte fails the test."""
    into = pages(nbytes, cuts)
    outcome = await tier.get(block, into)
    if isinstance(outcome, Miss):
        return False
    assert outcome == Hit(header_of(block), nbytes)
    assert joined(into) == payload_of(block, nbytes)
    return True


class TierSuite(ABC):
    """What every tier must do.

    Attributes
    ----------
    persistent : bool
        Whether blocks outlive the tier's object.
    bounded : bool
        Whether the tier itself holds a byte budget and evicts.
    capacity : int
        Budget of the tier under test where a test names no other.
    """

    persistent = False
    bounded = True
    capacity = 64 * MIB

    @abstractmethod
    async def make(self, capacity: int, place: Path) -> Tier:
        """A tier that is not started, with its data at `place` if it is persistent."""

    async def damage(self, tier: Tier, block: BlockId) -> None:
        """Change one stored payload byte of a block, past the tier."""
        pytest.skip("this tier's test cannot reach its bytes")

    @pytest_asyncio.fixture
    async def tier(self, tmp_path: Path) -> AsyncIterator[Tier]:
        """A started tier."""
        made = await self.make(self.capacity, tmp_path / "tier")
        await made.start()
        yield made
        await made.close()

    async def small(self, tmp_path: Path, blocks: int, nbytes: int) -> Tier:
        """A started tier in which about so many blocks of a size have room."""
        if not self.bounded:
            pytest.skip("this tier has no budget of its own")
        probe = await self.make(self.capacity, tmp_path / "probe")
        await probe.start()
        empty = probe.usage().used
        await store(probe, block_of(0), nbytes)
        one = probe.usage().used - empty
        await store(probe, block_of(1), nbytes)
        two = probe.usage().used - empty - one
        await probe.close()
        made = await self.make(empty + one + (blocks - 1) * two + two // 2, tmp_path / "small")
        await made.start()
        return made

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

    # -- the budget ----------------------------------------------------------------------------------------------------

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

    # -- at the same time ----------------------------------------------------------------------------------------------

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
