"""The Redis tier over a real Valkey passes the shipped suite, in the clear and sealed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis as blocking_redis

from kvstore.remote.index import Names, member_of
from kvstore.testing.tier_suite import TierSuite
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.base import Tier
from kvstore.tiers.redis import RedisTier
from kvstore.types import BlockId

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    place = tmp_path_factory.mktemp("valkey")
    with ValkeyServer(place, "--appendonly", "yes", "--appendfsync", "always") as running:
        yield running


class TestRedisTier(TierSuite):
    persistent = True
    key = b""
    server: ValkeyServer
    places: dict[Path, str]

    @pytest.fixture(autouse=True)
    def use(self, server: ValkeyServer) -> None:
        self.server, self.places = server, {}

    async def make(self, capacity: int, place: Path) -> Tier:
        self.prefix = self.places.setdefault(place, f"t{next(_numbers)}")
        return RedisTier(self.server.url, capacity, prefix=self.prefix, key=self.key, timeout_s=20)  # busy machines

    async def damage(self, tier: Tier, block: BlockId) -> None:
        record = Names(self.prefix).record(member_of(block, block.scope.domain))
        with blocking_redis.Redis(unix_socket_path=self.server.socket) as client:
            (name,) = client.scan_iter(record.removesuffix("r") + "*:0")
            middle = cast("int", client.strlen(name)) // 2
            byte = cast("bytes", client.getrange(name, middle, middle))
            client.setrange(name, middle, cast("Any", bytes([byte[0] ^ 0x10])))


class TestSealedRedisTier(TestRedisTier):
    key = bytes(range(32))
