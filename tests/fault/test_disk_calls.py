"""Which system calls the disk tier makes in which order, what happens at the same time, and death in the middle."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import directory_of, file_of, opened, real_bytes, until
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.testing.faults import GatedFiles, WatchedFiles
from kvstore.testing.tier_kit import MIB, block_of, header_of, load, pages, payload_of, scope_of, store
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockId, Dropped, DropReason, Exists, Hit, Miss, Stored


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
from kvstore.testing.tier_kit import block_of, scope_of, store
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
