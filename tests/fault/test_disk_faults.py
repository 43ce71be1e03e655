"""The disk tier under damage, faults at every system call, a full disk, foreign files, and other processes.

Throughout: no exception out of get and put, no wrong byte, the budget kept by the real files, nothing half-written
left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.disk.io import Files
from kvstore.errors import ConfigError, DirectoryUnusable, StorageError, TierDown
from kvstore.testing.faults import OPERATIONS, FaultyFiles, GatedFiles, KillingFiles, ShortFiles, WatchedFiles
from kvstore.testing.tier_suite import MIB, block_of, header_of, load, pages, payload_of, scope_of, store
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.wrappers import Breaker
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Exists, Hit, Miss, MissReason, Scope, Stored


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


# -- damage ------------------------------------------------------------------------------------------------------------


async def test_a_flip_of_any_byte_of_a_stored_file_is_a_miss(tmp_path: Path) -> None:
    block, nbytes = block_of(1), 3 * 4096 + 100
    async with opened(tmp_path / "t", 64 * MIB) as tier:
        await store(tier, block, nbytes)
        path = file_of(tmp_path / "t", block)
        good = path.read_bytes()
        positions = sorted({*range(700), *range(700, len(good), 61), len(good) - 1, 4096, 4096 + nbytes})
        for count, position in enumerate(positions, 1):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            assert await tier.get(block, pages(nbytes)) == Miss(MissReason.CORRUPT), position
            assert tier.counters.corrupt == count
            assert not path.exists()
            if count % 16 == 0:  # through the tier, now and then; else past it, which is faster
                assert await store(tier, block, nbytes) == Stored()
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(good)
                assert [f.what for f in await tier.check(fix=True)] == ["unknown file"]
            assert await load(tier, block, nbytes)
        assert len(list((tmp_path / "t" / "quarantine").iterdir())) <= 64


async def test_a_file_of_any_other_length_is_a_miss(tmp_path: Path) -> None:
    block, nbytes = block_of(1), MIB + 5000
    async with opened(tmp_path / "t") as tier:
        await store(tier, block, nbytes)
        path = file_of(tmp_path / "t", block)
        good = path.read_bytes()
        for length in [0, 1, 40, 511, 4095, 4096, 4097, 8192, MIB, len(good) - 4096, len(good) - 1, len(good) + 1]:
            path.write_bytes(good[:length].ljust(length, b"\0"))
            assert await tier.get(block, pages(nbytes)) == Miss(MissReason.CORRUPT), length
            assert not tier.contains(*block)
            assert await store(tier, block, nbytes) == Stored()
            assert await load(tier, block, nbytes)
        await tier.close()


async def test_a_damaged_length_found_after_a_restart(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 50_000)
        await store(tier, block_of(2), 50_000)
    os.truncate(file_of(root, block_of(1)), 4096)
    async with opened(root) as tier:
        assert tier.contains(*block_of(1)), "a start looks at names only"
        assert await tier.get(block_of(1), pages(50_000)) == Miss(MissReason.CORRUPT)
        assert await load(tier, block_of(2), 50_000)


async def test_another_blocks_file_under_this_blocks_name_is_a_miss(tmp_path: Path) -> None:
    root = tmp_path / "t"
    other_ns, other_domain = block_of(1, scope_of(5)), block_of(1, scope_of(0, "u1"))
    async with opened(root) as tier:
        for block in (block_of(1), block_of(2), other_ns, other_domain):
            await store(tier, block, 30_000)
        for other in (block_of(2), other_ns, other_domain):
            shutil.copyfile(file_of(root, other), file_of(root, block_of(1)))
            assert await tier.get(block_of(1), pages(30_000)) == Miss(MissReason.CORRUPT)
            assert await load(tier, other, 30_000)
            await store(tier, block_of(1), 30_000)
        # a file under a name that says another length
        path = file_of(root, block_of(1))
        os.rename(path, path.with_name(path.name.replace("-7530.kv", "-7531.kv")))
    async with opened(root) as tier:
        assert tier.size(block_of(1)) == 30_001
        assert await tier.get(block_of(1), pages(30_001)) == Miss(MissReason.CORRUPT)


async def test_a_file_that_is_gone_is_a_miss_and_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path / "t") as tier:
        empty = tier.usage()
        await store(tier, block_of(1), 30_000)
        file_of(tmp_path / "t", block_of(1)).unlink()
        assert await tier.get(block_of(1), pages(30_000)) == Miss(MissReason.LOST)
        assert tier.size(block_of(1)) is None
        assert tier.usage() == empty
        await store(tier, block_of(2), 30_000)
        shutil.rmtree(directory_of(tmp_path / "t"))
        assert await tier.get(block_of(2), pages(30_000)) == Miss(MissReason.LOST)
        assert tier.usage() == empty
        assert await store(tier, block_of(2), 30_000) == Stored()
        assert await load(tier, block_of(2), 30_000)


async def test_quarantine_is_bounded_and_within_the_budget(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root, 8 * MIB) as tier:
        for number in range(100):
            await store(tier, block_of(number), 20_000)
            path = file_of(root, block_of(number))
            path.write_bytes(b"x" * path.stat().st_size)
            assert await tier.get(block_of(number), pages(20_000)) == Miss(MissReason.CORRUPT)
            held = list((root / "quarantine").iterdir())
            assert len(held) <= 64
            assert sum(p.stat().st_size for p in held) <= MIB
            assert real_bytes(root) <= tier.usage().used
        assert len(held) > 30
        state = tier.describe_state()
        assert state["quarantined_files"] == len(held)
        used = tier.usage().used
        # a block larger than the whole quarantine is removed instead
        await store(tier, block_of(1000), 2 * MIB)
        path = file_of(root, block_of(1000))
        path.write_bytes(b"x" * path.stat().st_size)
        assert await tier.get(block_of(1000), pages(2 * MIB)) == Miss(MissReason.CORRUPT)
        assert not path.exists()
        assert tier.usage().used == used
    async with opened(root, 8 * MIB) as tier:
        assert tier.usage().used == used


# -- check -------------------------------------------------------------------------------------------------------------


async def test_check_finds_and_mends_each_kind_of_disagreement(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        for number in range(8):
            await store(tier, block_of(number), 20_000)
        ns = directory_of(root)
        file_of(root, block_of(0)).unlink()
        os.truncate(file_of(root, block_of(1)), 100)
        file_of(root, block_of(2)).write_bytes(b"x" * (4096 + 20_480))
        good = file_of(root, block_of(3)).read_bytes()
        name = file_of(root, block_of(3)).name
        await tier.drop(block_of(3))
        (ns / name).write_bytes(good)
        (ns / name.replace(block_of(3).key.hex(), "00" * 32)).write_bytes(good)
        (root / "tmp" / "77").write_bytes(b"half")
        (ns / "stranger").write_bytes(b"?")
        tier._index.used += 4096
        expected = [
            "corrupt file",
            "foreign file",
            "leftover tmp",
            "missing file",
            "unknown file",
            "unknown file, corrupt file",
            "wrong size",
            "wrong totals",
        ]
        assert sorted(f.what for f in await tier.check()) == expected
        assert not any(f.fixed for f in await tier.check())
        mended = await tier.check(fix=True)
        assert sorted(f.what for f in mended) == expected
        assert [f.what for f in mended if not f.fixed] == ["foreign file"]
        assert [f.what for f in await tier.check()] == ["foreign file"]
        assert (ns / "stranger").read_bytes() == b"?"
        assert {n for n in range(8) if tier.contains(*block_of(n))} == {3, 4, 5, 6, 7}
        for number in range(3, 8):
            assert await load(tier, block_of(number), 20_000)
    async with opened(root) as again:
        assert again.usage().blocks == 5
        assert [f.what for f in await again.check()] == ["foreign file"]


async def test_check_while_serving_accuses_nobody(tmp_path: Path) -> None:
    async with opened(tmp_path / "t", 3 * MIB) as tier:
        busy = True

        async def traffic(seed: int) -> None:
            rng = random.Random(seed)
            while busy:
                block = block_of(rng.randrange(40))
                await (store(tier, block, 100_000) if rng.random() < 0.6 else tier.drop(block))

        tasks = [asyncio.ensure_future(traffic(seed)) for seed in range(4)]
        for number in range(20):
            assert await tier.check(fix=number % 2 == 1) == []
        busy = False
        await asyncio.gather(*tasks)
        assert await tier.check() == []


async def test_check_adopts_only_what_the_budget_allows(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 2 * MIB)
        kept = file_of(root, block_of(1)).read_bytes()
        name = file_of(root, block_of(1)).name
    shutil.rmtree(root)
    async with opened(root, MIB) as tier:
        await store(tier, block_of(2), 1000)
        (directory_of(root) / name).write_bytes(kept)
        assert [(f.what, f.fixed) for f in await tier.check(fix=True)] == [("unknown file", True)]
        assert not (directory_of(root) / name).exists()
        assert tier.usage().used <= MIB


# -- what is not ours --------------------------------------------------------------------------------------------------


async def test_foreign_things_are_ignored_reported_and_left_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "t", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s" * 8192)
    async with opened(root) as tier:
        await store(tier, block_of(0), 4096)
        used = tier.usage().used
        model = file_of(root, block_of(0)).name
    ns = directory_of(root)

    def named(number: int) -> Path:
        return ns / model.replace(block_of(0).key.hex(), block_of(number).key.hex())

    named(1).symlink_to(outside / "secret")
    os.mkfifo(named(2))
    named(3).mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(ns)
        sock.bind(os.path.join(".", named(4).name[:60]))
        os.chdir("/")
    (ns / "notes.txt").write_bytes(b"n")
    (ns / model.replace("-1000-", "-1001-")).write_bytes(b"")
    (ns / model.upper()).write_bytes(b"")
    (ns / model.replace(block_of(0).key.hex(), block_of(8).key.hex().upper())).write_bytes(b"")
    (ns / model.replace(block_of(0).key.hex(), "  " + block_of(0).key.hex()[2:])).write_bytes(b"")
    (root / "blocks" / "file").write_bytes(b"")
    (root / "blocks" / "-bad").mkdir()
    (root / "blocks" / "link").symlink_to(outside)
    (root / "blocks" / "u0" / ("AB" * 32)).mkdir()
    (root / "blocks" / "u0" / ("cd" * 32)).symlink_to(outside)
    twin = ns / model.replace(block_of(0).key.hex(), block_of(0).key.hex().upper())
    twin.write_bytes(b"")
    async with opened(root) as tier:
        await until(lambda: tier.usage().blocks == 1)
        assert tier.usage().used == used, "no block counts twice"
        assert await load(tier, block_of(0), 4096)
    twin.unlink()
    async with opened(root) as tier:
        await until(lambda: tier.describe_state()["foreign_files"] == 14)  # some are known only when looked at
        assert tier.usage().blocks == 1
        assert tier.usage().used == used
        for number in (1, 2, 3):
            assert await tier.get(block_of(number), pages(4096)) == Miss(MissReason.ABSENT)
        findings = await tier.check(fix=True)
        assert [f.what for f in findings] == ["foreign file"] * 14
        assert not any(f.fixed for f in findings)
        assert await load(tier, block_of(0), 4096)
    assert (outside / "secret").read_bytes() == b"s" * 8192
    assert named(1).is_symlink()
    assert named(3).is_dir()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "hard link"])
async def test_a_block_replaced_by_something_else_is_a_miss(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 4096)
        await store(tier, block_of(2), 4096)
        path = file_of(root, block_of(1))
        keep = tmp_path / "elsewhere"
        if kind == "hard link":
            os.link(path, keep)
        else:
            path.rename(keep)
        if kind == "symlink":
            path.symlink_to(keep)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        assert await tier.get(block_of(1), pages(4096)) == Miss(MissReason.LOST)
        assert tier.size(block_of(1)) is None
        assert keep.stat().st_size == 8192
        outcome = await store(tier, block_of(1), 4096)
        assert outcome == (Dropped(DropReason.IO_ERROR) if kind == "directory" else Stored())
        assert await load(tier, block_of(1), 4096) == (kind != "directory")
        assert keep.stat().st_size == 8192
        assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("domain", ["", ".", "..", "a/b", "x" * 65, "a\0b"])
async def test_a_domain_that_makes_no_path(tmp_path: Path, domain: str) -> None:
    async with opened(tmp_path / "t") as tier:
        block = BlockId(Scope(domain, bytes(32)), bytes(32))
        assert tier.size(block) is None
        assert await tier.get(block, pages(1)) == Miss(MissReason.ABSENT)
        with pytest.raises(StorageError):
            await tier.put(block, BlockHeader(), pages(1), 1)
        with pytest.raises(StorageError):
            await tier.describe(block.scope, b"text")
        assert tier.usage().blocks == 0


# -- whose directory ---------------------------------------------------------------------------------------------------


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


# -- faults at every call ----------------------------------------------------------------------------------------------

ERRNOS = [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS]


async def with_each_fault(
    tmp_path: Path, error: int, scenario: Callable[[DiskTier, FaultyFiles, int], object], lasting: bool = False
) -> int:
    """Run a scenario on a fresh copy of a tier with the n-th call failing, for every n until nothing fails any more."""
    template = tmp_path / "template"
    async with opened(template, 900_000) as tier:
        for number in range(5):
            await store(tier, block_of(number), 100_000)
        await store(tier, block_of(50, scope_of(5)), 100_000)
        await tier.describe(scope_of(5), b"five")
    for fail_at in range(1, 200):
        root = tmp_path / f"run-{fail_at}"
        shutil.copytree(template, root)
        files = FaultyFiles()
        fds = open_fds()
        async with opened(root, 900_000, files=files) as tier:
            await asyncio.sleep(0.005)
            files.arm(fail_at, error, lasting=lasting)
            await scenario(tier, files, fail_at)  # pyright: ignore[reportGeneralTypeIssues]
            files.arm()
            assert tier.usage().used <= 900_000
            assert real_bytes(root) <= 900_000
            assert real_bytes(root) <= tier.usage().used
            held = {n for n in range(60) if tier.contains(*block_of(n))}
            for number in held:
                assert await load(tier, block_of(number), 100_000)
            assert await store(tier, block_of(90), 100_000) == Stored(), "it goes on afterwards"
            assert await load(tier, block_of(90), 100_000)
            findings = [f.what for f in await tier.check(fix=True)]
            assert set(findings) <= {"leftover tmp", "unknown file, corrupt file"}, (fail_at, files.failed, findings)
            assert await tier.check() == []
        assert open_fds() <= fds
        shutil.rmtree(root)
        if not files.failed:
            return fail_at - 1
    raise AssertionError("the scenario never ends")


@pytest.mark.parametrize("error", ERRNOS)
async def test_put_with_a_fault_at_every_call(tmp_path: Path, error: int) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        block = block_of(20, scope_of(7))  # a new namespace, and two blocks must leave
        outcome = await store(tier, block, 250_000, durable=True)
        assert isinstance(outcome, Stored | Dropped)
        if isinstance(outcome, Dropped):
            expected = DropReason.TIER_FULL if error == errno.ENOSPC else DropReason.IO_ERROR
            assert outcome.reason == expected
            assert not tier.contains(*block)
            assert not await load(tier, block, 250_000)
        else:
            files.arm()
            assert await load(tier, block, 250_000)

    assert await with_each_fault(tmp_path, error, scenario) > 20


@pytest.mark.parametrize("error", ERRNOS)
async def test_put_over_a_leaving_block_with_a_fault_at_every_call(tmp_path: Path, error: int) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        files.arm()
        number = 20
        while not tier.counters.evicted:
            number += 1
            assert await store(tier, block_of(number), 100_000) == Stored()
        files.arm(fail_at, error)
        before = tier.usage()
        outcome = await store(tier, block_of(55), 100_000)
        files.arm()
        assert tier.contains(*block_of(55)) == (outcome == Stored())
        assert tier.usage().used <= before.used
        if error != errno.ENOSPC and outcome != Stored():
            assert outcome == Dropped(DropReason.IO_ERROR)

    assert await with_each_fault(tmp_path, error, scenario) > 12


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_put_with_every_call_failing_from_the_nth_on(tmp_path: Path, error: int) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        block = block_of(20, scope_of(7))
        outcome = await store(tier, block, 250_000)
        assert isinstance(outcome, Stored | Dropped)
        assert tier.contains(*block) == (outcome == Stored())
        assert tier.usage().used <= 900_000

    assert await with_each_fault(tmp_path, error, scenario, lasting=True) > 10


@pytest.mark.parametrize("error", ERRNOS)
async def test_get_with_a_fault_at_every_call(tmp_path: Path, error: int) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        outcome = await tier.get(block_of(3), pages(100_000))
        assert isinstance(outcome, Hit) or outcome == Miss(MissReason.TIER_DOWN), outcome
        assert tier.contains(*block_of(3)), "a failing disk says nothing about the block"
        assert tier.counters.corrupt == 0

    assert await with_each_fault(tmp_path, error, scenario) >= 6


async def test_get_of_a_damaged_block_with_a_fault_at_every_call(tmp_path: Path) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        path = file_of(tmp_path / f"run-{fail_at}", block_of(3))
        path.write_bytes(bytes(path.stat().st_size))
        outcome = await tier.get(block_of(3), pages(100_000))
        assert outcome in (Miss(MissReason.TIER_DOWN), Miss(MissReason.CORRUPT))
        files.arm()
        if outcome == Miss(MissReason.TIER_DOWN):
            assert await tier.get(block_of(3), pages(100_000)) == Miss(MissReason.CORRUPT)
        assert not tier.contains(*block_of(3))

    assert await with_each_fault(tmp_path, errno.EIO, scenario) > 8


async def test_drop_with_a_fault_at_every_call(tmp_path: Path) -> None:
    async def scenario(tier: DiskTier, files: FaultyFiles, fail_at: int) -> None:
        try:
            dropped = await tier.drop(block_of(50, scope_of(5)))
        except TierDown:
            files.arm()
            assert await load(tier, block_of(50, scope_of(5)), 100_000), "refused, so still here"
        else:
            assert dropped
            assert not tier.contains(*block_of(50, scope_of(5)))

    assert await with_each_fault(tmp_path, errno.EIO, scenario) > 4


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.EACCES])
async def test_start_with_a_fault_at_every_call(tmp_path: Path, error: int) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        for number in range(4):
            await store(tier, block_of(number, scope_of(number % 2)), 10_000)
        await tier.describe(scope_of(0), b"zero")
    refusals = 0
    for fail_at in range(1, 200):
        files = FaultyFiles(fail_at, error)
        fds = open_fds()
        try:
            async with opened(root, files=files) as tier:
                files.arm()
                for number in range(4):
                    assert await load(tier, block_of(number, scope_of(number % 2)), 10_000)
        except DirectoryUnusable:
            refusals += 1
        assert open_fds() <= fds
        if not files.failed:
            break
    assert refusals > 10
    async with opened(root) as tier:
        assert tier.usage().blocks == 4
        assert await tier.check() == []


async def test_first_start_with_a_fault_at_every_call(tmp_path: Path) -> None:
    for fail_at in range(1, 100):
        root = tmp_path / str(fail_at)
        files = FaultyFiles(fail_at, errno.EIO)
        with contextlib.suppress(DirectoryUnusable):
            async with opened(root, files=files):
                pass
        async with opened(root) as tier:  # whatever was left, the next start copes
            assert await store(tier, block_of(1), 100) == Stored()
        if not files.failed:
            return
    raise AssertionError("a start never ends")


@pytest.mark.parametrize("most", [4096, 3 * 4096, 40_960, MIB])
async def test_short_reads_and_writes_are_continued(tmp_path: Path, most: int) -> None:
    async with opened(tmp_path / "t", files=ShortFiles(most)) as tier:
        for number, nbytes in enumerate((1, 4096, 100_000, MIB + 17)):
            assert await store(tier, block_of(number), nbytes, cuts=(1, 3, 4)) == Stored()
            assert await load(tier, block_of(number), nbytes, (2, 5))
        assert await tier.check() == []


async def test_a_disk_that_moves_nothing_is_an_error_not_a_hang(tmp_path: Path) -> None:
    async with opened(tmp_path / "t") as tier:
        await store(tier, block_of(1), 10_000)
    files = ShortFiles(MIB)
    async with opened(tmp_path / "t", files=files) as tier:
        files.most = 0
        assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
        assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.IO_ERROR)
        files.most = MIB
        assert await load(tier, block_of(1), 10_000)
        assert list((tmp_path / "t" / "tmp").iterdir()) == []


async def test_a_rename_that_fails_after_it_was_done_leaves_nothing(tmp_path: Path) -> None:
    class Late(Files):
        late = False

        def publish(self, source: str, source_at: int, name: str, at: int) -> None:
            super().publish(source, source_at, name, at)
            if self.late:
                raise OSError(errno.EIO, "too late")

    files = Late()
    async with opened(tmp_path / "t", files=files) as tier:
        empty = tier.usage()
        files.late = True
        assert await store(tier, block_of(1), 10_000) == Dropped(DropReason.IO_ERROR)
        files.late = False
        assert tier.usage() == empty
        assert await tier.check() == []


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "mount"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


async def test_a_disk_smaller_than_the_budget(small_disk: Path) -> None:
    async with opened(small_disk / "t", 64 * MIB) as tier:
        outcomes = [await store(tier, block_of(number), 400_000) for number in range(30)]
        assert outcomes == [Stored()] * 30, "blocks leave for newcomers when the disk is full"
        assert tier.counters.evicted > 15
        assert await load(tier, block_of(29), 400_000)
        assert await store(tier, block_of(99), 5 * MIB) == Dropped(DropReason.TIER_FULL)
        assert list((small_disk / "t" / "tmp").iterdir()) == []
        assert await tier.check() == []
        # others fill the disk, and leave again
        await tier.clear(scope_of())
        (small_disk / "ballast").write_bytes(bytes(4 * MIB - 200_000))
        assert await store(tier, block_of(1), 400_000) == Dropped(DropReason.TIER_FULL)
        assert tier.usage().blocks == 0
        (small_disk / "ballast").unlink()
        assert await store(tier, block_of(1), 400_000) == Stored()


async def test_a_disk_that_became_read_only(tmp_path: Path) -> None:
    files = FaultyFiles()
    async with opened(tmp_path / "t", files=files) as tier:
        for number in range(3):
            await store(tier, block_of(number), 100_000)
        used = tier.usage()
        writes = ["create_tmp", "make_dir", "publish", "remove_dir", "touch", "unlink", "write"]
        files.arm(1, errno.EROFS, only=writes, lasting=True)
        assert await store(tier, block_of(9), 100_000) == Dropped(DropReason.IO_ERROR)
        assert await load(tier, block_of(1), 100_000)
        with pytest.raises(TierDown):
            await tier.drop(block_of(1))
        assert await load(tier, block_of(1), 100_000)
        assert tier.usage() == used
        files.arm()
        assert await store(tier, block_of(9), 100_000) == Stored()
        assert await tier.drop(block_of(1))


async def test_a_limit_on_file_size(tmp_path: Path) -> None:
    async with opened(tmp_path / "t") as tier:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            assert await store(tier, block_of(1), 400_000) == Dropped(DropReason.IO_ERROR)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "t" / "tmp").iterdir()) == []
        assert await store(tier, block_of(1), 400_000) == Stored()


async def test_without_direct_io_it_says_so_and_works(tmp_path: Path) -> None:
    class Buffered(Files):
        def create_tmp(self, name: str, at: int, direct: bool) -> int:
            if direct:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return super().create_tmp(name, at, direct)

    async with opened(tmp_path / "t", files=Buffered()) as tier:
        assert not tier.direct_io
        assert "O_DIRECT" in tier.describe_state()["direct_io_reason"]
        for number, nbytes in enumerate((0, 1, 5000, MIB + 1)):
            assert await store(tier, block_of(number), nbytes, durable=True) == Stored()
            assert await load(tier, block_of(number), nbytes, (1,))
    async with opened(tmp_path / "t") as tier:  # and the other way reads it
        assert await load(tier, block_of(3), MIB + 1)


# -- order of calls ----------------------------------------------------------------------------------------------------


async def test_a_durable_put_syncs_file_then_name(tmp_path: Path) -> None:
    files = WatchedFiles()
    async with opened(tmp_path / "t", files=files) as tier:
        await asyncio.sleep(0.01)
        files.calls.clear()
        await store(tier, block_of(1), 100_000, durable=True)
        order = [c for c in files.calls if c in ("create_tmp", "write", "sync", "publish", "sync_dir")]
        assert order == ["create_tmp", "write", "sync", "publish", "sync_dir", "sync_dir", "sync_dir"]
        files.calls.clear()
        await store(tier, block_of(2), 100_000, durable=True)
        assert files.calls.count("sync_dir") == 1, "the namespace's own name is durable already"
        files.calls.clear()
        await store(tier, block_of(3), 100_000)
        assert "sync" not in files.calls
        assert "sync_dir" not in files.calls
        files.calls.clear()
        assert await tier.put(block_of(3), header_of(block_of(3)), pages(100_000), 100_000, durable=True) == Exists()
        assert files.calls.count("sync") == 1
        assert files.calls.count("sync_dir") == 1
        await tier.clear(scope_of())
        files.calls.clear()
        await store(tier, block_of(4), 100_000, durable=True)
        assert files.calls.count("sync_dir") == 3, "the directory was made anew"


async def test_durable_puts_share_their_directory_syncs(tmp_path: Path) -> None:
    files = WatchedFiles()
    async with opened(tmp_path / "t", files=files, threads=8) as tier:
        await store(tier, block_of(0), 4096, durable=True)
        files.calls.clear()
        outcomes = await asyncio.gather(*(store(tier, block_of(n), 4096, durable=True) for n in range(1, 33)))
        assert outcomes == [Stored()] * 32
        assert files.calls.count("sync") == 32
        assert files.calls.count("sync_dir") < 24


async def test_one_read_is_one_call(tmp_path: Path) -> None:
    files = WatchedFiles()
    async with opened(tmp_path / "t", files=files) as tier:
        await store(tier, block_of(1), MIB)
        files.calls.clear()
        assert await load(tier, block_of(1), MIB)
        assert files.calls.count("read") == 1
        assert files.calls.count("touch") == 1
        files.calls.clear()
        assert await load(tier, block_of(1), MIB)
        assert files.calls.count("touch") == 0, "at most about once a minute"


async def test_a_block_that_leaves_is_written_over_by_one_of_the_same_length(tmp_path: Path) -> None:
    root, files = tmp_path / "t", WatchedFiles()
    async with opened(root, 500_000, files=files) as tier:
        for number in range(4):
            assert await store(tier, block_of(number), 100_000) == Stored()
        inodes = {file_of(root, block_of(number)).stat().st_ino for number in range(4)}
        files.calls.clear()
        for number in range(4, 8):
            assert await store(tier, block_of(number, scope_of(number % 2)), 99_000 + number) == Stored()
        assert files.calls.count("open_taken") == 4
        assert files.calls.count("create_tmp") == 0
        assert {file_of(root, block_of(n, scope_of(n % 2))).stat().st_ino for n in range(4, 8)} == inodes
        for number in range(4, 8):
            assert not tier.contains(*block_of(number - 4))
            assert await load(tier, block_of(number, scope_of(number % 2)), 99_000 + number)
        assert await tier.check() == []


async def test_a_block_that_leaves_is_not_written_over_through_another_name(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root, 300_000) as tier:
        for number in range(2):
            assert await store(tier, block_of(number), 100_000) == Stored()
        path, keep = file_of(root, block_of(0)), tmp_path / "keep"
        os.link(path, keep)
        content = keep.read_bytes()
        assert await store(tier, block_of(2), 100_000) == Stored()
        assert not tier.contains(*block_of(0))
        assert keep.read_bytes() == content


async def test_room_is_made_before_the_file_is(tmp_path: Path) -> None:
    class Judge(WatchedFiles):
        def before(self, number: int, name: str) -> None:
            worst.append(real_bytes(tmp_path / "t"))

    worst: list[int] = []  # one thread, so that nothing moves while it is counted
    async with opened(tmp_path / "t", 1_000_000, files=Judge(), threads=1) as tier:
        await asyncio.gather(*(store(tier, block_of(number), 90_000) for number in range(30)))
        assert tier.usage().blocks >= 8
    assert max(worst) <= 1_000_000
    assert max(worst) > 700_000


# -- at the same time --------------------------------------------------------------------------------------------------


async def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("where", ["create_tmp", "write", "publish", "sync_dir"])
async def test_a_drop_during_a_put_wins_wherever_the_put_is(tmp_path: Path, where: str) -> None:
    root = tmp_path / "t"
    files = GatedFiles()
    async with opened(root, files=files) as tier:
        empty = tier.usage()
        files._names = frozenset([where])
        putting = asyncio.ensure_future(store(tier, block_of(1), 100_000, durable=True))
        await until(files.arrived.is_set)
        dropping = asyncio.ensure_future(tier.drop(block_of(1)))
        await asyncio.sleep(0.01)
        assert not dropping.done(), "it waits until nothing of the block can come back"
        files.gate.set()
        assert not await dropping
        assert await putting == Dropped(DropReason.ABORTED)
        assert tier.usage() == empty
        assert not directory_of(root).exists()
        assert await store(tier, block_of(1), 100_000) == Stored()


async def test_clear_takes_what_is_being_written(tmp_path: Path) -> None:
    files = GatedFiles()
    async with opened(tmp_path / "t", files=files) as tier:
        empty = tier.usage()
        await store(tier, block_of(0), 10_000)
        files._names = frozenset(["publish"])
        putting = [asyncio.ensure_future(store(tier, block_of(n), 10_000)) for n in range(1, 4)]
        await until(files.arrived.is_set)
        clearing = asyncio.ensure_future(tier.clear(scope_of()))
        await asyncio.sleep(0.01)
        files.gate.set()
        assert await clearing == 1
        assert await asyncio.gather(*putting) == [Dropped(DropReason.ABORTED)] * 3
        assert tier.usage() == empty


async def test_a_block_being_read_is_not_evicted_and_a_dropped_one_is_paid_back_later(tmp_path: Path) -> None:
    files = GatedFiles()
    async with opened(tmp_path / "t", 450_000, files=files) as tier:
        empty = tier.usage()
        for number in range(3):
            assert await store(tier, block_of(number), 100_000) == Stored()
        files._names = frozenset(["read"])
        into = pages(100_000)
        reading = asyncio.ensure_future(tier.get(block_of(0), into))
        await until(files.arrived.is_set)
        for number in range(10, 16):
            assert await store(tier, block_of(number), 100_000) == Stored()
        assert tier.contains(*block_of(0))
        used = tier.usage().used
        assert await tier.drop(block_of(0))
        assert tier.usage().used == used, "the file is still open"
        assert await store(tier, block_of(0), 100_000) == Stored(), "the next one is another file"
        files.gate.set()
        assert isinstance(await reading, Hit)
        assert into[0] == payload_of(block_of(0), 100_000)
        await tier.clear(scope_of())
        assert tier.usage() == empty


async def test_a_hung_read_does_not_block_the_event_loop_and_cancel_waits_for_it(tmp_path: Path) -> None:
    files = GatedFiles("read")
    async with opened(tmp_path / "t", files=GatedFiles()) as tier:
        await store(tier, block_of(1), 100_000)
    files._names = frozenset()
    async with opened(tmp_path / "t", files=files) as tier:
        files._names = frozenset(["read"])
        reading = asyncio.ensure_future(tier.get(block_of(1), pages(100_000)))
        await until(files.arrived.is_set)
        reading.cancel()
        reading.cancel()
        await asyncio.sleep(0.02)
        assert not reading.done(), "a thread may still write into the caller's memory"
        reading.cancel()
        files.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await load(tier, block_of(1), 100_000)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["put", "put", "put", "durable", "get", "drop", "pin", "touch", "clear", "damage", "restart"]
            ),
            st.integers(0, 11),
        ),
        max_size=40,
    )
)
def test_the_budget_holds_after_every_operation(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:
    root = tmp_path_factory.mktemp("model") / "t"
    capacity = 400_000
    sizes = [0, 1, 4095, 5000, 20_000, 40_000, 60_000, 90_000, 100_000, 150_000, 300_000, 399_000]

    async def run() -> None:
        tier = DiskTier(root, capacity)
        await tier.start()
        maybe: set[BlockId] = set()
        for action, number in steps:
            block = block_of(number, scope_of(number % 3))
            if action in ("put", "durable"):
                outcome = await store(tier, block, sizes[number], durable=action == "durable")
                if isinstance(outcome, Stored):
                    maybe.add(block)
                    assert await load(tier, block, sizes[number]), "acknowledged, so readable"
            elif action == "get":
                assert not await load(tier, block, sizes[number]) or block in maybe
            elif action == "drop":
                await tier.drop(block)
                maybe.discard(block)
            elif action == "pin":
                tier.pin(block, time.monotonic() + (100 if number % 4 == 0 else 0))
            elif action == "touch":
                tier.touch([block_of(n, scope_of(n % 3)) for n in range(number)])
            elif action == "clear":
                await tier.clear(block.scope)
                maybe -= {b for b in maybe if b.scope == block.scope}
            elif action == "damage" and tier.contains(*block):
                path = file_of(root, block)
                path.write_bytes(bytes(path.stat().st_size))
                assert isinstance(await tier.get(block, pages(sizes[number])), Miss)
                maybe.discard(block)
            elif action == "restart":
                used = tier.usage()
                await tier.close()
                tier = DiskTier(root, capacity)
                await tier.start()
                assert tier.usage() == used
            usage = tier.usage()
            assert usage.used <= capacity
            assert real_bytes(root) <= usage.used
            assert usage.blocks == len(list(root.glob("blocks/*/*/*.kv")))
            assert usage.used == tier._index.total()
        assert await tier.check() == []
        await tier.close()

    asyncio.run(run())
    shutil.rmtree(root.parent)


# -- kill --------------------------------------------------------------------------------------------------------------

VICTIM = """
import asyncio, sys
from kvstore.testing.faults import KillingFiles
from kvstore.testing.tier_suite import block_of, scope_of, store
from kvstore.tiers.disk import DiskTier
from kvstore.types import Stored

async def main(root, kill_at):
    tier = DiskTier(root, 700_000, files=KillingFiles(kill_at))
    await tier.start()
    for number in range(100, 110):
        if await store(tier, block_of(number, scope_of(number % 2)), 90_000, durable=number % 3 == 0) == Stored():
            print(number, flush=True)
        if number % 4 == 0 and await tier.drop(block_of(number - 1, scope_of((number - 1) % 2))):
            print(1 - number, flush=True)
    await tier.close()
    print("done", flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_kill_9_at_many_calls(tmp_path: Path) -> None:
    kills = 0
    for kill_at in (3, 12, 20, 25, 31, 38, 44, 52, 61, 73, 88, 104, 121):
        root = tmp_path / str(kill_at)
        done = subprocess.run([sys.executable, "-c", VICTIM, root, str(kill_at)], capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
        said = [int(line) for line in done.stdout.split() if line != "done"]
        dropped = {-n for n in said if n < 0}
        async with opened(root, 700_000) as tier:
            assert tier.usage().used <= 700_000
            assert list((root / "tmp").iterdir()) == []
            held = {n for n in range(100, 110) if await load(tier, block_of(n, scope_of(n % 2)), 90_000)}
            assert not held & dropped, "a dropped block came back"
            stored = [n for n in said if n > 0 and n not in dropped]
            assert set(stored[-3:]) <= held, "an acknowledged block is lost"
            assert await tier.check() == []
        shutil.rmtree(root)
    assert kills >= 10


# -- breaker -----------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_the_breaker_opens_after_failures_and_closes_after_a_trial(tmp_path: Path) -> None:
    files, clock = FaultyFiles(), Clock()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), failures=3, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 10_000)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    files.arm(1, errno.EIO, only=["open_block", "create_tmp"], lasting=True)
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
    assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.IO_ERROR)
    assert tier.size(block_of(1)) == 10_000, "two failures are not three"
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)

    state = tier.describe_state()["breaker"]
    assert (state["state"], state["failures"]) == ("open", 3)
    assert "tier_down" in state["reason"]
    calls = len(files.calls)
    assert tier.size(block_of(1)) is None
    assert not tier.contains(*block_of(1))
    assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
    assert await store(tier, block_of(2), 10_000) == Dropped(DropReason.TIER_DOWN)
    assert len(files.calls) == calls, "the tier was not asked"

    opened_for = []
    for _ in range(9):  # still failing: longer and longer
        waited = 0.0
        while not tier.contains(*block_of(1)):
            clock.now += 0.25
            waited += 0.25
        assert tier.describe_state()["breaker"]["state"] == "half_open"
        opened_for.append(waited)
        assert await tier.get(block_of(1), pages(10_000)) == Miss(MissReason.TIER_DOWN)
        assert not tier.contains(*block_of(1))
    assert opened_for == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    files.arm()
    clock.now += 60
    assert await load(tier, block_of(1), 10_000)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    assert tier.describe_state()["breaker"]["failures"] == 0
    assert await store(tier, block_of(2), 10_000) == Stored()
    await tier.close()


async def test_misses_and_full_tiers_do_not_open_the_breaker(tmp_path: Path) -> None:
    tier = Breaker(DiskTier(tmp_path / "t", 100_000), failures=1)
    await tier.start()
    for _ in range(5):
        assert not await load(tier, block_of(1), 100)
        assert await store(tier, block_of(1), 10 * MIB) == Dropped(DropReason.TOO_LARGE)
    await store(tier, block_of(2), 100)
    file_of(tmp_path / "t", block_of(2)).write_bytes(bytes(8192))
    assert await tier.get(block_of(2), pages(100)) == Miss(MissReason.CORRUPT)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_a_success_between_failures_starts_the_count_anew(tmp_path: Path) -> None:
    files = FaultyFiles()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), failures=2)
    await tier.start()
    await store(tier, block_of(1), 100)
    for _ in range(4):
        files.arm(1, errno.EIO, only=["open_block"])
        assert not await load(tier, block_of(1), 100)
        assert await load(tier, block_of(1), 100)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_a_hung_disk_opens_the_breaker_for_everybody_else(tmp_path: Path) -> None:
    files, clock = GatedFiles(), Clock()
    tier = Breaker(DiskTier(tmp_path / "t", 16 * MIB, files=files), deadline_s=10, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 100)
    files._names = frozenset(["read"])
    hung = asyncio.ensure_future(load(tier, block_of(1), 100))
    await until(files.arrived.is_set)
    clock.now += 9
    assert tier.contains(*block_of(1))
    clock.now += 2
    assert not tier.contains(*block_of(1))
    assert await store(tier, block_of(2), 100) == Dropped(DropReason.TIER_DOWN)
    assert "has not ended" in tier.describe_state()["breaker"]["reason"]
    assert not hung.done()
    files.gate.set()
    assert await hung, "it ends well, if late"
    assert not tier.contains(*block_of(1)), "which proves nothing yet"
    clock.now += 1
    assert await load(tier, block_of(1), 100)
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


async def test_only_one_call_is_let_through_on_trial(tmp_path: Path) -> None:
    files, clock = GatedFiles(), Clock()
    inner = DiskTier(tmp_path / "t", 16 * MIB, files=files)
    tier = Breaker(inner, failures=1, clock=clock)
    await tier.start()
    await store(tier, block_of(1), 100)
    tier._failed("on purpose", trial=False)
    clock.now += 5
    files._names = frozenset(["read"])
    trial = asyncio.ensure_future(load(tier, block_of(1), 100))
    await until(files.arrived.is_set)
    assert not tier.contains(*block_of(1))
    assert await tier.get(block_of(1), pages(100)) == Miss(MissReason.TIER_DOWN)
    trial.cancel()
    files.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await trial
    assert await load(tier, block_of(1), 100), "a cancelled trial gives no verdict; the next call is the trial"
    assert tier.describe_state()["breaker"]["state"] == "closed"
    await tier.close()


def test_every_system_call_can_be_made_to_fail() -> None:
    assert set(OPERATIONS) >= {"create_tmp", "write", "sync", "publish", "sync_dir", "unlink", "open_block", "read"}
    for name in OPERATIONS:
        files = FaultyFiles(1, errno.EIO)
        with pytest.raises(OSError, match=r"injected|Bad file descriptor"):  # close closes, and then fails
            getattr(files, name)(*((-1,) if name == "close" else ()))
        assert files.failed == [name]
    assert issubclass(KillingFiles, WatchedFiles)
