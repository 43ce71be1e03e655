"""After a flood of blocks none of which was used again: what is new may stay, and what comes back late is found."""

from __future__ import annotations

import pytest

from kvstore.eviction import make_policy
from kvstore.eviction.base import EvictionPolicy

ROOM, FLOOD = 1000, 3000


class Cache:
    """Items of one size under a policy; an item that is not held when it is used is stored."""

    def __init__(self, policy: EvictionPolicy[int], room: int = ROOM) -> None:
        self.policy, self.room = policy, room
        self.held: set[int] = set()

    def use(self, item: int, parent: int | None = None) -> bool:
        """Use an item; whether it was held."""
        if item in self.held:
            self.policy.touch([item])
            return True
        self.policy.insert(item, 1, parent=parent)
        self.held.add(item)
        if len(self.held) > self.room:
            leaving = next(self.policy.victims())
            self.policy.remove(leaving, evicted=True)
            self.held.discard(leaving)
        return False

    def prompts(self, first: int, blocks: int, length: int) -> int:
        """Use blocks of prompts of this length, none of which shares a block with another; how many were held."""
        return sum(self.use(i, i - 1 if (i - first) % length else None) for i in range(first, first + blocks))


@pytest.mark.parametrize("length", [1, 16])
@pytest.mark.parametrize("flood", [FLOOD, 10 * FLOOD])
@pytest.mark.parametrize("name", ["lru", "lhd"])
def test_a_working_set_that_comes_after_a_flood_stays(name: str, flood: int, length: int) -> None:
    cache = Cache(make_policy(name))
    cache.prompts(0, flood, length)
    cache.prompts(-32, 32, length)
    assert cache.held.issuperset(range(-32, 0))
    assert cache.prompts(-32, 32, length) == 32


@pytest.mark.parametrize("every", [2000, 100])
def test_it_stays_where_a_few_of_the_flood_come_back(every: int) -> None:
    """A flood of which one block in so many is used a second time soon after."""
    cache = Cache(make_policy("lhd"))
    for number in range(10 * FLOOD):
        cache.use(number)
        if number % every == 0 and number:
            cache.use(number - every // 2)
    cache.prompts(-32, 32, 1)
    assert cache.held.issuperset(range(-32, 0))


def test_old_blocks_take_a_bounded_part_of_the_room_from_new_ones() -> None:
    cache = Cache(make_policy("lhd"))
    cache.prompts(0, FLOOD, 10)
    cache.prompts(-ROOM, ROOM, 10)
    assert len(cache.held & set(range(-ROOM, 0))) >= 0.75 * ROOM


@pytest.mark.parametrize("length", [1, 10])
def test_a_circle_ten_times_the_room_is_found_after_a_flood(length: int) -> None:
    """Nobody remembers blocks for so long after they left: only some that stayed can show it."""
    cache = Cache(make_policy("lhd"))
    cache.prompts(-FLOOD, FLOOD, length)
    found = [cache.prompts(0, 10 * ROOM, length) for _ in range(6)]
    assert found[0] == 0
    assert found[-1] > 0.75 * ROOM, found


def test_a_circle_that_ended_makes_room_for_the_next() -> None:
    cache = Cache(make_policy("lhd"))
    for _ in range(8):
        cache.prompts(0, 3 * ROOM, 10)
    found = [cache.prompts(-ROOM * 9 // 10, ROOM * 9 // 10, 10) for _ in range(8)]
    assert found[-1] > 0.8 * ROOM, found


def test_explorers_keep_nothing_that_was_used_from_leaving() -> None:
    """Questions that nobody asks again, behind documents that were used a while ago: those leave all the same."""
    cache = Cache(make_policy("lhd"))
    for which in range(100):
        document = [1000 * which + i for i in range(8)]
        for question in range(3):
            for i, block in enumerate(document):
                cache.use(block, block - 1 if i else None)
            cache.use(1000 * which + 100 + question, document[-1])
    for number in range(FLOOD // 2):
        cache.use(10**6 + number)
    assert sum(item < 10**6 for item in cache.held) < 0.04 * ROOM


@pytest.mark.parametrize("room", [1, 4, 16, 64])
def test_a_small_tier_lets_the_oldest_go(room: int) -> None:
    """Whatever the hashes of its blocks are: nothing is explored among so few."""
    for start in range(0, 1 << 20, 1 << 15):
        cache = Cache(make_policy("lhd"), room)
        for item in range(start, start + 3 * room):
            cache.use(item)
            assert cache.held == set(range(max(start, item - room + 1), item + 1))
