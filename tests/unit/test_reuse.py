"""Sampled reuse distances against exact ones."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.obs.reuse import ByteSums, ReuseSampler

KIB = 1 << 10


def key(number: int) -> bytes:
    """A digest."""
    return hashlib.sha256(str(number).encode()).digest()


def distances(trace: list[tuple[int, int]]) -> list[int]:
    """The reuse distance of each access, by walking Mattson's stack; those of first accesses are left out."""
    stack: list[tuple[int, int]] = []
    found: list[int] = []
    for number, nbytes in trace:
        above = 0
        for i in range(len(stack) - 1, -1, -1):
            if stack[i][0] == number:
                found.append(above + nbytes)
                del stack[i]
                break
            above += stack[i][1]
        stack.append((number, nbytes))
    return found


def zipf(chance: random.Random, blocks: int, length: int, skew: float) -> Iterator[int]:
    """Numbers of blocks, small ones more often."""
    weights = [1 / (i + 1) ** skew for i in range(blocks)]
    yield from chance.choices(range(blocks), weights, k=length)


def sampled(trace: list[tuple[int, int]], every: int = 1, **how: int) -> ReuseSampler:
    """A sampler that was told of a trace, with a tick after so many blocks."""
    sampler = ReuseSampler(**how)
    for i, (number, nbytes) in enumerate(trace):
        sampler.note([(key(number), nbytes)])
        if i % every == every - 1:
            sampler.tick()
    sampler.tick()
    return sampler


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1000))), st.integers(0, 31))
def test_sums_after_a_place(added: list[tuple[int, int]], place: int):
    sums = ByteSums(32)
    for at, nbytes in added:
        sums.add(at, nbytes)
    assert sums.after(place) == sum(nbytes for at, nbytes in added if at > place)


@given(st.lists(st.integers(0, 1000), max_size=32), st.integers(0, 31), st.integers(0, 31))
def test_sums_filled_at_once_are_those_added_one_by_one(values: list[int], place: int, more: int):
    sums, added = ByteSums(32), ByteSums(32)
    sums.add(place, 7)  # is gone afterwards
    sums.fill(values)
    for at, nbytes in enumerate(values):
        added.add(at, nbytes)
    for each in (sums, added):
        each.add(more, 5)
    assert [sums.after(at) for at in range(32)] == [added.after(at) for at in range(32)]
    assert sums.total == added.total


def test_what_is_wanted_between_steps_is_counted_like_what_is_wanted_before():
    at_once, stepped = ReuseSampler(max_keys=128), ReuseSampler(max_keys=128)
    chance = random.Random(4)
    for _ in range(40):
        first, second = ([(key(chance.randrange(400)), KIB) for _ in range(100)] for _ in range(2))
        for blocks in (first, second):
            at_once.note(blocks)
            at_once.tick()
        stepped.note(first)
        steps = stepped.steps()
        next(steps, None)
        stepped.note(second)
        assert stepped.curve([0])[0] == pytest.approx(0, abs=0.05), "what is under way is not taken for hits"
        for _ in steps:
            pass
        stepped.tick()
    assert stepped.wanted == at_once.wanted
    assert stepped.share == at_once.share < 1
    assert stepped.reusable == pytest.approx(at_once.reusable)
    sizes = [KIB << shift for shift in range(12)]
    assert stepped.curve(sizes) == pytest.approx(at_once.curve(sizes))


def test_with_every_key_sampled_the_curve_is_that_of_an_exact_stack():
    chance = random.Random(1)
    trace = [(number, (1 + number % 3) * 64 * KIB) for number in zipf(chance, 300, 3000, 0.8)]
    exact = distances(trace)
    sampler = sampled(trace)
    assert sampler.share == 1
    distinct = sum((1 + number % 3) * 64 * KIB for number in {number for number, _ in trace})
    for part in (0.02, 0.1, 0.25, 0.5, 0.75, 1.0):
        size = int(part * distinct)
        assert sampler.curve([size])[0] == pytest.approx(sum(d <= size for d in exact) / len(trace), abs=0.02), part
    assert sampler.ceiling() == pytest.approx(1 - len({number for number, _ in trace}) / len(trace))
    assert sampler.reusable == pytest.approx(len(trace) - len({number for number, _ in trace}))


@pytest.mark.parametrize("skew", [0.0, 0.6, 1.0])
def test_a_sample_of_few_keys_comes_close(skew: float):
    chance = random.Random(2)
    trace = [(number, 256 * KIB) for number in zipf(chance, 1500, 6000, skew)]
    exact = distances(trace)
    sampler = sampled(trace, max_keys=256)
    assert len(sampler) <= 256
    assert sampler.share <= 0.25
    for part in (0.1, 0.3, 0.6):
        size = int(part * 1500 * 256 * KIB)
        assert sampler.curve([size])[0] == pytest.approx(sum(d <= size for d in exact) / len(trace), abs=0.08), part
    assert sampler.ceiling() == pytest.approx(1 - len({n for n, _ in trace}) / len(trace), abs=0.08)


def test_repeats_within_a_tick_are_hits_of_a_store_that_holds_the_tick():
    hot = [(number, KIB) for number in range(32)]
    sampler = ReuseSampler()
    for _ in range(100):
        for block in hot * 50:
            sampler.note([(key(block[0]), block[1])])
        sampler.tick()
    assert sampler.share == 1, "a few hot blocks do not lower the sample"
    assert sampler.curve([64 * KIB])[0] == pytest.approx(1 - 32 / 160_000, abs=1e-3)
    assert sampler.curve([KIB // 2])[0] == 0


def test_a_scan_is_never_reusable():
    sampler = sampled([(number, KIB) for number in range(10_000)], every=1024, max_keys=256)
    assert sampler.wanted == 10_000
    assert sampler.reusable == 0
    assert sampler.ceiling() < 0.15, "what the sample misses is taken for hot blocks"
    assert len(sampler) <= 256


def test_nothing_wanted_is_no_hit_rate():
    assert ReuseSampler().curve([0, KIB]) == [0.0, 0.0]
    assert ReuseSampler().ceiling() == 0


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 100)), max_size=30), max_size=30))
def test_the_curve_rises_and_memory_stays_bounded(ticks: list[list[tuple[int, int]]]):
    sampler = ReuseSampler(max_keys=8, max_a_tick=8)
    for blocks in ticks:
        sampler.note([(key(number), nbytes) for number, nbytes in blocks])
        sampler.tick()
        assert len(sampler) <= 8
    rates = sampler.curve([0, 1, 10, 100, 1000, 10_000, 1 << 40])
    assert rates == sorted(rates)
    assert all(0 <= rate <= 1 for rate in rates)


def test_the_cost_of_a_block_is_small():
    blocks = [(key(number), 4 * KIB) for number in range(32)]
    sampler = ReuseSampler()
    began = time.process_time()
    for _ in range(2000):
        sampler.note(blocks)
    noted = time.process_time() - began
    assert noted / 64_000 < 5e-6, "a fraction of a microsecond on an idle machine"
