"""The turn, as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Part


def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Keys ``[token, head, dim]`` turned by a table ``[token or 1, pair]``, in the table's precision."""
    pairs = cos.shape[-1]
    out = keys.to(cos.dtype, copy=True)
    part = out[..., : 2 * pairs]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    cos, sin = cos[:, None, :], sin[:, None, :]
    new = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(new)
    return out


def scatter(
    cache: PagedCache,
    parts: Sequence[Part],
    block_pages: int,
    layers: range,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    skipped: frozenset[int],
) -> None:
    """Copy places of blocks into pages, keys turned."""
    shape = (cache.layers, 2, block_pages, *cache.sample.shape[1:])
    row = 0
    for part in parts:
        block, pages = part.block.view(cache.dtype).view(shape), list(part.pages)
        tokens = len(pages) * cache.page_tokens
        table = (cos, sin) if len(cos) == 1 else (cos[row : row + tokens], sin[row : row + tokens])
        row += tokens
        for layer in layers:
            keys, values = block[layer, :, part.first : part.first + len(pages)]
            if layer not in skipped:
                keys = turn(keys.reshape(tokens, cache.heads, cache.dim), *table, interleaved).view(keys.shape)
            cache.views[layer][0][pages] = keys.to(cache.dtype)
            cache.views[layer][1][pages] = values
