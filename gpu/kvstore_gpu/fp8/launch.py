"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvstore.codecs.base import BlockSpec, Context
from kvstore.codecs.fp8 import FP8
from kvstore_gpu import checks, coded, jobs
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import Source, blocks_for, uses_reference
from kvstore_gpu.fp8 import reference
from kvstore_gpu.jobs import Launch, Listed, Part

SOURCE = Source("fp8", [f"{way}<{kind}>" for way in ("unpack", "pack", "pack_heads") for kind in FLOATS.values()])


def unpacking(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> Launch:
    """Make ready to decode blocks into pages: all is checked and uploaded, and launched for some parts at a time.

    Parameters
    ----------
    cache : PagedCache
    parts : sequence of Part
        ``block``: the coded block; ``first``: place of the first page in it.
    spec : BlockSpec
        Of every block.
    coder : FP8
    places : Tensor, int64, [1, layer], on the CPU
        Where each layer's part begins in a block; a multiple of 8.
    stream : torch.cuda.Stream, optional
        Instead of the current one, for what is uploaded and launched.
    max_blocks : int, optional
        Most thread blocks, so that a busy engine keeps its multiprocessors.

    Raises
    ------
    InvalidParams
        If something does not fit.
    """
    _check(cache, parts, spec, coder, places)
    if uses_reference(cache.device):
        every = range(cache.layers)
        return lambda first, last: reference.decode(cache, parts[first:last], spec, (), coder, places, every, Context())
    return _ready("unpack", cache, parts, spec, coder, places, stream, max_blocks, None)


def packing(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    bad: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> Launch:
    """Make ready to encode pages into blocks; parameters and errors as of `unpacking`, and:

    Parameters
    ----------
    parts : sequence of Part
        Each has all pages of its block.
    bad : Tensor, int32, [part], on the cache's device
        Zeros; will not be 0 where a block has values that fp8 with a scale cannot say: it is not to be kept.
    """
    _check(cache, parts, spec, coder, places)
    if any(len(part.pages) * cache.page_tokens != spec.tokens for part in parts):
        raise checks.refuse("parts", "a block is encoded as a whole")
    checks.tensor(bad, "bad", shape=(len(parts),), dtypes=(torch.int32,), device=cache.device)
    if uses_reference(cache.device):
        return _encoding(cache, parts, spec, coder, places, bad)
    lanes = cache.dim // 8
    way = "pack_heads" if coder.scale == "head" and lanes <= 32 and lanes & (lanes - 1) == 0 else "pack"
    return _ready(way, cache, parts, spec, coder, places, stream, max_blocks, bad)


def _encoding(
    cache: PagedCache, parts: Sequence[Part], spec: BlockSpec, coder: FP8, places: torch.Tensor, bad: torch.Tensor
) -> Launch:
    """The reference."""

    def launch(first: int, last: int) -> None:
        good = reference.encode(cache, parts[first:last], spec, (), coder, places, Context(),
                                lambda unit: reference.fits(unit, cache.dtype))  # fmt: skip
        bad[first:last] = ~torch.tensor(good, dtype=torch.bool)

    return launch


def _check(cache: PagedCache, parts: Sequence[Part], spec: BlockSpec, coder: FP8, places: torch.Tensor) -> None:
    coded.check(cache, parts, spec, coder, places)
    if (places % 8).any() or (2 * spec.tokens * (spec.kv_heads if coder.scale == "head" else 1)) % 8:
        raise checks.refuse("places", "a part, or its codes, do not begin at a multiple of 8")


def _ready(
    way: str,
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    stream: Any,
    max_blocks: int | None,
    bad: torch.Tensor | None,
) -> Launch:
    if sum(len(part.pages) for part in parts) * cache.layers * 2 >> 31:
        raise checks.refuse("parts", "too many pages to be counted in 31 bits")
    listed = Listed(parts, cache.device, stream)
    page, token, head, _ = (stride * cache.sample.element_size() for stride in cache.sample.stride())
    there = jobs.constant(places.contiguous().numpy().tobytes(), cache.device)
    args = (
        cache.bases, there, 0, cache.layers, np.int64(page), token, head, cache.page_tokens, cache.heads,
        cache.dim, spec.tokens, coder.scale == "head",
    )  # fmt: skip

    def launch(first: int, last: int) -> None:
        table, count = listed.run(first, last)
        if count:
            flags = () if bad is None else (bad[first:],)
            grid = blocks_for(count * cache.layers * 2, cache.device, max_blocks)
            SOURCE.launch(f"{way}<{FLOATS[cache.dtype]}>", grid, (table, count, *args, *flags), cache.device,
                          stream=stream)  # fmt: skip

    return launch
