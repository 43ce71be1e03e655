"""What tests of tiers share: blocks whose payloads follow from their names, buffers as tiers get them, one to try."""

from __future__ import annotations

import hashlib
import itertools
import mmap
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kvstore.tiers.base import Tier
from kvstore.types import BlockHeader, BlockId, Hit, Miss, Scope

PAGE = 16 * 1024
KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 4095, 4096, 4097, PAGE, PAGE + 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17)


def scope_of(number: int = 0, domain: str = "u0") -> Scope:
    """A scope of its own for each number."""
    return Scope(domain, hashlib.sha256(f"ns {number}".encode()).digest())


def block_of(number: int, scope: Scope | None = None) -> BlockId:
    """A block of its own for each number."""
    return BlockId(scope if scope is not None else scope_of(), hashlib.sha256(f"key {number}".encode()).digest())


def payload_of(block: BlockId, nbytes: int) -> bytes:
    """The bytes that this block holds in every test."""
    seed = int.from_bytes(hashlib.sha256(repr(block).encode()).digest()[:8], "little")
    return np.random.default_rng(seed).bytes(nbytes)


def header_of(block: BlockId) -> BlockHeader:
    """The header that this block has in every test."""
    return BlockHeader(parent=block.key[::-1], tokens=block.key * 4, position=block.key[0] * 256)


def pages(nbytes: int, cuts: Sequence[int] = (), content: bytes | None = None) -> list[memoryview]:
    """Page-aligned memory of `nbytes`, cut after some pages, as an arena gives it."""
    memory = memoryview(mmap.mmap(-1, -(-max(nbytes, 1) // PAGE) * PAGE))[:nbytes]
    if content is not None:
        memory[:] = content
    edges = [0, *(cut * PAGE for cut in cuts if cut * PAGE < nbytes), nbytes]
    return [memory[a:b] for a, b in itertools.pairwise(edges)]


def joined(views: Sequence[memoryview]) -> bytes:
    """The bytes of some buffers."""
    return b"".join(views)


async def store(tier: Tier, block: BlockId, nbytes: int, *, durable: bool = False, cuts: Sequence[int] = ()) -> object:
    """Put a block's own payload."""
    views = pages(nbytes, cuts, payload_of(block, nbytes))
    return await tier.put(block, header_of(block), views, nbytes, durable=durable)


async def load(tier: Tier, block: BlockId, nbytes: int, cuts: Sequence[int] = ()) -> bool:
    """Get a block; whether it was there. A hit with one wrong byte fails the test."""
    into = pages(nbytes, cuts)
    outcome = await tier.get(block, into)
    if isinstance(outcome, Miss):
        return False
    assert outcome == Hit(header_of(block), nbytes)
    assert joined(into) == payload_of(block, nbytes)
    return True


class TierMaker(ABC):
    """What the suite has to know of a tier.

    Attributes
    ----------
    persistent : bool
        Whether blocks outlive the tier's object.
    bounded : bool
        Whether the tier itself holds a byte budget and evicts.
    capacity : int
        Budget of the tier under test where a test names no other.
    """

    persistent = False
    bounded = True
    capacity = 64 * MIB

    @abstractmethod
    async def make(self, capacity: int, place: Path) -> Tier:
        """A tier that is not started, with its data at `place` if it is persistent."""

    async def damage(self, tier: Tier, block: BlockId) -> None:
        """Change one stored payload byte of a block, past the tier."""
        pytest.skip("this tier's test cannot reach its bytes")

    @pytest_asyncio.fixture
    async def tier(self, tmp_path: Path) -> AsyncIterator[Tier]:
        """A started tier."""
        made = await self.make(self.capacity, tmp_path / "tier")
        await made.start()
        yield made
        await made.close()

    async def small(self, tmp_path: Path, blocks: int, nbytes: int) -> Tier:
        """A started tier in which about so many blocks of a size have room."""
        if not self.bounded:
            pytest.skip("this tier has no budget of its own")
        probe = await self.make(self.capacity, tmp_path / "probe")
        await probe.start()
        empty = probe.usage().used
        await store(probe, block_of(0), nbytes)
        one = probe.usage().used - empty
        await store(probe, block_of(1), nbytes)
        two = probe.usage().used - empty - one
        await probe.close()
        made = await self.make(empty + one + (blocks - 1) * two + two // 2, tmp_path / "small")
        await made.start()
        return made
