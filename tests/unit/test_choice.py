"""Load or recompute: the split that brings the first token earliest, from what was measured."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.types import TierCode
from kvstore_connectors.choice import (
    KNOWN_TOKENS,
    MARGIN,
    SAME,
    SLOW_S,
    Blend,
    Blending,
    Choice,
    Loads,
    Prefill,
    choose,
)

HOST, DISK, REDIS = TierCode.HOST, TierCode.DISK, TierCode.REDIS
BLOCK, CHUNK, BLOCK_BYTES = 256, 2048, 4 << 20

times = st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=60)


def seconds(step_s: float, token_s: float, pair_s: float, start: int, end: int) -> float:
    """What computing a prompt from `start` to `end` takes, in steps of `CHUNK` tokens."""
    took, at = 0.0, start
    while at < end:
        count = min(CHUNK, end - at)
        took += step_s + token_s * count + pair_s * count * (at + count / 2)
        at += count
    return took


# -- what computing costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [(0.004, 1e-4, 0.0), (0.002, 2e-5, 1e-9), (0.02, 1e-3, 5e-8)])
def test_the_cost_of_computing_is_learned_from_steps(truth: tuple[float, float, float]) -> None:
    rng, prefill = random.Random(1), Prefill(CHUNK)
    assert not prefill.known
    for _ in range(200):
        start, count = rng.randrange(0, 30_000), rng.randrange(16, CHUNK + 1)
        step_s, token_s, pair_s = truth
        exact = step_s + token_s * count + pair_s * count * (start + count / 2)
        prefill.learn([(start, count)], exact * rng.uniform(0.95, 1.05))
    assert prefill.known
    starts = np.array([0, 4096, 15_000])
    found = prefill.seconds(starts, 16_384)
    assert found == pytest.approx([seconds(*truth, int(start), 16_384) for start in starts], rel=0.06)


def test_a_step_that_took_too_long_for_other_reasons_counts_little() -> None:
    prefill = Prefill(CHUNK)
    for number in range(100):
        prefill.learn([(0, 1000)], 5.0 if number % 25 == 24 else 0.1)
    assert prefill.seconds(np.array([0]), 1000)[0] == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("truth", [(0.1, 0.0), (0.06, 3e-6), (0.01, 2e-4)])
def test_the_cost_of_blending_is_learned_from_prompts_of_all_sizes(truth: tuple[float, float]) -> None:
    rng, blending = random.Random(2), Blending()
    prompt_s, token_s = truth
    blending.learn(Blend(0, 1000, 150), 0.0, 9.0)
    assert not blending.known, "the first compiles"
    for _ in range(40):
        tokens = rng.choice((500, 2000, 8000, 32_000))
        computing_s = 2e-6 * tokens
        blending.learn(Blend(64, 64 + tokens, 0.15 * tokens), computing_s,
                       (computing_s + prompt_s + token_s * tokens) * rng.uniform(0.95, 1.05))  # fmt: skip
    for tokens in (500, 4000, 32_000):
        found = blending.seconds(Blend(0, tokens, 0.15 * tokens), 2e-6 * tokens)
        assert found == pytest.approx(2e-6 * tokens + prompt_s + token_s * tokens, rel=0.15)


def test_nothing_is_known_before_some_tokens_were_computed() -> None:
    prefill = Prefill(CHUNK)
    prefill.learn([(0, KNOWN_TOKENS - 1)], 0.1)
    prefill.learn([(0, 0)], 0.1)
    assert not prefill.known
    prefill.learn([(0, 1)], 0.1)
    assert prefill.known


# -- what loading costs ------------------------------------------------------------------------------------------------


def test_a_lower_tier_costs_what_the_daemon_says_beside_the_copy() -> None:
    loads = Loads()
    for count in (1, 8, 32, 2, 16) * 4:
        loads.learn([HOST] * count, 0.0, 0.002 + 0.001 * count)
    memory = loads.seconds([HOST] * 4, {}, BLOCK_BYTES)
    assert memory == pytest.approx([0.0, 0.003, 0.004, 0.005, 0.006], rel=0.05)
    speeds = {DISK: (0.1, 0.01, 1e-9)}
    below = loads.seconds([HOST, DISK, DISK], speeds, BLOCK_BYTES)
    each = 0.01 + 1e-9 * BLOCK_BYTES
    assert below == pytest.approx([0.0, 0.003, 0.004 + 0.1 + each, 0.005 + 0.1 + 2 * each], rel=0.05)


def test_a_forecast_that_is_always_off_is_corrected() -> None:
    loads, speeds = Loads(), {DISK: (0.0, 0.01, 0.0)}
    for _ in range(30):
        forecast = loads.seconds([DISK] * 10, speeds, BLOCK_BYTES)[-1]
        loads.learn([DISK] * 10, float(forecast), 0.2)  # twice as slow as the daemon says
    assert loads.seconds([DISK] * 10, speeds, BLOCK_BYTES)[-1] == pytest.approx(0.2, rel=0.05)


# -- the choice --------------------------------------------------------------------------------------------------------


@given(times, times, st.floats(0, 0.5))
def test_the_split_is_the_best_there_is_and_never_much_worse_than_computing(
    each_load: list[float], each_compute: list[float], rest_s: float
) -> None:
    count = min(len(each_load), len(each_compute))
    load_s = np.concatenate([[0.0], np.cumsum(each_load[:count])])
    compute_s = rest_s + np.concatenate([np.cumsum(each_compute[:count][::-1])[::-1], [0.0]])
    choice = choose(load_s, compute_s, measured=True)
    total = load_s + compute_s
    assert 0 <= choice.blocks <= choice.matched == count
    assert total[choice.blocks] <= total[0]
    best = total.min()
    if best <= total[0] * (1 - MARGIN) / (1 + SAME):
        assert total[choice.blocks] <= best * (1 + SAME) * (1 + 1e-9)
        assert choice.deadline_s == 0
        assert choice.saves_s == pytest.approx([compute_s[i] - compute_s[choice.blocks] for i in range(choice.blocks)])
    if not choice.blocks:
        assert choice.load_s == 0.0
        assert choice.total_s == pytest.approx(total[0])


def test_fast_loads_are_taken_whole_and_slow_ones_not_at_all() -> None:
    compute = np.arange(10, -1, -1) * 0.1
    assert choose(np.arange(11) * 0.001, compute, measured=True).blocks == 10
    assert choose(np.arange(11) * 0.2, compute, measured=True).blocks == 0


def test_where_the_tail_is_on_a_slow_tier_only_the_head_is_loaded() -> None:
    load = np.concatenate([[0.0], np.cumsum([0.001] * 6 + [0.5] * 4)])
    choice = choose(load, np.arange(10, -1, -1) * 0.1, measured=True)
    assert choice.blocks == 6
    assert choice.other_s == pytest.approx(1.0)


def test_while_the_engine_is_unknown_a_part_of_a_long_load_is_computed() -> None:
    assert choose(np.arange(9) * 1e-3, None, measured=True).blocks == 8
    slow = choose(np.arange(9) * SLOW_S, None, measured=True)
    assert (slow.blocks, slow.matched) == (6, 8)


def test_an_unmeasured_tier_is_loaded_from_as_long_as_that_pays() -> None:
    choice = choose(np.zeros(9), np.arange(8, -1, -1) * 0.1, measured=False)
    assert choice.blocks == 8
    assert choice.deadline_s == 0
    assert choice.saves_s == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


# -- all of it, against a simulated engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("disk_mb_s", [20, 50, 200, 1000, 8000])
@pytest.mark.parametrize("tokens_s", [500, 5_000, 50_000])
def test_no_request_is_later_than_computing_once_speeds_are_known(disk_mb_s: int, tokens_s: int) -> None:
    """Prompts of any length, with noise: the mean first token never later than computing, and near the best split."""
    rng = random.Random(disk_mb_s * tokens_s)
    prefill, loads = Prefill(CHUNK), Loads()
    truth = (0.003, 1 / tokens_s, 1 / tokens_s / 60_000)
    spent = computing = best = 0.0
    for number in range(120):
        matched = rng.randrange(1, 40)
        prompt = matched * BLOCK + rng.randrange(1, BLOCK)
        tiers = [DISK] * matched
        speeds = {} if number == 0 else {DISK: (0.0, 0.0005, 1e-6 / disk_mb_s)}
        load_s = loads.seconds(tiers, speeds, BLOCK_BYTES)
        compute_s = None
        if prefill.known:
            compute_s = prefill.seconds(np.arange(matched + 1) * BLOCK, prompt)
        choice: Choice = choose(load_s, compute_s, measured=number > 0)
        true_load = [0.0] + [0.001 + n * (0.0005 + BLOCK_BYTES * 1e-6 / disk_mb_s) for n in range(1, matched + 1)]
        true_compute = [seconds(*truth, n * BLOCK, prompt) for n in range(matched + 1)]
        took = true_load[choice.blocks] * rng.uniform(0.97, 1.1)
        if choice.deadline_s and took > choice.deadline_s:  # given up: what had come by then is kept
            came = sum(t <= choice.deadline_s for t in true_load[1:])
            took, blocks = choice.deadline_s, came
        else:
            blocks = choice.blocks
            loads.learn(tiers[:blocks], choice.load_s or 0.0, took)
        rest = true_compute[blocks] * rng.uniform(0.98, 1.02)
        prefill.learn([(blocks * BLOCK, prompt - blocks * BLOCK)], rest)
        if number >= 10:
            spent += took + rest
            computing += true_compute[0]
            best += min(load + compute for load, compute in zip(true_load, true_compute, strict=True))
    assert spent <= 1.05 * computing
    assert spent <= 1.15 * best
