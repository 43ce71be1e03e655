"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import numpy as np
import torch

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.colsum import reference
from kvstore_gpu.compile import TENSOR_CORES, Source, uses_reference
from kvstore_gpu.queries import DIMS, HALVES, WARPS, check, dense, like, paging

KEYS = 64
SOURCE = Source("colsum", [f"column_sums<{FLOATS[kind]}, {dim}>" for kind in HALVES for dim in DIMS], TENSOR_CORES)


def column_sums(
    queries: torch.Tensor,
    positions: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    table: torch.Tensor,
    tokens: int,
    scale: float,
    *,
    values: torch.Tensor | None = None,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Attention that each key gets.

    Parameters
    ----------
    queries : Tensor, bfloat16 or float16, [query, head, dim]
        ``dim``: 64 or 128. Rows may lie apart.
    positions : Tensor, int32, [query]
        Ascending. This is trusted: on a device nobody looks.
    lse : Tensor, float32, [query, head]
        Logarithm of the sum of exponentials of each query's scores, as attention gives it; any strides.
    keys : Tensor, [page, token, kv_head, dim]
        Any strides whose rows are aligned; of the queries' type.
    table : Tensor, int32, [pages]
        Pages of the sequence, in order; they are there.
    tokens : int
        Tokens of the sequence.
    scale : float
    values : Tensor, [page, token, kv_head, dim], optional
        In the same pages: then each sum is multiplied by the length of its key's value.

    Returns
    -------
    Tensor, float32, [kv_head, token]

    Raises
    ------
    InvalidParams
        If shapes, types, strides or devices do not fit.
    """
    group = check(queries, positions, keys, table, tokens)
    count, heads, dim = queries.shape
    if lse.shape != (count, heads) or lse.dtype != torch.float32 or lse.device != queries.device:
        what = f"{tuple(lse.shape)} of {lse.dtype} on {lse.device}"
        raise checks.refuse("lse", f"{what} for {count} queries of {heads} heads on {queries.device}")
    if values is not None:
        like(values, queries, "values")
        if values.shape != keys.shape:
            raise checks.refuse("values", f"{tuple(values.shape)} where keys are {tuple(keys.shape)}")
    if uses_reference(queries.device):
        there = None if values is None else dense(values, table, tokens).float()
        return reference.column_sums(queries.float(), positions, lse, dense(keys, table, tokens).float(), scale, there)
    out = torch.empty((heads // group, tokens), dtype=torch.float32, device=queries.device)
    if not count:
        return out.zero_()
    strides = (np.int64(queries.stride(0)), *lse.stride())
    fetched = (values, *paging(keys if values is None else values)[1:])
    args = (
        queries, positions, lse, *strides, count, group, keys, table, tokens, *paging(keys), *fetched,
        float(scale), out,
    )  # fmt: skip
    grid = (-(-tokens // KEYS), heads // group)
    SOURCE.launch(f"column_sums<{FLOATS[queries.dtype]}, {dim}>", grid, args, queries.device, threads=WARPS * 32,
                  stream=stream)  # fmt: skip
    return out
