"""What tests of the disk tier share: a tier that is closed again, its files, and what they really take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from kvstore.testing.tier_kit import MIB, scope_of
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockId, Scope


def directory_of(root: Path, scope: Scope | None = None) -> Path:
    scope = scope or scope_of()
    return root / "blocks" / scope.domain / scope.ns.hex()


def file_of(root: Path, block: BlockId) -> Path:
    (found,) = directory_of(root, block.scope).glob(f"{block.key.hex()}-*.kv")
    return found


def real_bytes(root: Path) -> int:
    """What the directory really takes, by the file system's own count or by the length of its files."""
    total = 0
    for base, _, names in os.walk(root):
        total += os.lstat(base).st_blocks * 512
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # evicted while we walk
                info = os.lstat(os.path.join(base, name))
                total += max(info.st_blocks * 512, -(-info.st_size // 4096) * 4096)
    return total


def open_fds() -> set[str]:
    """Descriptors and what they are. Not how many: what earlier tests left to the collector closes at any time."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


@contextlib.asynccontextmanager
async def opened(root: Path, capacity: int = 16 * MIB, **kw: object) -> AsyncIterator[DiskTier]:
    tier = DiskTier(root, capacity, **kw)  # pyright: ignore[reportArgumentType]
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


async def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
