"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import numpy as np
import torch

from kvstore_gpu import checks
from kvstore_gpu.attention import reference
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TENSOR_CORES, Source, uses_reference

DIMS = (64, 128)
HALVES = (torch.bfloat16, torch.float16)
ROWS, WARPS = 64, 4
SOURCE = Source("attention", [f"attend<{FLOATS[kind]}, {dim}>" for kind in HALVES for dim in DIMS], TENSOR_CORES)


def attend(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    tokens: int,
    scale: float,
    *,
    stream: torch.cuda.Stream | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with true causal positions.

    Parameters
    ----------
    queries : Tensor, bfloat16 or float16, [query, head, dim]
        ``dim``: 64 or 128.
    positions : Tensor, int32, [query]
        Ascending. This is trusted: on a device nobody looks.
    keys, values : Tensor, [page, token, kv_head, dim]
        Any strides whose rows are aligned; of the queries' type.
    table : Tensor, int32, [pages]
        Pages of the sequence, in order; they are there.
    tokens : int
        Tokens of the sequence.
    scale : float

    Returns
    -------
    (out, lse)
        As the queries; float32 ``[query, head]``, natural logarithms.

    Raises
    ------
    InvalidParams
        If shapes, types, strides or devices do not fit.
    """
    group = check(queries, positions, keys, table, tokens)
    if values.shape != keys.shape or values.stride() != keys.stride() or values.data_ptr() % 16:
        raise checks.refuse("values", "not laid out as the keys")
    if uses_reference(queries.device):
        k, v = (reference.dense(view, table, tokens).float() for view in (keys, values))
        out, lse = reference.attend(queries.float(), positions, k, v, scale)
        return out.to(queries.dtype), lse
    count, heads, dim = queries.shape
    out = torch.empty_like(queries)
    lse = torch.empty((count, heads), dtype=torch.float32, device=queries.device)
    if count:
        args = (
            queries,
            positions,
            count,
            heads,
            group,
            keys,
            values,
            table,
            tokens,
            *paging(keys),
            float(scale),
            out,
            lse,
        )
        grid = (-(-count * group // ROWS), heads // group)
        SOURCE.launch(f"attend<{FLOATS[queries.dtype]}, {dim}>", grid, args, queries.device, threads=WARPS * 32,
                      stream=stream)  # fmt: skip
    return out, lse


def check(queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, tokens: int) -> int:
    """Refuse what the kernels over pages do not take; how many heads share a KV head."""
    checks.tensor(queries, "queries", shape=(None, None, None), dtypes=HALVES, align=16)
    checks.tensor(positions, "positions", shape=(queries.shape[0],), dtypes=(torch.int32,), device=queries.device)
    checks.tensor(table, "table", shape=(None,), dtypes=(torch.int32,), device=queries.device)
    heads, dim = queries.shape[1:]
    if dim not in DIMS or keys.dim() != 4 or keys.shape[3] != dim or heads % keys.shape[2]:
        raise checks.refuse(
            "keys", f"{tuple(keys.shape)} for queries {tuple(queries.shape)}; heads of {DIMS} are known"
        )
    aligned = all(stride % 8 == 0 for stride in keys.stride()[:3]) and keys.data_ptr() % 16 == 0
    if keys.dtype != queries.dtype or keys.device != queries.device or keys.stride(3) != 1 or not aligned:
        raise checks.refuse("keys", f"{keys.dtype} on {keys.device} with strides {keys.stride()}")
    if not 0 < tokens <= table.shape[0] * keys.shape[1]:
        raise checks.refuse("tokens", f"{tokens} in {table.shape[0]} pages of {keys.shape[1]}")
    return heads // keys.shape[2]


def paging(view: torch.Tensor) -> tuple[int, np.int64, int, int]:
    """Tokens of a page, and strides in bytes."""
    page, token, head, _ = (stride * view.element_size() for stride in view.stride())
    return view.shape[1], np.int64(page), token, head
