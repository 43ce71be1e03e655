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
from kvstore_gpu.jobs import Part

SOURCE = Source("fp8", [f"{way}<{kind}>" for way in ("unpack", "pack", "pack_heads") for kind in FLOATS.values()])


def unpack(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    *,
    layers: range | None = None,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Decode blocks into pages.

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
    layers : range, optional
        Layers to decode; all by default.

    Raises
    ------
    InvalidParams
        If something does not fit.
    """
    chosen = _check(cache, parts, spec, coder, places, layers)
    if uses_reference(cache.device):
        reference.decode(cache, parts, spec, (), coder, places, chosen, Context())
    else:
        _run("unpack", cache, parts, spec, coder, places, chosen, stream, max_blocks, None)


def pack(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> torch.Tensor:
    """Encode pages into blocks; parameters and errors as of `unpack`. Each part has all pages of its block.

    Returns
    -------
    Tensor, int32, [1], on the cache's device
        Not 0 if there are values that fp8 with a scale cannot say: the blocks are not to be kept.
    """
    chosen = _check(cache, parts, spec, coder, places, None)
    if any(len(part.pages) * cache.page_tokens != spec.tokens for part in parts):
        raise checks.refuse("parts", "a block is encoded as a whole")
    if uses_reference(cache.device):
        reference.encode(cache, parts, spec, (), coder, places, Context())
        return torch.zeros(1, dtype=torch.int32)
    with torch.cuda.stream(stream):
        bad = torch.zeros(1, dtype=torch.int32, device=cache.device)
    lanes = cache.dim // 8
    way = "pack_heads" if coder.scale == "head" and lanes <= 32 and lanes & (lanes - 1) == 0 else "pack"
    _run(way, cache, parts, spec, coder, places, chosen, stream, max_blocks, bad)
    return bad


def _check(
    cache: PagedCache, parts: Sequence[Part], spec: BlockSpec, coder: FP8, places: torch.Tensor, layers: range | None
) -> range:
    coded.check(cache, parts, spec, coder, places)
    if (places % 8).any() or (2 * spec.tokens * (spec.kv_heads if coder.scale == "head" else 1)) % 8:
        raise checks.refuse("places", "a part, or its codes, do not begin at a multiple of 8")
    chosen = range(cache.layers) if layers is None else layers
    if len(chosen) and not (chosen.start >= 0 and chosen.stop <= cache.layers and chosen.step == 1):
        raise checks.refuse("layers", f"{chosen} of {cache.layers}")
    return chosen


def _run(
    way: str,
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: FP8,
    places: torch.Tensor,
    layers: range,
    stream: Any,
    max_blocks: int | None,
    bad: torch.Tensor | None,
) -> None:
    count = sum(len(part.pages) for part in parts)
    if not count or not layers:
        return
    if count * len(layers) * 2 >> 31:
        raise checks.refuse("parts", "too many pages to be counted in 31 bits")
    page, token, head, _ = (stride * cache.sample.element_size() for stride in cache.sample.stride())
    there = jobs.constant(places.contiguous().numpy().tobytes(), cache.device)
    args = (
        coded.table(cache, parts, stream), count, cache.bases, there,
        layers.start, len(layers), np.int64(page), token, head, cache.page_tokens, cache.heads, cache.dim, spec.tokens,
        coder.scale == "head", *([] if bad is None else [bad]),
    )  # fmt: skip
    grid = blocks_for(count * len(layers) * 2, cache.device, max_blocks)
    SOURCE.launch(f"{way}<{FLOATS[cache.dtype]}>", grid, args, cache.device, stream=stream)
