"""The contract of `EvictionPolicy` as tests. A policy's test file subclasses `PolicySuite` and says how to make one.

class TestLRU(PolicySuite):
    def make(self) -> EvictionPolicy[int]:
        return LRU()
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod

from kvstore.eviction.base import EvictionPolicy


class PolicySuite(ABC):
    """What every policy must do, whatever its order."""

    size = 4096

    @abstractmethod
    def make(self) -> EvictionPolicy[int]:
        """An empty policy."""

    def test_an_empty_policy_has_no_victims(self) -> None:
        policy = self.make()
        assert len(policy) == 0
        assert list(policy.victims()) == []

    def test_each_item_is_a_victim_exactly_once(self) -> None:
        policy = self.make()
        for item in range(100):
            policy.insert(item, self.size)
        policy.touch([3, 4, 5])
        policy.touch([5, 50])
        assert len(policy) == 100
        assert sorted(policy.victims()) == list(range(100))

    def test_reading_victims_changes_nothing(self) -> None:
        policy = self.make()
        for item in range(50):
            policy.insert(item, self.size)
        policy.touch([7, 8])
        first = list(policy.victims())
        next(policy.victims())
        assert list(policy.victims()) == first

    def test_a_removed_item_is_no_victim(self) -> None:
        policy = self.make()
        for item in range(20):
            policy.insert(item, self.size)
        policy.touch([2])
        for item in (0, 2, 19):
            policy.remove(item)
        assert len(policy) == 17
        assert sorted(policy.victims()) == [i for i in range(20) if i not in (0, 2, 19)]

    def test_a_removed_item_may_come_back(self) -> None:
        policy = self.make()
        policy.insert(1, self.size)
        policy.remove(1)
        policy.insert(1, self.size)
        assert list(policy.victims()) == [1]

    def test_the_tail_of_a_prompt_leaves_before_its_head(self) -> None:
        policy = self.make()
        prompt = list(range(10))
        for item in prompt:
            policy.insert(item, self.size)
        for _ in range(3):
            policy.touch(prompt)
        assert list(policy.victims()) == prompt[::-1]

    def test_what_is_used_all_the_time_outlives_what_is_never_used(self) -> None:
        policy = self.make()
        for item in range(64):
            policy.insert(item, self.size)
            for _ in range(4):
                policy.touch([0])
        victims = list(policy.victims())
        assert victims.index(0) >= len(victims) // 2

    def test_touching_nothing_and_touching_twice(self) -> None:
        policy = self.make()
        policy.insert(1, self.size)
        policy.touch([])
        policy.touch([1, 1])
        assert list(policy.victims()) == [1]

    def test_no_block_leaves_before_those_behind_it(self) -> None:
        """Random trees of prompts, used and evicted at random: what is left is always closed toward the heads."""
        policy, rng = self.make(), random.Random(2)
        parents: dict[int, int | None] = {}
        held: set[int] = set()
        for number in range(3000):
            parent = rng.choice([None, *sorted(held)[-20:]]) if held else None
            parents[number] = parent
            policy.insert(number, self.size, parent=parent)
            held.add(number)
            if rng.random() < 0.5:
                chain = [rng.choice(sorted(held)[:40])]
                while (before := parents[chain[0]]) is not None:
                    chain.insert(0, before)
                policy.touch(chain)
            while len(held) > 60:
                victims = policy.victims()
                for item in [next(victims) for _ in range(rng.randrange(1, 4))]:
                    assert all(parents[other] != item for other in held), "a block behind it is still held"
                    policy.remove(item, evicted=True)
                    held.remove(item)
        order = list(policy.victims())
        assert sorted(order) == sorted(held)
        at: dict[int | None, int] = {item: place for place, item in enumerate(order)}
        assert all(at[item] < at[parents[item]] for item in held if parents[item] in at)

    def test_a_dropped_parent_holds_nothing_back(self) -> None:
        policy = self.make()
        policy.insert(1, self.size)
        policy.insert(2, self.size, parent=1)
        policy.remove(1)
        policy.insert(3, self.size, parent=2)
        policy.insert(1, self.size)
        assert sorted(policy.victims()) == [1, 2, 3]
        assert list(policy.victims()).index(3) < list(policy.victims()).index(2)

    def test_blocks_that_name_each_other_or_themselves_as_parents_can_leave(self) -> None:
        """Parents are what clients and servers say: nothing that they say may keep memory for ever."""
        policy = self.make()
        for item, parent in ((1, 2), (2, 1), (3, 3), (4, 6), (5, 4), (6, 5), (7, 6), (9, 8), (8, 8)):
            policy.insert(item, self.size, parent=parent)
        policy.touch([1, 2, 3])
        assert sorted(policy.victims()) == list(range(1, 10))
        left = []
        while policy:
            left.append(next(policy.victims()))
            policy.remove(left[-1], evicted=True)
        assert sorted(left) == list(range(1, 10))

    def test_what_left_may_come_back_again_and_again(self) -> None:
        policy, held = self.make(), list[int]()
        for turn in range(2000):
            item = turn * 7 % 97
            if item in held:
                policy.touch([item])
                continue
            policy.insert(item, self.size)
            held.append(item)
            if len(held) > 30:
                leaving = next(policy.victims())
                policy.remove(leaving, evicted=True)
                held.remove(leaving)
        assert sorted(policy.victims()) == sorted(held)

    def test_random_use_keeps_the_items_exact(self) -> None:
        policy, model, rng = self.make(), set[int](), random.Random(1)
        for _ in range(5000):
            item = rng.randrange(200)
            action = rng.random()
            if item not in model:
                policy.insert(item, rng.randrange(1, 1 << 20))
                model.add(item)
            elif action < 0.6:
                policy.touch([i for i in range(item, item + 4) if i in model])
            elif action < 0.8:
                policy.remove(item)
                model.discard(item)
            else:
                victims = policy.victims()
                leaving = [next(victims) for _ in range(min(3, len(model)))]
                for each in leaving:
                    policy.remove(each)
                    model.discard(each)
            assert len(policy) == len(model)
        assert sorted(policy.victims()) == sorted(model)

    def test_what_is_held_is_still_a_victim_once_whatever_happens_to_it(self) -> None:
        policy, rng = self.make(), random.Random(3)
        parents: dict[int, int | None] = {}
        kept: set[int] = set()
        for number in range(3000):
            item = number % 150
            if item in parents:
                policy.remove(item, evicted=rng.random() < 0.5)
                del parents[item]
                kept.discard(item)
            parents[item] = rng.choice([None, *sorted(parents)[-5:]])
            policy.insert(item, self.size, parent=parents[item])
            for _ in range(2):
                some = rng.randrange(160)  # perhaps one that is not there
                act, change = (policy.release, kept.discard) if some in kept else (policy.hold, kept.add)
                act(some)
                if some in parents:
                    change(some)
            policy.touch([each for each in {rng.randrange(150), rng.randrange(150)} if each in parents])
            assert len(policy) == len(parents)
            if not number % 20:
                assert sorted(policy.victims()) == sorted(parents)
        for item in kept:
            policy.release(item)
        order = list(policy.victims())
        assert sorted(order) == sorted(parents)
