"""Which directories the disk tier takes, and what it makes of what a former daemon left in them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from disks import directory_of, file_of, open_fds, opened, real_bytes

from kvstore.errors import ConfigError, DirectoryUnusable, StorageError
from kvstore.testing.faults import GatedFiles
from kvstore.testing.tier_kit import MIB, block_of, load, scope_of, store
from kvstore.tiers.disk import DiskTier
from kvstore.types import Stored


async def refused(root: Path, match: str, **kw: object) -> None:
    before = open_fds()
    with pytest.raises(DirectoryUnusable, match=match) as caught:
        async with opened(root, **kw):
            pass
    assert caught.value.remedy
    assert open_fds() <= before


async def test_a_new_directory_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        async with opened(tmp_path / "a" / "t") as tier:
            await store(tier, block_of(1), 100)
            for base, _, names in os.walk(tmp_path / "a"):
                assert os.stat(base).st_mode & 0o077 == 0
                assert all(os.stat(os.path.join(base, name)).st_mode & 0o077 == 0 for name in names)
    finally:
        os.umask(old)


async def test_directories_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    await refused(tmp_path / "file", "not a directory")
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    await refused(tmp_path / "link", "not a directory, or a symbolic link")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    await refused(tmp_path / "open", "can be written by others")
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "home" / "thesis.tex").write_text("...")
    await refused(tmp_path / "home", "holds other things")
    assert sorted(os.listdir(tmp_path / "home")) == ["LOCK", "thesis.tex"]
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 12345, 12345)
        await refused(tmp_path / "theirs", "belongs to uid 12345")


@pytest.mark.parametrize("text", [b"kvstore disk tier, format 2\n", b"", b"\xff" * 1000])
async def test_an_unknown_format_is_refused_and_nothing_touched(tmp_path: Path, text: bytes) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 100)
    (root / "FORMAT").write_bytes(text)
    await refused(root, "FORMAT says")
    assert file_of(root, block_of(1)).exists()


async def test_links_inside_the_root_are_refused(tmp_path: Path) -> None:
    for name in ("LOCK", "FORMAT", "blocks", "tmp", "quarantine"):
        root = tmp_path / name
        async with opened(root):
            pass
        target = tmp_path / f"{name}-moved"
        (root / name).rename(target)
        (root / name).symlink_to(target)
        await refused(root, "symbolic link")


async def test_two_on_one_directory(tmp_path: Path) -> None:
    async with opened(tmp_path / "t") as tier:
        await store(tier, block_of(1), 100)
        await refused(tmp_path / "t", "in use by another")
        assert await load(tier, block_of(1), 100)
    async with opened(tmp_path / "t") as tier:
        assert await load(tier, block_of(1), 100)


async def test_a_budget_below_what_an_empty_tier_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk\.bytes"):
        DiskTier(tmp_path / "t", 1000)
    with pytest.raises(ConfigError, match="eviction"):
        DiskTier(tmp_path / "t", MIB, policy="nonsense")


# -- restart -----------------------------------------------------------------------------------------------------------


async def test_leftovers_of_a_killed_daemon_are_wiped(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 100)
        used = tier.usage().used
    (root / "tmp" / "5").write_bytes(bytes(100_000))
    (directory_of(root, scope_of(9))).mkdir(parents=True)
    async with opened(root) as tier:
        assert list((root / "tmp").iterdir()) == []
        assert not directory_of(root, scope_of(9)).exists()
        assert tier.usage().used == used


async def test_a_smaller_budget_evicts_what_was_used_longest_ago(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        for number in range(10):
            await store(tier, block_of(number), 100_000)
    for number in range(10):
        age = (number * 7) % 10
        os.utime(file_of(root, block_of(number)), (1e9 + age, 1e9 + age))
    async with opened(root, 600_000) as tier:
        assert tier.usage().used <= 600_000
        assert real_bytes(root) <= 600_000
        kept = {(number * 7) % 10 for number in range(10) if tier.contains(*block_of(number))}
        assert kept == set(range(10 - len(kept), 10))
        assert len(kept) == 5
        assert tier.counters.evicted == 5


async def test_a_budget_may_grow_by_a_share_of_what_was_found(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        for number in range(10):
            await store(tier, block_of(number), 100_000)
        used = tier.usage().used
    async with opened(root, 600_000, found_share=0.5) as tier:
        assert tier.usage().capacity == 600_000 + used // 2
        assert tier.usage().blocks == 10
    async with opened(root, 600_000, found_share=0.0) as tier:
        assert tier.usage().capacity == 600_000
        assert tier.usage().blocks < 10


async def test_recency_outlives_a_restart(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root, 830_000) as tier:
        for number in range(7):
            assert await store(tier, block_of(number), 100_000) == Stored()
            os.utime(file_of(root, block_of(number)), (1e9 + number, 1e9 + number))
        assert await load(tier, block_of(0), 100_000)
    async with opened(root, 830_000) as tier:
        await asyncio.sleep(0.05)  # the order is found out after the start
        assert await load(tier, block_of(2), 100_000)
        for number in range(10, 14):
            assert await store(tier, block_of(number), 100_000) == Stored()
        left = [number for number in range(7) if tier.contains(*block_of(number))]
        assert left == [0, 2, 6]


async def test_eviction_before_the_order_is_known(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root, 830_000) as tier:
        for number in range(7):
            await store(tier, block_of(number), 100_000)
    files = GatedFiles("used_at")
    tier = DiskTier(root, 830_000, files=files)
    await tier.start()
    assert await load(tier, block_of(3), 100_000)
    for number in range(10, 14):
        assert await store(tier, block_of(number), 100_000) == Stored()
        assert tier.usage().used <= 830_000
    assert tier.contains(*block_of(3)), "used since start"
    assert sum(tier.contains(*block_of(number)) for number in range(7)) == 3
    files.gate.set()
    await tier.close()


async def test_descriptions(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        empty = tier.usage()
        await tier.describe(scope_of(1), b'{"model": "m"}')
        assert tier.usage() == empty, "nothing to describe yet"
        assert tier.descriptions() == {}
        await store(tier, block_of(1, scope_of(1)), 100)
        await store(tier, block_of(1, scope_of(2)), 100)
        assert tier.descriptions() == {scope_of(1): b'{"model": "m"}'}
        await tier.describe(scope_of(2), b"x" * 65536)
        assert len(tier.descriptions()) == 2
        assert real_bytes(root) <= tier.usage().used
        for bad in (b"", b"x" * 65537):
            with pytest.raises(StorageError):
                await tier.describe(scope_of(1), bad)
        used = tier.usage()
    async with opened(root) as tier:
        assert tier.descriptions() == {scope_of(1): b'{"model": "m"}', scope_of(2): b"x" * 65536}
        assert tier.usage() == used
        await tier.drop(block_of(1, scope_of(1)))
        assert tier.descriptions() == {scope_of(2): b"x" * 65536}
        assert not directory_of(root, scope_of(1)).exists()
        await store(tier, block_of(2, scope_of(1)), 100)
        assert len(tier.descriptions()) == 2, "it comes back with the blocks"
        await asyncio.gather(tier.clear(scope_of(1)), tier.describe(scope_of(1), b"y"), tier.clear(scope_of(2)))
        assert tier.usage() == empty
        assert await tier.check() == []
