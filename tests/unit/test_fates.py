"""What `Fates` concludes from ended and open lives."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvstore.eviction.fates import Fates

AGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""Ages at which the buckets begin while few blocks are held, and with them their ends."""


def best(lives: list[tuple[int, bool]], at: int) -> float:
    """Most uses per room of the lives that reach a bucket, over all the times until which they could be kept."""
    found = []
    for end in range(at + 1, len(AGES)):
        hits = sum(used for bucket, used in lives if at <= bucket < end)
        stays = [(AGES[b] + AGES[b + 1]) / 2 if b < end else AGES[end] for b, _ in lives if b >= at]
        room = sum(stays) - AGES[at] * len(stays)
        found.append(hits / room)
    return max(found)


@pytest.mark.parametrize("seed", range(5))
def test_a_density_is_that_of_the_best_time_to_let_go(seed: int) -> None:
    rng = random.Random(seed)
    lives = [(int(rng.triangular(0, 14, rng.randrange(14))), rng.random() < 0.6) for _ in range(20_000)]
    fates = Fates(1)
    for bucket, used in lives:
        (fates.used if used else fates.faded)(0, AGES[bucket])
    fates.learn()
    for at in range(max(bucket for bucket, _ in lives)):
        assert fates.density(0, AGES[at]) == pytest.approx(best(lives, at), rel=0.02)


def test_a_long_idle_tail_makes_no_early_use_worth_less() -> None:
    """Half of the blocks are used at once, the others never: a fresh one is worth the uses of the first moment."""
    fates = Fates(1)
    for _ in range(1000):
        fates.used(0, 1)
        fates.faded(0, 190)
    fates.learn()
    assert fates.density(0, 1) == pytest.approx(0.5 / 0.75, rel=0.01)
    assert fates.density(0, 2) < 0.001


def test_blocks_that_come_back_late_are_waited_for() -> None:
    fates = Fates(2)
    for _ in range(1000):
        fates.used(0, 100)
        fates.faded(1, 100)
    fates.learn()
    assert fates.density(0, 0) == pytest.approx(1 / 112, rel=0.01)
    assert fates.density(0, 0) < fates.density(0, 50) < fates.density(0, 90)
    assert fates.density(1, 0) < 1e-5


def test_open_lives_count_as_far_as_they_got() -> None:
    """One use in ten lives that ended soon says little of a class where thousands of blocks wait unused."""
    groups, ages, weights = (np.full(5000, value, np.int64) for value in (0, 60, 1))
    alone, beside = Fates(1), Fates(1)
    for fates in (alone, beside):
        for _ in range(100):
            fates.used(0, 2)
    alone.learn()
    beside.learn((groups, ages, weights))
    assert beside.density(0, 0) < 0.05 * alone.density(0, 0)


def test_a_class_of_which_nothing_was_used_is_worth_the_same_at_all_ages() -> None:
    fates = Fates(2)
    for age in (10, 100, 190):
        for _ in range(1000):
            fates.faded(0, age)
            fates.used(1, age)
    fates.learn()
    assert (fates.proven[0], fates.proven[1]) == (False, True)
    assert len({fates.density(0, age) for age in AGES}) == 1


def test_a_few_uses_among_thousands_of_lives_prove_nothing() -> None:
    fates = Fates(1)
    for _ in range(20_000):
        fates.faded(0, 100)
    for count, proven in ((10, False), (40, True)):
        for _ in range(count):
            fates.used(0, 90)
        fates.learn()
        assert fates.proven[0] is proven


def test_a_class_goes_on_like_the_one_below_until_it_shows_otherwise() -> None:
    fates = Fates(4, below=2)
    for _ in range(1000):
        fates.used(0, 100)
        fates.faded(1, 100)
    fates.learn((np.full(500, 2, np.int64), np.full(500, 20, np.int64), np.ones(500, np.int64)))
    assert fates.density(2, 90) == pytest.approx(fates.density(0, 90), rel=0.05)
    for _ in range(1000):
        fates.faded(2, 150)
    fates.learn()
    assert fates.density(2, 90) < 0.05 * fates.density(0, 90)


def test_few_blocks_that_stayed_long_say_little_of_an_age_at_which_none_was_used() -> None:
    fates = Fates(1)
    for _ in range(1000):
        fates.used(0, 20)
    fates.faded(0, 180)
    fates.learn()
    assert fates.density(0, 180) < 0.001 * fates.density(0, 20)
