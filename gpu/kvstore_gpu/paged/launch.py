"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvstore_gpu import jobs
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.jobs import Launch, Listed, Part
from kvstore_gpu.paged import reference

UNITS = (16, 8, 4, 2, 1)
SOURCE = Source("paged", [f"copy_pages<{way}, unit{unit}>" for way in ("false", "true") for unit in UNITS])


def gather(
    cache: PagedCache,
    parts: Sequence[Part],
    block_pages: int,
    *,
    layers: range | None = None,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Copy pages of the cache into blocks.

    Parameters
    ----------
    cache : PagedCache
    parts : sequence of Part
        Which pages go to which places of which blocks.
    block_pages : int
        Pages in a block.
    layers : range, optional
        Layers to copy, one after the other; all by default.
    stream : torch.cuda.Stream, optional
        Where the kernel runs; the device's current stream by default. When this returns it may not have run.
    max_blocks : int, optional
        Most thread blocks to use, so that a busy engine keeps its multiprocessors.

    Raises
    ------
    InvalidParams
        If a page is not there, a block has another size, or memory is out of the device's reach.
    """
    _ready(False, cache, parts, block_pages, layers, stream, max_blocks)(0, len(parts))


def scatter(
    cache: PagedCache,
    parts: Sequence[Part],
    block_pages: int,
    *,
    layers: range | None = None,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Copy blocks into pages of the cache; parameters and errors as of `gather`. No page may be named twice."""
    _ready(True, cache, parts, block_pages, layers, stream, max_blocks)(0, len(parts))


def gathering(
    cache: PagedCache, parts: Sequence[Part], block_pages: int, *, stream: torch.cuda.Stream | None = None
) -> Launch:
    """`gather` in two steps: what is checked and uploaded once, and the launches, each for some of the parts."""
    return _ready(False, cache, parts, block_pages, None, stream, None)


def scattering(
    cache: PagedCache, parts: Sequence[Part], block_pages: int, *, stream: torch.cuda.Stream | None = None
) -> Launch:
    """`scatter` in two steps, as `gathering`."""
    return _ready(True, cache, parts, block_pages, None, stream, None)


def _ready(
    to_pages: bool,
    cache: PagedCache,
    parts: Sequence[Part],
    block_pages: int,
    layers: range | None,
    stream: torch.cuda.Stream | None,
    max_blocks: int | None,
) -> Launch:
    jobs.check(cache, parts, block_pages)
    views = _views(cache, layers)
    if uses_reference(cache.device):
        copy = reference.scatter if to_pages else reference.gather
        return lambda first, last: copy(cache, parts[first:last], block_pages, views)
    listed = Listed(parts, cache.device, stream)
    rows, page = cache.rows, cache.page_nbytes
    unit = next(u for u in UNITS if u <= rows.unit and not (listed.entries["block"] % np.uint64(u)).any())
    units = page // unit
    args = (
        cache.bases, views.start, len(views), np.int64(page), np.int64(page * block_pages), np.int64(rows.page_stride),
        rows.outer_stride, rows.inner, rows.inner_stride, rows.row // unit, units,
    )  # fmt: skip
    threads = min(THREADS, max(32, -(-units // 32) * 32))
    name = f"copy_pages<{str(to_pages).lower()}, unit{unit}>"

    def launch(first: int, last: int) -> None:
        table, count = listed.run(first, last)
        if count and views:
            grid = blocks_for(count * len(views), cache.device, max_blocks)
            SOURCE.launch(name, grid, (table, count, *args), cache.device, threads=threads, stream=stream)

    return launch


def _views(cache: PagedCache, layers: range | None) -> range:
    chosen = cache.chosen(layers)
    return range(chosen.start * cache.sides, chosen.start * cache.sides + len(chosen) * cache.sides)
