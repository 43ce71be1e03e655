"""What is used in a circle, larger than the cache: whoever evicts the oldest first never finds anything again."""

from __future__ import annotations

import random

import pytest

from kvstore.eviction import make_policy
from kvstore.eviction.base import EvictionPolicy

LOOP, HELD, ROUNDS = 600, 420, 40


def hits_of_the_loop(policy: EvictionPolicy[int], others: int) -> float:
    """Share of the uses of a circle that hit in its second half of rounds, amid some blocks that are used at random."""
    rng, held, hits = random.Random(7), set[int](), 0
    for number in range(LOOP * ROUNDS):
        for item in (number % LOOP, *(LOOP + min(3999, int(rng.paretovariate(0.7))) for _ in range(others))):
            if item in held:
                policy.touch([item])
                hits += item < LOOP and number >= LOOP * ROUNDS // 2
            else:
                policy.insert(item, 1)
                held.add(item)
                if len(held) > HELD:
                    leaving = next(policy.victims())
                    policy.remove(leaving, evicted=True)
                    held.discard(leaving)
    return hits / (LOOP * ROUNDS // 2)


@pytest.mark.parametrize("others", [0, 1])
def test_a_part_of_a_circle_stays(others: int) -> None:
    assert hits_of_the_loop(make_policy("lru"), others) < 0.01
    assert hits_of_the_loop(make_policy("lhd"), others) > 0.3
