"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import numpy as np
import torch

from kvstore.codecs.hadamard import size_of
from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.hadamard import reference

SOURCE = Source("hadamard", [f"rotate<{kind}>" for kind in FLOATS.values()])


def block_of(dim: int) -> int:
    """Elements that are rotated together.

    Raises
    ------
    InvalidParams
        If the kernel has no way to do it.
    """
    size = size_of(dim)
    if size < 8:
        raise checks.refuse("dim", f"{dim} is not a multiple of 8")
    return size


def rotate(
    values: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> torch.Tensor:
    """Rotate the last dimension.

    Parameters
    ----------
    values : Tensor, [..., dim], dense
    out : Tensor, optional
        Of the same shape and type; may be ``values`` itself. Made if not given.

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.kv(values, "values", tuple(values.shape))
    size = block_of(values.shape[-1])
    result = torch.empty_like(values) if out is None else checks.kv(out, "out", tuple(values.shape), values)
    if uses_reference(values.device):
        return result.copy_(reference.rotate(values.float()))
    octets = values.numel() // 8
    if octets:
        grid = blocks_for(-(-octets // THREADS), values.device, max_blocks)
        args = (values, result, np.int64(octets), size)
        SOURCE.launch(f"rotate<{FLOATS[values.dtype]}>", grid, args, values.device, stream=stream)
    return result
