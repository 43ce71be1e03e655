"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import numpy as np
import torch

from kvstore_gpu import checks
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.rows import reference

UNITS = (16, 4, 2)
SOURCE = Source("rows", [f"copy_rows<{way}, unit{unit}>" for way in ("false", "true") for unit in UNITS])


def scatter(
    view: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Write rows into slots of a cache.

    Parameters
    ----------
    view : Tensor, [page, token, head, dim]
    rows : Tensor, [row, head, dim], dense
    slots : Tensor, int64, [row]
        All different; those that are not there are left alone.

    Raises
    ------
    InvalidParams
        If shapes, types, strides or devices do not fit.
    """
    _copy(True, view, rows, slots, stream, max_blocks)


def gather(
    view: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Read slots of a cache into rows; parameters and errors as of `scatter`."""
    _copy(False, view, rows, slots, stream, max_blocks)


def _copy(
    to_cache: bool,
    view: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    stream: torch.cuda.Stream | None,
    max_blocks: int | None,
) -> None:
    if view.dim() != 4 or view.stride(3) != 1:
        raise checks.refuse("view", f"shape {tuple(view.shape)}, strides {view.stride()}: not [page, token, head, dim]")
    checks.tensor(rows, "rows", shape=(None, *view.shape[2:]), dtypes=(view.dtype,), device=view.device)
    checks.tensor(slots, "slots", shape=(rows.shape[0],), dtypes=(torch.int64,), device=view.device)
    if uses_reference(view.device):
        (reference.scatter if to_cache else reference.gather)(view, rows, slots)
        return
    if not rows.numel():
        return
    size = view.element_size()
    page, token, head, _ = (stride * size for stride in view.stride())
    heads, row = view.shape[2], view.shape[3] * size
    if head == row:
        heads, row, head = 1, row * heads, 0
    unit = next(
        (u for u in UNITS if all(n % u == 0 for n in (page, token, head, row, view.data_ptr(), rows.data_ptr()))), 0
    )
    if not unit:
        raise checks.refuse("view", f"elements of {view.dtype}")
    total = rows.shape[0] * heads * (row // unit)
    args = (
        rows, view, slots, np.int64(rows.shape[0]), np.int64(view.shape[0] * view.shape[1]), view.shape[1],
        np.int64(page), token, head, heads, row // unit,
    )  # fmt: skip
    grid = blocks_for(-(-total // THREADS), view.device, max_blocks)
    SOURCE.launch(f"copy_rows<{str(to_cache).lower()}, unit{unit}>", grid, args, view.device, stream=stream)
