"""Blocks that a codec made, as kernels meet them: where parts begin, and the way through the codec on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from kvstore.codecs.base import BlockCoder, BlockSpec, BlockStep, Context
from kvstore.errors import CannotEncode
from kvstore_gpu import checks
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.jobs import Part


def spec_of(cache: PagedCache, tokens: int, position: int = 0) -> BlockSpec:
    """The block of so many tokens of a cache."""
    return BlockSpec(cache.layers, tokens, cache.heads, cache.dim, str(cache.dtype).removeprefix("torch."), position)


@lru_cache(maxsize=64)
def sizes_of(coder: BlockCoder, spec: BlockSpec) -> torch.Tensor:
    """Bytes of each part, int64 ``[plane, layer]``."""
    one = spec.of(1)
    return torch.tensor([coder.planes(one, layer, Context()) for layer in range(spec.layers)]).T.contiguous()


def offsets(coder: BlockCoder, spec: BlockSpec, start: int = 0) -> torch.Tensor:
    """Where parts begin, int64 ``[plane, layer]``, laid out plane after plane from ``start`` on, as a frame does."""
    sizes = sizes_of(coder, spec)
    flat = sizes.reshape(-1)
    return (flat.cumsum(0) - flat + start).view(sizes.shape)


def nbytes(coder: BlockCoder, spec: BlockSpec) -> int:
    """Bytes of all parts."""
    return int(sizes_of(coder, spec).sum())


def check(cache: PagedCache, parts: Sequence[Part], spec: BlockSpec, coder: BlockCoder, places: torch.Tensor) -> None:
    """Refuse what does not fit: the cache, the pages, or parts that would lie outside a block."""
    if cache.sides != 2 or cache.dtype not in FLOATS or cache.dim % 8 or cache.rows.unit != 16:
        raise checks.refuse("cache", f"K and V in {cache.dtype} with heads of {cache.dim} and aligned rows are needed")
    if spec != spec_of(cache, spec.tokens, spec.position) or spec.tokens % cache.page_tokens:
        raise checks.refuse("spec", f"{spec} is no block of whole pages of this cache")
    sizes = sizes_of(coder, spec)
    planes = len(places)
    fits = places.dim() == 2 and places.dtype == torch.int64 and places.shape[1] == spec.layers
    if not fits or not 0 < planes <= len(sizes):
        raise checks.refuse("places", f"{tuple(places.shape)} of {places.dtype}: [plane, layer] of int64 are needed")
    end = int((places + sizes[:planes]).max())
    if int(places.min()) < 0 or bool((places % 4).any()):
        raise checks.refuse("places", "a part begins before the block, or not at a multiple of 4")
    block_pages = spec.tokens // cache.page_tokens
    cache.check_ids([page for part in parts for page in part.pages], "pages")
    for part in parts:
        checks.tensor(part.block, "block", shape=(None,), dtypes=(torch.uint8,), align=16)
        if part.block.numel() < end or not 0 <= part.first <= block_pages - len(part.pages):
            raise checks.refuse("block", f"{part.block.numel()} bytes, {len(part.pages)} pages from {part.first} on")


def decode(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    steps: Sequence[BlockStep],
    coder: BlockCoder,
    places: torch.Tensor,
    layers: range,
    context: Context,
) -> None:
    """The reference of every unpack: through the codec itself."""
    one = spec.of(1)
    for part in parts:
        data = part.block.numpy()
        for layer in layers:
            sizes = coder.planes(one, layer, context)
            planes = [data[at : at + size] for at, size in zip(places[:, layer].tolist(), sizes, strict=False)]
            unit = torch.empty(one.shape, dtype=torch.float32)
            coder.decode(planes, one, layer, unit, context)
            for step in reversed(steps):
                unit = step.inverse(unit, one, layer, context)
            paged = unit.view(2, -1, *cache.sample.shape[1:])[:, part.first : part.first + len(part.pages)]
            for side in range(2):
                cache.views[layer][side][list(part.pages)] = paged[side].to(cache.dtype)


def encode(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    steps: Sequence[BlockStep],
    coder: BlockCoder,
    places: torch.Tensor,
    context: Context,
    fits: Callable[[torch.Tensor], bool],
) -> list[bool]:
    """The reference of every pack: through the codec itself.

    Returns
    -------
    list of bool
        Of each part, whether the codec can say all of its values, and ``fits`` has nothing against any layer of them.
    """
    good = []
    for part in parts:
        try:
            good.append(_encode(cache, part, spec, steps, coder, places, context, fits))
        except CannotEncode:
            good.append(False)
    return good


def _encode(
    cache: PagedCache,
    part: Part,
    spec: BlockSpec,
    steps: Sequence[BlockStep],
    coder: BlockCoder,
    places: torch.Tensor,
    context: Context,
    fits: Callable[[torch.Tensor], bool],
) -> bool:
    one, data, good = spec.of(1), part.block.numpy(), True
    for layer in range(spec.layers):
        sides = [cache.views[layer][side][list(part.pages)].float() for side in range(2)]
        unit = torch.stack(sides).view(one.shape)
        for step in steps:
            unit = step.forward(unit, one, layer, context)
        good = good and fits(unit)
        sizes = coder.planes(one, layer, context)
        planes = [data[at : at + size] for at, size in zip(places[:, layer].tolist(), sizes, strict=False)]
        coder.encode(unit, one, layer, planes, context)
    return good
