"""Gather and scatter, as they are defined."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Part


def gather(cache: PagedCache, parts: Sequence[Part], block_pages: int, views: range) -> None:
    """Copy pages into their places in blocks."""
    for part, inside, paged in _pairs(cache, parts, block_pages, views):
        inside.copy_(paged[list(part.pages)])


def scatter(cache: PagedCache, parts: Sequence[Part], block_pages: int, views: range) -> None:
    """Copy places of blocks into pages."""
    for part, inside, paged in _pairs(cache, parts, block_pages, views):
        paged[list(part.pages)] = inside


def _pairs(cache: PagedCache, parts: Sequence[Part], block_pages: int, views: range):
    for part in parts:
        shape = (cache.layers * cache.sides, block_pages, *cache.sample.shape[1:])
        block = part.block.view(cache.dtype).view(shape)
        for view in views:
            here = block[view, part.first : part.first + len(part.pages)]
            yield part, here, cache.views[view // cache.sides][view % cache.sides]
