"""What the reads under way tell of how long a block takes, before one of them has ended."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.disk import blocks
from kvstore.disk.io import Files, up_to
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.throttle import Throttled
from kvstore.types import BlockHeader, BlockId, Hit, Scope, Stored
from kvstore.under_way import GRACE_S, UnderWay

MIB = 1 << 20
BLOCK = BlockId(Scope("uid1", b"n" * 32), b"k" * 32)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_the_bytes_that_have_come_tell_how_long_a_block_takes() -> None:
    clock = Clock()
    reads = UnderWay(MIB, clock)
    assert reads.pace() is None
    with reads.reading(8 * MIB):
        clock.now += GRACE_S
        assert reads.pace() == pytest.approx(0.0), "a moment says nothing"
        clock.now += 0.1
        assert reads.pace() == pytest.approx(0.8), "as much as a mebibyte may have come"
        reads.came(3 * MIB)
        assert reads.pace() == pytest.approx(0.2)
        clock.now += 0.3
        assert reads.pace() == pytest.approx(0.8)
    assert reads.pace() is None


def test_what_was_asked_for_may_have_come() -> None:
    clock = Clock()
    reads = UnderWay(0, clock)
    with reads.reading(8 * MIB), reads.reading(8 * MIB):
        clock.now += GRACE_S + 0.1
        assert reads.pace() is None, "nothing is known before something is asked for"
        with reads.asking(2 * MIB):
            assert reads.pace() == pytest.approx(0.4)
            with reads.reading(8 * MIB):
                pass
            clock.now += GRACE_S + 0.2
            assert reads.pace() == pytest.approx(0.8), "it may have come after another read ended"
        with reads.asking(2 * MIB):
            assert reads.pace() == pytest.approx(0.4)


def test_reads_side_by_side_bring_blocks_together() -> None:
    clock = Clock()
    reads = UnderWay(MIB, clock)
    with reads.reading(8 * MIB), reads.reading(4 * MIB):
        with reads.reading(6 * MIB):
            clock.now += GRACE_S + 0.3
            reads.came(6 * MIB)
            assert reads.pace() == pytest.approx(0.2)
        clock.now += GRACE_S + 0.1
        assert reads.pace() == pytest.approx(0.3), "from the end of the last one on, two mebibytes may have come"


class HeldFiles(Files):
    """A disk that goes on with each piece of a read when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.pieces: list[int] = []

    def read(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        self.go.acquire(timeout=10)
        self.pieces.append(sum(map(len, buffers)))
        return super().read(fd, buffers, position)


@pytest.mark.parametrize("throttled", [False, True])
async def test_a_disk_tells_of_a_block_piece_by_piece_and_reads_it_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, throttled: bool
) -> None:
    monkeypatch.setattr(blocks, "PIECE_BYTES", MIB)
    files, data = HeldFiles(), random.Random(1).randbytes(5 * MIB + 777)
    disk = DiskTier(tmp_path, 64 * MIB, files=files)
    files.go.release(1000)
    await disk.start()
    tier = Throttled(disk, 1e12) if throttled else disk
    assert await tier.put(BLOCK, BlockHeader(), [memoryview(data)], len(data)) == Stored()
    files.go, files.pieces = threading.Semaphore(0), []
    into = memoryview(bytearray(len(data)))
    read = asyncio.ensure_future(tier.get(BLOCK, [into]))
    try:
        for _ in range(2):
            files.go.release()
        async with asyncio.timeout(5):
            while len(files.pieces) < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        told = tier.pace()
        assert told is not None
        assert told > 0.25, "not more than three of five mebibytes have come in a fifth of a second"
    finally:
        files.go.release(1000)
    assert isinstance(await read, Hit)
    assert bytes(into) == data
    assert files.pieces[:3] == [MIB] * 3
    assert blocks.SMALLEST_PIECE < files.pieces[3] < MIB, "a slow disk is read in smaller pieces"
    assert sum(files.pieces) >= len(data)
    assert tier.pace() is None
    await disk.close()


async def test_a_fast_disk_is_read_in_large_pieces_and_the_rest_makes_none(tmp_path: Path) -> None:
    files = HeldFiles()
    files.go.release(10_000)
    disk = DiskTier(tmp_path, 64 * MIB, files=files)
    await disk.start()
    data = random.Random(2).randbytes(6 * MIB)
    assert await disk.put(BLOCK, BlockHeader(), [memoryview(data)], len(data)) == Stored()
    small = BLOCK._replace(key=b"s" * 32)
    assert await disk.put(small, BlockHeader(), [memoryview(data)[:100]], 100) == Stored()
    for _ in range(20):
        assert isinstance(await disk.get(small, [memoryview(bytearray(100))]), Hit)
    files.pieces.clear()
    into = memoryview(bytearray(len(data)))
    assert isinstance(await disk.get(BLOCK, [into]), Hit)
    assert bytes(into) == data
    assert files.pieces[0] == blocks.PIECE_BYTES, "small blocks do not tell how fast a disk is"
    assert min(files.pieces) >= blocks.SMALLEST_PIECE
    await disk.close()


def test_the_first_bytes_of_some_buffers() -> None:
    views = [memoryview(bytes([i]) * 4) for i in range(3)]
    assert [bytes(view) for view in up_to(views, 6)] == [b"\0\0\0\0", b"\1\1"]
    assert [len(view) for view in up_to(views, 8)] == [4, 4]
    assert [len(view) for view in up_to(views, 99)] == [4, 4, 4]
