"""Lists of pages to move, as the kernels read them: 16 bytes each, address of the block, page, place in the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from kvstore_gpu import checks, host
from kvstore_gpu.cache import PagedCache

Launch = Callable[[int, int], None]
"""Gives the device the work on some of the parts that were made ready together: from one on, up to another."""

JOB = np.dtype([("block", "<u8"), ("page", "<i4"), ("place", "<i4")])


class Part(NamedTuple):
    """Pages of one block to move.

    Attributes
    ----------
    block : Tensor, uint8, [nbytes]
        The whole block, ``[layer][side][page][token][head][dim]``: on the cache's device, or host memory that is
        registered with it (`kvstore_gpu.host`).
    pages : sequence of int
        Pages of the cache.
    first : int
        Place in the block of the first of them; the others follow.
    position : int
        Position of the block's first token in its prompt, for codes that turn keys.
    """

    block: torch.Tensor
    pages: Sequence[int]
    first: int = 0
    position: int = 0


class HostPart(NamedTuple):
    """As `Part`, with the block in host memory, perhaps in several pieces.

    Attributes
    ----------
    pieces : sequence of Tensor, uint8
        The block's bytes, in order, in registered memory.
    """

    pieces: Sequence[torch.Tensor]
    pages: Sequence[int]
    first: int = 0
    position: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return sum(piece.numel() for piece in self.pieces)


def check(cache: PagedCache, parts: Sequence[Part], block_pages: int) -> None:
    """Refuse parts that do not fit the cache."""
    nbytes = cache.block_nbytes(block_pages)
    cache.check_ids([page for part in parts for page in part.pages], "pages")
    for part in parts:
        block = part.block
        if block.dtype != torch.uint8 or block.shape != (nbytes,) or not block.is_contiguous():
            raise checks.refuse("block", f"{tuple(block.shape)} of {block.dtype}: {nbytes} bytes are needed")
        if not 0 <= part.first <= block_pages - len(part.pages):
            raise checks.refuse("first", f"{len(part.pages)} pages from {part.first} on in a block of {block_pages}")


def table(parts: Sequence[Part], addresses: Sequence[int]) -> np.ndarray:
    """One entry a page, of parts whose blocks have these addresses for the device."""
    counts = [len(part.pages) for part in parts]
    jobs = np.empty(sum(counts), JOB)
    jobs["block"] = np.repeat(np.array(addresses, np.uint64), counts)
    jobs["page"] = [page for part in parts for page in part.pages]
    jobs["place"] = [
        place for part, n in zip(parts, counts, strict=True) for place in range(part.first, part.first + n)
    ]
    return jobs


class Listed:
    """The jobs of parts on the device: brought there once, for launches that take some of the parts each.

    Parameters
    ----------
    parts : sequence of Part
    device : torch.device
    stream : torch.cuda.Stream or None

    Attributes
    ----------
    entries : ndarray
        All of them, as they are on the host.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.entries = table(parts, host.addresses([part.block for part in parts], device))
        self._there = upload(self.entries, device, stream)
        self._before = [0, *accumulate(len(part.pages) for part in parts)]

    def before(self, part: int) -> int:
        """Pages of the parts before one."""
        return self._before[part]

    def run(self, first: int, last: int) -> tuple[torch.Tensor, int]:
        """The jobs of the parts from `first` on up to `last`, and how many they are."""
        begin, end = self._before[first], self._before[last]
        return self._there[begin * JOB.itemsize : end * JOB.itemsize], end - begin


def chained(runs: Sequence[tuple[int, Launch]]) -> Launch:
    """One launch of several, each for so many parts, one after the other."""

    def launch(first: int, last: int) -> None:
        for count, one in runs:
            if first < count and last > 0:
                one(max(first, 0), min(last, count))
            first, last = first - count, last - count

    return launch


def upload(jobs: np.ndarray, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """A table on the device. From pinned memory: a copy from any other would wait for all that is queued."""
    made = torch.from_numpy(jobs.view(np.uint8))
    if device.type == "cpu" or not len(made):
        return made
    with torch.cuda.stream(stream):
        return made.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=256)
def constant(data: bytes, device: torch.device) -> torch.Tensor:
    """Bytes that many calls need, on the device; brought there once."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
