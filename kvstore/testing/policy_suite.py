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
