"""Lists of pages to move, as the kernels read them: 16 bytes each, address of the block, page, place in the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kvstore_gpu import checks
from kvstore_gpu.cache import PagedCache

JOB = np.dtype([("block", "<u8"), ("page", "<i4"), ("place", "<i4")])


@dataclass(frozen=True)
class Part:
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


@dataclass(frozen=True)
class HostPart:
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
    for part in parts:
        block = part.block
        if block.dtype != torch.uint8 or block.shape != (nbytes,) or not block.is_contiguous():
            raise checks.refuse("block", f"{tuple(block.shape)} of {block.dtype}: {nbytes} bytes are needed")
        cache.check_ids(part.pages, "pages")
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


def upload(jobs: np.ndarray, device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """A table on the device. From pinned memory: a copy from any other would wait for all that is queued."""
    made = torch.from_numpy(jobs.view(np.uint8))
    if device.type == "cpu":
        return made
    with torch.cuda.stream(stream):
        return made.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=256)
def constant(data: bytes, device: torch.device) -> torch.Tensor:
    """Bytes that many calls need, on the device; brought there once."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
