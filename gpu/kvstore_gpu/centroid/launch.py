"""Checks, then the kernels on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.centroid import reference
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference

SOURCE = Source("centroid", [*(f"logits<{kind}>" for kind in FLOATS.values()), "normalise"])


def scores(
    query: torch.Tensor,
    centroids: torch.Tensor,
    sizes: torch.Tensor,
    scale: float,
    *,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """How much a query looks at the keys of each centroid.

    Parameters
    ----------
    query : Tensor, [head, dim]
        ``dim``: a multiple of 8.
    centroids : Tensor, [kv_head, centroid, dim]
        Of the query's type.
    sizes : Tensor, float32, [kv_head, centroid]
        Keys of each; those of none get 0.
    scale : float

    Returns
    -------
    Tensor, float32, [kv_head, centroid]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.kv(query, "query", (None, None))
    checks.kv(centroids, "centroids", (None, None, query.shape[1]), query)
    kv_heads, count, dim = centroids.shape
    checks.tensor(sizes, "sizes", shape=(kv_heads, count), dtypes=(torch.float32,), device=query.device)
    if not kv_heads or query.shape[0] % kv_heads or checks.multiple(dim, 8, "dim") % 8:
        raise checks.refuse("query", f"{query.shape[0]} heads over {kv_heads}")
    if uses_reference(query.device):
        return reference.scores(query.float(), centroids.float(), sizes, scale)
    with torch.cuda.stream(stream):
        logits = torch.empty((query.shape[0], count), dtype=torch.float32, device=query.device)
        out = torch.empty((kv_heads, count), dtype=torch.float32, device=query.device)
    if count:
        group = query.shape[0] // kv_heads
        grid = blocks_for(-(-kv_heads * count * 32 // THREADS), query.device, None)
        args = (query, centroids, kv_heads, group, count, dim, float(scale), logits)
        SOURCE.launch(f"logits<{FLOATS[query.dtype]}>", grid, args, query.device, stream=stream)
        SOURCE.launch("normalise", kv_heads, (logits, sizes, group, count, out), query.device, stream=stream)
    return out
