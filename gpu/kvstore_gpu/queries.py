"""Queries and pages of keys as the kernels that multiply matrices take them."""

from __future__ import annotations

import numpy as np
import torch

from kvstore_gpu import checks

DIMS = (64, 128)
HALVES = (torch.bfloat16, torch.float16)
ROWS, WARPS = 64, 4
"""Rows of a tile and warps of a block, as in ``mma.cuh``."""


def check(queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, tokens: int) -> int:
    """Refuse what does not fit; how many heads share a KV head.

    Raises
    ------
    InvalidParams
    """
    _rows(queries)
    checks.tensor(positions, "positions", shape=(queries.shape[0],), dtypes=(torch.int32,), device=queries.device)
    checks.tensor(table, "table", shape=(None,), dtypes=(torch.int32,), device=queries.device)
    heads, dim = queries.shape[1:]
    if dim not in DIMS or keys.dim() != 4 or keys.shape[3] != dim or heads % keys.shape[2]:
        raise checks.refuse(
            "keys", f"{tuple(keys.shape)} for queries {tuple(queries.shape)}; heads of {DIMS} are known"
        )
    like(keys, queries, "keys")
    if not 0 < tokens <= table.shape[0] * keys.shape[1]:
        raise checks.refuse("tokens", f"{tokens} in {table.shape[0]} pages of {keys.shape[1]}")
    return heads // keys.shape[2]


def like(pages: torch.Tensor, queries: torch.Tensor, name: str) -> None:
    """Refuse pages that are not of the queries' type, on their device, with rows that can be read 16 bytes at a time.

    Raises
    ------
    InvalidParams
    """
    aligned = all(stride % 8 == 0 for stride in pages.stride()[:3]) and pages.data_ptr() % 16 == 0
    if pages.dtype != queries.dtype or pages.device != queries.device or pages.stride(3) != 1 or not aligned:
        raise checks.refuse(name, f"{pages.dtype} on {pages.device} with strides {pages.stride()}")


def _rows(queries: torch.Tensor) -> None:
    """Refuse queries whose heads do not lie one behind the other; rows may lie apart, as in a projection of all."""
    if queries.dim() != 3 or queries.dtype not in HALVES:
        raise checks.refuse("queries", f"{tuple(queries.shape)} of {queries.dtype}: [query, head, dim] of {HALVES}")
    row, head, one = queries.stride()
    dense = one == 1 and (head == queries.shape[2] or queries.shape[1] == 1)
    if not dense or row % 8 or queries.data_ptr() % 16:
        raise checks.refuse("queries", f"strides {queries.stride()}: heads of a row have to lie one behind the other")


def paging(view: torch.Tensor) -> tuple[int, np.int64, int, int]:
    """Tokens of a page, and strides in bytes."""
    page, token, head, _ = (stride * view.element_size() for stride in view.stride())
    return view.shape[1], np.int64(page), token, head


def dense(view: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens ``[token, head, dim]`` of pages in the order of a table."""
    return view[table.long()].flatten(0, 1)[:tokens]
