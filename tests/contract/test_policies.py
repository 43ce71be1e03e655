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

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="eviction"):
            make_policy("no-such-policy")
