"""The contract of `Tier` as tests. A tier's test file subclasses `TierSuite` and says how to make one.

    class TestMyTier(TierSuite):
        persistent = True

        async def make(self, capacity: int, place: Path) -> Tier:
            return MyTier(place, capacity)

        async def damage(self, tier: Tier, block: BlockId) -> None:
            ...  # flip a stored byte, past the tier

Its parts are files of their own: contents, budget, crowd, life. Payloads are a pure function of the block's identity,
so that a wrong byte is seen without any bookkeeping.
"""

from __future__ import annotations

from kvstore.testing.tier_budget import Budget
from kvstore.testing.tier_contents import Contents
from kvstore.testing.tier_crowd import Crowd
from kvstore.testing.tier_life import Life


class TierSuite(Contents, Budget, Crowd, Life):
    """What every tier must do."""
