"""Many calls of the disk tier at once, in files that answer when they like, in too little room, under damage.

Whatever the order: no wrong byte, the budget kept by the real files, and in the end index, files and totals agree.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from disks import file_of, opened, real_bytes

from kvstore.testing.faults import WatchedFiles
from kvstore.testing.tier_kit import block_of, header_of, joined, pages, payload_of, scope_of
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockId, Hit, Miss, MissReason

SIZES = (3_000, 20_000, 50_000, 120_000)
"""A block may be replaced by one of another size: then its bytes are the first of the same payload."""
CAPACITY = 900_000
BLOCKS = [block_of(number, scope_of(number % 3)) for number in range(24)]
WHOLE = {block: payload_of(block, max(SIZES)) for block in BLOCKS}


class TardyFiles(WatchedFiles):
    """Files whose calls now and then take a while."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def before(self, number: int, name: str) -> None:
        if self._random.random() < 0.2:
            time.sleep(self._random.random() * 0.003)


class Calls:
    """What clients, the ladder and a bad disk do to one tier, at random."""

    def __init__(self, tier: DiskTier, root: Path, seed: int) -> None:
        self.tier, self.root = tier, root
        self.random = random.Random(seed)
        self.damaged: set[BlockId] = set()

    async def client(self, steps: int) -> None:
        """One after the other."""
        verbs = [
            self.put,
            self.replace,
            self.get,
            self.peek,
            self.drop,
            self.clear,
            self.describe,
            self.damage,
            self.check,
        ]
        weights = [16, 8, 16, 4, 2, 1, 2, 3, 0.1]
        for _ in range(steps):
            (verb,) = self.random.choices(verbs, weights)
            await verb(self.random.choice(BLOCKS))
            assert self.tier.usage().used <= CAPACITY

    async def put(self, block: BlockId) -> None:
        nbytes = self.random.choice(SIZES)
        views, durable = pages(nbytes, content=WHOLE[block][:nbytes]), self.random.random() < 0.2
        await self.tier.put(block, header_of(block), views, nbytes, durable=durable)

    async def replace(self, block: BlockId) -> None:
        nbytes = self.random.choice(SIZES)
        await self.tier.replace(block, header_of(block), pages(nbytes, content=WHOLE[block][:nbytes]), nbytes)

    async def get(self, block: BlockId) -> None:
        await self._read(block, used=True)

    async def peek(self, block: BlockId) -> None:
        await self._read(block, used=False)

    async def _read(self, block: BlockId, used: bool) -> None:
        nbytes = self.tier.size(block)
        if nbytes is None:
            return
        into = pages(nbytes)
        outcome = await (self.tier.get if used else self.tier.peek)(block, into)
        if isinstance(outcome, Hit):
            assert outcome == Hit(header_of(block), nbytes)
            assert joined(into) == WHOLE[block][:nbytes]
        else:
            assert isinstance(outcome, Miss)
            assert outcome.reason != MissReason.CORRUPT or block in self.damaged

    async def drop(self, block: BlockId) -> None:
        await self.tier.drop(block)

    async def clear(self, block: BlockId) -> None:
        await self.tier.clear(block.scope)

    async def describe(self, block: BlockId) -> None:
        await self.tier.describe(block.scope, b"a description")

    async def check(self, block: BlockId) -> None:
        await self.tier.check(fix=True)

    async def damage(self, block: BlockId) -> None:
        """Somebody else changes, cuts or removes a file."""
        try:
            file = file_of(self.root, block)
            self.damaged.add(block)
            if self.random.random() < 0.4:
                file.unlink()
            else:
                size = file.stat().st_size
                os.truncate(file, self.random.randrange(size)) if self.random.random() < 0.3 else _flip(file, size // 2)
        except (ValueError, OSError):  # it is not there, or there are two of it
            return


def _flip(file: Path, at: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("seed", range(int(os.environ.get("KVSTORE_TEST_RACES", "6"))))
async def test_index_files_and_budget_agree_after_any_calls_at_once(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "t"
    for life in range(3):  # what a start finds is cold until it is used: that has ways of its own
        async with opened(root, CAPACITY, files=TardyFiles(seed), policy="lru") as tier:
            calls = Calls(tier, root, 10 * seed + life)
            await asyncio.gather(*(calls.client(60) for _ in range(8)))
            assert not tier._store.busy
            assert not tier._index.open_reads
            found = {finding.what for finding in await tier.check(fix=True)}
            assert found <= {"corrupt file", "wrong size", "missing file"}, found
            assert await tier.check() == []
            assert tier._index.total() == tier.usage().used
            assert real_bytes(root) <= tier.usage().used
