"""Fixtures of unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from houses import House, Houses

from kvstore.tiers.base import Tier


@pytest.fixture
async def houses() -> AsyncIterator[Houses]:
    """Makes small stores, and looks at the end whether all was given back."""
    made: list[House] = []

    def make(*below: Tier, **how: Any) -> House:
        made.append(House(*below, **how))
        return made[-1]

    yield make
    for house in made:
        await house.settle()
        house.host.check()
        assert house.host.dirty_bytes == house.host.leased_bytes == 0
        assert house.chain._arrivals == {}
        assert house.chain._forgotten == set()
        await house.chain.close()
