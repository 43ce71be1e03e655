"""Attention of scattered queries over a whole prompt, with true causal positions, and where its mass goes.

A query at position p sees the keys at positions up to p, however many queries were left out before it. A triangle
aligned to the last key, as ordinary causal kernels use, lets a recomputed token see its own future and is worse than no
repair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvstore_gpu.segments import masses

if TYPE_CHECKING:
    from torch import Tensor

_MASK_ELEMENTS = 1 << 26
"""Queries are taken in pieces so that no mask and no table of scores is larger."""


def _pieces(queries: int, keys: int) -> Iterator[slice]:
    step = max(1, _MASK_ELEMENTS // max(1, keys))
    for start in range(0, queries, step):
        yield slice(start, start + step)


def _seen(positions: Tensor, keys: int) -> Tensor:
    return torch.arange(keys, device=positions.device)[None] <= positions[:, None]


def attend(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention of rotated queries at true positions.

    Parameters
    ----------
    queries : Tensor
        ``[n, heads, dim]``.
    keys, values : Tensor
        ``[keys, kv_heads, dim]``, of positions 0, 1, 2, ...
    positions : Tensor
        ``[n]``, rising; a query sees keys up to its own position.

    Returns
    -------
    Tensor
        ``[n, heads * dim]``.
    """
    if queries.device.type == "cpu":
        return attend_in_pieces(queries, keys, values, positions, scale)
    return attend_fused(queries, keys, values, positions, scale)


def attend_fused(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """As `attend`, by torch's fused kernel under a mask; the positions may be in any order."""
    # A head of its own for every query head: under a mask, groups would be multiplied out in float32.
    group = queries.shape[1] // keys.shape[1]
    k, v = (rows.to(queries.dtype).repeat_interleave(group, 1).transpose(0, 1)[None] for rows in (keys, values))
    out = torch.empty_like(queries)
    for piece in _pieces(len(queries), len(keys)):
        q = queries[piece].transpose(0, 1)[None]
        mask = _seen(positions[piece], len(keys))
        out[piece] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)
    return out.flatten(1)


PIECE = 32
"""Queries that are multiplied with the keys at once: few enough that most keys behind them are left out."""


def attend_in_pieces(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """As `attend`, for sorted positions, on a CPU: torch's fused kernel, over half of the products.

    Each piece of queries sees the keys up to its last position only, and the heads of a group are queries of one head,
    so that nothing is repeated. Under a mask over all keys, a head for each, it takes three times as long.

    Parameters
    ----------
    queries : Tensor
        ``[n, heads, dim]``, in the order of their positions.
    keys, values : Tensor
        ``[keys, kv_heads, dim]``.
    positions : Tensor
        ``[n]``, rising.
    """
    count, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    k, v = (rows.to(queries.dtype).transpose(0, 1)[None] for rows in (keys, values))
    out = torch.empty_like(queries).view(count, kv_heads, group, dim)
    for start in range(0, count, PIECE):
        here = positions[start : start + PIECE]
        size, last = len(here), int(here[-1]) + 1
        asked = queries[start : start + size].view(size, kv_heads, group, dim).transpose(0, 1)
        mask = _seen(here, last).repeat_interleave(group, 0)
        found = scaled_dot_product_attention(
            asked.reshape(1, kv_heads, size * group, dim), k[:, :, :last], v[:, :, :last], attn_mask=mask, scale=scale
        )
        out[start : start + size] = found.view(kv_heads, size, group, dim).transpose(0, 1)
    return out.view(count, -1)


def scores(queries: Tensor, keys: Tensor, positions: Tensor, scale: float, open_keys: int = 0) -> Tensor:
    """Products of queries and keys ``[heads, n, keys]`` in float32; minus infinity where a key is behind its query.

    The first ``open_keys`` are known to be behind none of them.
    """
    n, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    # All queries of a group in one matrix: multiplied as a batch of heads, keys would be copied for each of them.
    grouped = queries.transpose(0, 1).reshape(kv_heads, heads // kv_heads * n, dim)
    products = _products(grouped, keys.permute(1, 2, 0)).mul_(scale).view(heads, n, -1)
    products[..., open_keys:].masked_fill_(~_seen(positions - open_keys, len(keys) - open_keys), -torch.inf)
    return products


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, summed up and given in float32."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def column_sums(queries: Tensor, keys: Tensor, scale: float, values: Tensor | None = None) -> Tensor:
    """Attention that each key gets from the queries of the last positions, float32 ``[kv_heads, keys]``.

    Summed over queries, and over the heads that share a KV head; with values, as many at least as keys, multiplied by
    the length of the value that the key fetches.
    """
    first = len(keys) - len(queries)
    table = scores(queries, keys, torch.arange(first, len(keys), device=keys.device), scale, first).softmax(-1)
    sums = table.sum(1).view(keys.shape[1], -1, len(keys)).sum(1)
    if values is not None:
        sums *= torch.linalg.vector_norm(values[: len(keys)], dim=-1, dtype=torch.float32).T
    return sums


def segment_masses(
    queries: Tensor, keys: Tensor, positions: Tensor, scale: float, segments: Sequence[tuple[int, int]]
) -> Tensor:
    """Mass that each query puts on each half-open range of keys, a mean over heads: ``[segments, n]``.

    Made from log-sum-exp a segment, as split attention kernels have it anyway: exp(LSE_segment - LSE_all). No table of
    attention is kept.
    """
    found = []
    for rows in _pieces(len(queries), len(keys) * queries.shape[1]):
        table = scores(queries[rows], keys, positions[rows], scale)
        whole = table.logsumexp(-1)
        found.append(masses(torch.stack([table[..., a:b].logsumexp(-1) for a, b in segments]), whole))
    return torch.cat(found, 1)


def runs(positions: Tensor) -> list[tuple[int, int]]:
    """Maximal contiguous half-open runs of sorted positions.

    An engine presents each run to its paged attention as a sequence of its own, with as many queries as the run is long
    and as many keys as its end, over one block table; the stock causal mask is then exact.
    """
    found: list[tuple[int, int]] = []
    for p in positions.tolist():
        if found and found[-1][1] == p:
            found[-1] = (found[-1][0], p + 1)
        else:
            found.append((p, p + 1))
    return found
