"""A block in host memory: where it lies, and what keeps it there."""

from __future__ import annotations

import time

import msgspec

from kvstore.arena import PAGE_BYTES
from kvstore.eviction.cost import recompute_cost
from kvstore.eviction.partitions import Facts
from kvstore.types import BlockHeader, BlockId, Extent

INDEX_BYTES = 1024
"""What one block costs beside its payload: its entry, its place in the order, its names. Headers come on top."""


class HostBlock:
    """A block in the arena.

    Attributes
    ----------
    footprint : int
        Bytes of arena pages it occupies.
    refs : int
        Leases that read it now. It keeps its memory while there are any, even after it was dropped.
    dirty : int
        Lower tiers that have yet to be told of it.
    since : float
        Monotonic time at which it came.
    gone : bool
        No longer in the index; its memory goes back with the last reference.
    """

    __slots__ = (
        "dirty",
        "extents",
        "footprint",
        "gone",
        "header",
        "header_bytes",
        "id",
        "nbytes",
        "refs",
        "since",
    )

    def __init__(
        self, block: BlockId, header_bytes: bytes, header: BlockHeader, nbytes: int, extents: tuple[Extent, ...]
    ):
        self.id = block
        self.header = header
        self.header_bytes = header_bytes
        self.nbytes = nbytes
        self.extents = extents
        self.footprint = footprint_of(extents)
        self.refs = 0
        self.dirty = 0
        self.since = time.monotonic()
        self.gone = False

    @property
    def index_bytes(self) -> int:
        """Bytes it costs beside its payload."""
        return INDEX_BYTES + len(self.header_bytes)

    def facts(self) -> Facts:
        """What an eviction order asks: bytes, cost to compute it again, and the block before it."""
        parent = BlockId(self.id.scope, self.header.parent) if self.header.parent else None
        return self.nbytes, recompute_cost(self.header, self.nbytes), parent


def footprint_of(extents: tuple[Extent, ...]) -> int:
    """Bytes of arena pages that some extents occupy."""
    return sum([-(-extent.nbytes // PAGE_BYTES) for extent in extents]) * PAGE_BYTES


def encode_header(header: BlockHeader) -> bytes:
    """A block header as it travels."""
    return msgspec.msgpack.encode(header)
