"""The disk tier under faults at every system call, and on a full disk.

Throughout: no exception out of get and put, no wrong byte, the budget kept by the real files, nothing half-written
left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import file_of, open_fds, opened, real_bytes

from kvstore.disk.io import Files
from kvstore.errors import DirectoryUnusable, TierDown
from kvstore.testing.faults import OPERATIONS, FaultyFiles, KillingFiles, ShortFiles, WatchedFiles
from kvstore.testing.tier_kit import MIB, block_of, load, pages, scope_of, store
from kvstore.tiers.disk import DiskTier
from kvstore.types import Dropped, DropReason, Hit, Miss, MissReason, Stored

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


def test_every_system_call_can_be_made_to_fail() -> None:
    assert set(OPERATIONS) >= {"create_tmp", "write", "sync", "publish", "sync_dir", "unlink", "open_block", "read"}
    for name in OPERATIONS:
        files = FaultyFiles(1, errno.EIO)
        with pytest.raises(OSError, match=r"injected|Bad file descriptor"):  # close closes, and then fails
            getattr(files, name)(*((-1,) if name == "close" else ()))
        assert files.failed == [name]
    assert issubclass(KillingFiles, WatchedFiles)
