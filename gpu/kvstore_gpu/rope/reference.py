"""The turn, as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Part


def turn(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys ``[token, head, dim]`` turned by a table ``[token or 1, pair]``, in the table's precision.

    Made in `out`, which is other memory than the keys', if it is given.
    """
    pairs = cos.shape[-1]
    keys = keys.to(cos.dtype)
    out = torch.empty_like(keys) if out is None else out
    out[..., 2 * pairs :] = keys[..., 2 * pairs :]
    (first, second), (x, y) = (
        (one[..., 0 : 2 * pairs : 2], one[..., 1 : 2 * pairs : 2])
        if interleaved
        else (one[..., :pairs], one[..., pairs : 2 * pairs])
        for one in (keys, out)
    )
    cos, sin = cos[:, None, :], sin[:, None, :]
    torch.mul(first, cos, out=x).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=y).addcmul_(first, sin)
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
