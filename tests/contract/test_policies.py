"""Every eviction policy of the table passes the shipped suite."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.eviction import POLICIES, make_policy
from kvstore.eviction.base import EvictionPolicy
from kvstore.testing.policy_suite import PolicySuite


@pytest.fixture(params=sorted(POLICIES), autouse=True)
def name(request: pytest.FixtureRequest) -> None:
    request.instance.policy_name = request.param if request.instance is not None else None


class TestPolicies(PolicySuite):
    policy_name: str

    def make(self) -> EvictionPolicy[int]:
        return make_policy(self.policy_name)

    def test_the_name_is_that_of_the_table(self) -> None:
        assert self.make().name == self.policy_name

    def test_a_flood_of_prompts_used_once_does_not_wash_out_what_is_used(self) -> None:
        policy = self.make()
        hot = list(range(40))
        for item in hot:
            policy.insert(item, self.size, parent=item - 1 if item else None)
        held, hits = set(hot), 0
        for turn in range(400):
            present = [item for item in hot if item in held]
            hits += len(present)
            policy.touch(present)
            for item in hot:
                if item not in held:
                    policy.insert(item, self.size, parent=item - 1 if item - 1 in held else None)
                    held.add(item)
            for step in range(10):
                item = 1000 + turn * 10 + step
                policy.insert(item, self.size, parent=item - 1 if step else None)
                held.add(item)
            while len(held) > 100:
                leaving = next(policy.victims())
                policy.remove(leaving, evicted=True)
                held.remove(leaving)
        assert hits > 0.95 * 400 * len(hot)

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="eviction"):
            make_policy("no-such-policy")
