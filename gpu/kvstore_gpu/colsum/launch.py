"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.colsum import reference
from kvstore_gpu.compile import TENSOR_CORES, Source, uses_reference
from kvstore_gpu.queries import DIMS, HALVES, WARPS, check, dense, paging

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
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Attention that each key gets.

    Parameters
    ----------
    queries : Tensor, bfloat16 or float16, [query, head, dim]
        ``dim``: 64 or 128.
    positions : Tensor, int32, [query]
        Ascending. This is trusted: on a device nobody looks.
    lse : Tensor, float32, [query, head]
        Logarithm of the sum of exponentials of each query's scores, as attention gives it.
    keys : Tensor, [page, token, kv_head, dim]
        Any strides whose rows are aligned; of the queries' type.
    table : Tensor, int32, [pages]
        Pages of the sequence, in order; they are there.
    tokens : int
        Tokens of the sequence.
    scale : float

    Returns
    -------
    Tensor, float32, [kv_head, token]

    Raises
    ------
    InvalidParams
        If shapes, types, strides or devices do not fit.
    """
    group = check(queries, positions, keys, table, tokens)
    checks.tensor(lse, "lse", shape=queries.shape[:2], dtypes=(torch.float32,), device=queries.device)
    count, heads, dim = queries.shape
    if uses_reference(queries.device):
        return reference.column_sums(queries.float(), positions, lse, dense(keys, table, tokens).float(), scale)
    out = torch.zeros((heads // group, tokens), dtype=torch.float32, device=queries.device)
    if count:
        args = (queries, positions, lse, count, heads, group, keys, table, tokens, *paging(keys), float(scale), out)
        grid = (-(-tokens // KEYS), heads // group)
        SOURCE.launch(f"column_sums<{FLOATS[queries.dtype]}, {dim}>", grid, args, queries.device, threads=WARPS * 32,
                      stream=stream)  # fmt: skip
    return out
