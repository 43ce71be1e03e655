"""The circuit breaker around a disk that fails or hangs."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from disks import file_of, until

from kvstore.testing.faults import FaultyFiles, GatedFiles
from kvstore.testing.tier_kit import MIB, block_of, load, pages, store
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.wrappers import Breaker
from kvstore.types import Dropped, DropReason, Miss, MissReason, Stored


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_the_breaker_opens_after_failures_and_closes_after_a_trial(tmp_path: Path) -> None:
    files, clock = FaultyFiles(), Clock()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), failures=3, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 10_000)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    files.arm(1, errno.EIO, only=["open_block", "create_tmp"], lasting=True)
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
    assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.IO_ERROR)
    assert tier.size(block_of(1)) == 10_000, "two failures are not three"
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)

    state = tier.describe_state()["breaker"]
    assert (state["state"], state["failures"]) == ("open", 3)
    assert "tier_down" in state["reason"]
    calls = len(files.calls)
    assert tier.size(block_of(1)) is None
    assert not tier.contains(*block_of(1))
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
    assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.TIER_DOWN)
    assert len(files.calls) == calls, "the tier was not asked"

    opened_for = []
    for _ in range(9):  # still failing: longer and longer
        waited = 0.0
        while not tier.contains(*block_of(1)):
            clock.now += 0.25
            waited += 0.25
        assert tier.describe_state()["breaker"]["state"] == "half_open"
        opened_for.append(waited)
        assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
        assert not tier.contains(*block_of(1))
    assert opened_for == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    files.arm()
    clock.now += 60
    assert await load(tier, block_of(1), 10_000)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    assert tier.describe_state()["breaker"]["failures"] == 0
    assert await store(tier, block_of(2), 10_000) == Stored()
    await tier.close()


async def test_misses_and_full_tiers_do_not_open_the_breaker(tmp_path: Path) -> None:
    tier = Breaker(DiskTier(tmp_path / "t", 100_000), failures=1)
    await tier.start()
    for _ in range(5):
        assert not await load(tier, block_of(1), 100)
        assert await store(tier, block_of(1), 10 * MIB) == Dropped(DropReason.TOO_LARGE)
    await store(tier, block_of(2), 100)
    file_of(tmp_path / "t", block_of(2)).write_bytes(bytes(8192))
    assert await tier.get(block_of(2), pages(100)) == Miss(MissReason.CORRUPT)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_a_success_between_failures_starts_the_count_anew(tmp_path: Path) -> None:
    files = FaultyFiles()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), failures=2)
    await tier.start()
    await store(tier, block_of(1), 100)
    for _ in range(4):
        files.arm(1, errno.EIO, only=["open_block"])
        assert not await load(tier, block_of(1), 100)
        assert await load(tier, block_of(1), 100)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_a_hung_disk_opens_the_breaker_for_everybody_else(tmp_path: Path) -> None:
    files, clock = GatedFiles(), Clock()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), deadline_s=10, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 100)
    files._names = frozenset(["read"])
    hung = asyncio.ensure_future(load(tier, block_of(1), 100))
    await until(files.arrived.is_set)
    clock.now += 9
    assert tier.contains(*block_of(1))
    clock.now += 2
    assert not tier.contains(*block_of(1))
    assert await store(tier, block_of(2), 100) == Dropped(DropReason.TIER_DOWN)
    assert "has not ended" in tier.describe_state()["breaker"]["reason"]
    assert not hung.done()
    files.gate.set()
    assert await hung, "it ends well, if late"
    assert not tier.contains(*block_of(1)), "which proves nothing yet"
    clock.now += 1
    assert await load(tier, block_of(1), 100)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_only_one_call_is_let_through_on_trial(tmp_path: Path) -> None:
    files, clock = GatedFiles(), Clock()
    inner = DiskTier(tmp_path / "t", 16 * MIB, files=files)
    tier = Breaker(inner, failures=1, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 100)
    tier._failed("on purpose", trial=False)
    clock.now += 5
    files._names = frozenset(["read"])
    trial = asyncio.ensure_future(load(tier, block_of(1), 100))
    await until(files.arrived.is_set)
    assert not tier.contains(*block_of(1))
    assert await tier.get(block_of(1), pages(100)) == Miss(MissReason.TIER_DOWN)
    trial.cancel()
    files.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await trial
    assert await load(tier, block_of(1), 100), "a cancelled trial gives no verdict; the next call is the trial"
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()
