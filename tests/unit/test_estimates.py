"""Moving estimates: what the daemon says of its tiers is what their reads took."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kvstore.chain import TierChain
from kvstore.estimates import TierEstimate
from kvstore.eviction import make_policy
from kvstore.fit import MovingFit
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.throttle import Pace, Throttled
from kvstore.types import BlockHeader, BlockId, Scope, Stored, TierCode

MIB = 1 << 20
SCOPE = Scope("uid1", b"n" * 32)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read(estimate: TierEstimate, clock: Clock, nbytes: int, seconds: float) -> None:
    estimate.begun()
    clock.now += seconds
    estimate.ended(nbytes)


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_fit_finds_the_parts() -> None:
    fit, rng = MovingFit(3, main=1, decay=0.99), random.Random(1)
    for _ in range(200):
        tokens, place = rng.randint(1, 512), rng.randint(0, 8192)
        cost = 0.01 + 1e-3 * tokens + 1e-7 * tokens * place
        fit.add((1, tokens, tokens * place), cost * rng.uniform(0.97, 1.03))
    assert fit((1, 512, 512 * 4096)) == pytest.approx(0.01 + 0.512 + 0.2097, rel=0.03)
    assert fit((1, 8, 0)) == pytest.approx(0.018, rel=0.5)


def test_fit_of_equal_sizes_blames_the_main_part() -> None:
    fit = MovingFit(2, main=1, decay=0.9)
    for _ in range(5):
        fit.add((1, 4 * MIB), 0.1)
    fixed, per_byte = fit.coefficients
    assert fixed < 0.001
    assert per_byte * 8 * MIB == pytest.approx(0.2, rel=0.01)


def test_fit_has_no_negative_part_and_forgets() -> None:
    fit = MovingFit(2, main=1, decay=0.5)
    fit.add((1, 10), 1.0)
    fit.add((1, 20), 4.0)  # the straight line through both begins below zero
    assert all(c >= 0 for c in fit.coefficients)
    for _ in range(20):
        fit.add((1, 10), 0.5)
    assert fit((1, 10)) == pytest.approx(0.5, rel=0.01)
    assert MovingFit(2, main=0, decay=0.5).coefficients == (0, 0)


# -- a tier ------------------------------------------------------------------------------------------------------------


def test_a_tier_that_was_never_read_says_nothing() -> None:
    estimate = TierEstimate()
    assert estimate.speed() is None
    estimate.begun()
    estimate.ended(0)
    assert estimate.speed() is None


def test_a_tier_that_has_become_slow_or_fast_is_believed_at_once_and_once_slow_is_a_hiccup() -> None:
    clock = Clock()
    estimate = TierEstimate(clock=clock)

    def block_s() -> float:
        speed = estimate.speed()
        assert speed is not None
        return speed.block_s + speed.byte_s * MIB

    for _ in range(20):
        read(estimate, clock, MIB, 0.02)
    read(estimate, clock, MIB, 0.13)
    assert 0.09 < block_s() < 0.13
    for _ in range(3):
        read(estimate, clock, MIB, 0.02)
    assert block_s() < 0.035, "once is a hiccup"
    for _ in range(20):
        read(estimate, clock, MIB, 0.13)
    read(estimate, clock, MIB, 0.02)
    assert block_s() == pytest.approx(0.02, rel=0.01)


def test_a_read_that_ended_beside_others_does_not_make_a_tier_fast() -> None:
    """Of reads side by side one may end right behind another: that says nothing of how long one takes."""
    clock = Clock()
    estimate = TierEstimate(clock=clock)
    for _ in range(20):
        read(estimate, clock, MIB, 0.1)
    for _ in range(3):
        estimate.begun()
    for wait_s in (0.1, 0.1, 0.001):
        clock.now += wait_s
        estimate.ended(MIB)
    speed = estimate.speed()
    assert speed is not None
    assert speed.block_s + MIB * speed.byte_s > 0.07


def test_reads_one_by_one() -> None:
    clock = Clock()
    estimate = TierEstimate(clock=clock)
    for _ in range(5):
        read(estimate, clock, MIB, 0.05)
        clock.now += 3.0  # idle time is nobody's
    speed = estimate.speed()
    assert speed is not None
    assert speed.wait_s == 0
    assert speed.block_s + MIB * speed.byte_s == pytest.approx(0.05, rel=0.01)


def test_reads_side_by_side_cost_what_one_more_costs() -> None:
    clock = Clock()
    estimate = TierEstimate(clock=clock)
    for _ in range(10):
        for _ in range(8):
            estimate.begun()
        clock.now += 0.4
        for _ in range(8):
            estimate.ended(MIB)
    speed = estimate.speed()
    assert speed is not None
    assert speed.block_s + MIB * speed.byte_s == pytest.approx(0.05, rel=0.02)


def test_queue_and_standstill_are_waited_for() -> None:
    clock = Clock()
    estimate = TierEstimate(clock=clock)
    read(estimate, clock, MIB, 0.1)
    for _ in range(4):
        estimate.queued(MIB)
    queued = estimate.speed()
    assert queued is not None
    assert queued.wait_s == pytest.approx(0.4, rel=0.01)
    estimate.begun()
    clock.now += 5.0
    hung = estimate.speed()
    assert hung is not None
    assert hung.wait_s > 5.0
    estimate.ended(0)
    for _ in range(4):
        estimate.left(MIB)
    idle = estimate.speed()
    assert idle is not None
    assert idle.wait_s == 0


def test_reads_side_by_side_are_not_late_before_all_of_them_could_have_come() -> None:
    clock = Clock()
    estimate = TierEstimate(clock=clock)
    read(estimate, clock, MIB, 0.1)
    for _ in range(4):
        estimate.queued(MIB)
        estimate.begun()
    clock.now += 0.4
    speed = estimate.speed()
    assert speed is not None
    assert speed.block_s + MIB * speed.byte_s == pytest.approx(0.1, rel=0.01)
    clock.now += 0.4
    speed = estimate.speed()
    assert speed is not None
    assert speed.block_s + MIB * speed.byte_s == pytest.approx(0.2, rel=0.01)
    assert speed.wait_s == pytest.approx(0.8, rel=0.01)


@pytest.mark.parametrize("measured", [True, False])
def test_what_a_tier_tells_of_a_block_under_way_is_believed_if_that_is_slower(measured: bool) -> None:
    clock = Clock()
    told: list[float | None] = [None]
    estimate = TierEstimate(lambda: told[-1], clock)
    if measured:
        read(estimate, clock, MIB, 0.1)
    told.append(0.5)
    idle = estimate.speed()
    assert idle is None or idle.byte_s * MIB == pytest.approx(0.1, rel=0.01), "nothing is read"
    for _ in range(2):
        estimate.queued(MIB)
    estimate.begun()
    clock.now += 0.01
    slow = estimate.speed()
    assert slow is not None
    assert slow.block_s + MIB * slow.byte_s == pytest.approx(0.5, rel=0.01)
    assert slow.wait_s == pytest.approx(1.0, rel=0.01)
    told.append(0.05)
    fast = estimate.speed()
    assert fast is not None
    assert fast.block_s + MIB * fast.byte_s == pytest.approx(0.1 if measured else 0.05, rel=0.01)


# -- bounding a tier ---------------------------------------------------------------------------------------------------


async def test_pace_serves_reads_first_and_keeps_the_rate() -> None:
    pace, order = Pace(100 * MIB), []
    loop = asyncio.get_running_loop()

    async def take(name: str, urgent: bool) -> None:
        await pace.take(2 * MIB, urgent=urgent)
        order.append(name)

    began = loop.time()
    writes = [asyncio.ensure_future(take(f"w{i}", False)) for i in range(3)]
    await asyncio.sleep(0)
    reads = [asyncio.ensure_future(take(f"r{i}", True)) for i in range(2)]
    await asyncio.sleep(0)
    writes[2].cancel()
    await asyncio.gather(*writes, *reads, return_exceptions=True)
    assert order == ["w0", "r0", "r1", "w1"]  # what has begun is finished; who gave up takes no time
    assert loop.time() - began >= 4 * 0.02 - 0.005


async def test_a_transfer_under_way_tells_how_long_it_takes() -> None:
    pace = Pace(10 * MIB)
    assert pace.seconds() is None
    transfer = asyncio.ensure_future(pace.take(2 * MIB, urgent=True))
    await asyncio.sleep(0)
    at_once = pace.seconds()
    assert at_once is not None
    assert at_once < 0.1, "that none has come yet says nothing"
    await asyncio.sleep(0.1)
    assert pace.seconds() == pytest.approx(0.2)
    await transfer
    assert pace.seconds() is None


async def test_a_throttled_disk_that_has_become_slow_is_known_for_it_before_a_block_has_come(tmp_path: Path) -> None:
    chain, names = await chain_over_disk(tmp_path, 50 * MIB, 3)
    disk = chain.below[0]
    assert isinstance(disk, Throttled)
    try:
        done = asyncio.Event()
        chain.promote(names[0], lambda *_: done.set())
        await done.wait()
        disk._pace.bytes_per_s = 2 * MIB
        for name in names[1:]:
            chain.promote(name, lambda *_: None)
        await asyncio.sleep(0.1)
        speed = chain.speeds(bytes([TierCode.DISK]))[TierCode.DISK]
        assert speed[0] > 0.5
        assert speed[1] + MIB * speed[2] > 0.25
        disk._pace.bytes_per_s = 500 * MIB
    finally:
        await chain.close()


async def chain_over_disk(folder: Path, rate: float, blocks: int) -> tuple[TierChain, list[BlockId]]:
    disk = DiskTier(folder, 256 * MIB)
    await disk.start()
    names = [BlockId(SCOPE, bytes([i]) * 32) for i in range(blocks)]
    for name in names:
        data = memoryview(bytearray(MIB))
        assert await disk.put(name, BlockHeader(), [data], MIB) == Stored()
    host = HostTier(64 * MIB, make_policy("lru"), slab_bytes=16 * MIB, ahead_bytes=0)
    return TierChain(host, [Throttled(disk, rate)], parallel=4), names


async def test_chain_measures_a_throttled_disk(tmp_path: Path) -> None:
    chain, names = await chain_over_disk(tmp_path, 50 * MIB, 12)
    try:
        codes = chain.locate(SCOPE, [name.key for name in names], True)
        assert chain.speeds(codes) == {}
        done = asyncio.Event()
        left = len(names)

        def arrived(*_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        for name in names:
            chain.promote(name, arrived)
        await asyncio.sleep(0.1)
        waiting = chain.speeds(codes)[TierCode.DISK]
        assert 0.05 < waiting.wait_s < 1.0
        await done.wait()
        speed = chain.speeds(codes)[TierCode.DISK]
        assert speed.wait_s == 0
        assert speed.block_s + MIB * speed.byte_s == pytest.approx(0.02, rel=0.4)
        assert chain.speeds(bytes([TierCode.HOST])) == {}
    finally:
        await chain.close()


async def test_what_nobody_waits_for_is_not_read(tmp_path: Path) -> None:
    chain, names = await chain_over_disk(tmp_path, 20 * MIB, 12)
    try:
        wanted = True
        told: list[object] = []
        for name in names:
            chain.promote(name, lambda found, _: told.append(found), lambda: wanted)
        await asyncio.sleep(0.02)
        wanted = False
        async with asyncio.timeout(5):
            while len(told) < len(names):
                await asyncio.sleep(0.01)
        assert chain.below[0].counters.hits <= 4  # those that had begun
        codes = bytes([TierCode.DISK])
        assert chain.speeds(codes)[TierCode.DISK].wait_s == 0
    finally:
        await chain.close()
