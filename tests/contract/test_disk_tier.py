"""The disk tier, bare and behind the breaker, passes the shipped suite."""

from __future__ import annotations

from pathlib import Path

from kvstore.testing.tier_suite import TierSuite
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.wrappers import Breaker
from kvstore.types import BlockId


def file_of(root: Path, block: BlockId) -> Path:
    """The one file of a block."""
    (found,) = (root / "blocks" / block.scope.domain / block.scope.ns.hex()).glob(f"{block.key.hex()}-*.kv")
    return found


def flip(path: Path, position: int, mask: int = 0x10) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


class TestDiskTier(TierSuite):
    persistent = True
    root: Path

    async def make(self, capacity: int, place: Path) -> Tier:
        self.root = place
        return DiskTier(place, capacity, pin_share=1.0)

    async def damage(self, tier: Tier, block: BlockId) -> None:
        path = file_of(self.root, block)
        flip(path, path.stat().st_size // 2)


class TestDiskTierBehindBreaker(TestDiskTier):
    async def make(self, capacity: int, place: Path) -> Tier:
        return Breaker(await super().make(capacity, place))
