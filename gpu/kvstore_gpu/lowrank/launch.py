"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TENSOR_CORES, Source, uses_reference
from kvstore_gpu.lowrank import reference
from kvstore_gpu.queries import DIMS, ROWS, WARPS

RANKS = 16
"""Columns that tensor cores take at once."""

SOURCE = Source(
    "lowrank",
    [f"reconstruct<{kind}, {dim}, {style}>" for kind in FLOATS.values() for dim in DIMS for style in ("false", "true")],
    TENSOR_CORES,
)


def padded(factor: torch.Tensor) -> torch.Tensor:
    """A factor ``[…, rank]`` with columns of zeros up to a rank that `reconstruct` takes; products are the same."""
    return F.pad(factor, (0, -factor.shape[-1] % RANKS)).contiguous()


def reconstruct(
    left: torch.Tensor,
    right: torch.Tensor,
    chosen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    *,
    interleaved: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Keys at chosen tokens.

    Parameters
    ----------
    left : Tensor, bfloat16, [token, rank]
    right : Tensor, bfloat16, [kv_head, dim, rank]
    chosen : Tensor, int32, [kv_head, row]
        Tokens; rows of those that are not there are left as they come.
    cos, sin : Tensor, float32, [token, pair]
        Of all tokens.
    dtype : torch.dtype
        Of the result: bfloat16, float16 or float32.
    interleaved : bool

    Returns
    -------
    Tensor, [kv_head, row, dim]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.tensor(left, "left", shape=(None, None), dtypes=(torch.bfloat16,), align=16)
    tokens, rank = left.shape
    checks.tensor(right, "right", shape=(None, None, rank), dtypes=(left.dtype,), device=left.device, align=16)
    heads, dim = right.shape[:2]
    checks.tensor(chosen, "chosen", shape=(heads, None), dtypes=(torch.int32,), device=left.device)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(table, name, shape=(tokens, None), dtypes=(torch.float32,), device=left.device)
    pairs = cos.shape[1]
    if rank % RANKS or sin.shape != cos.shape or 2 * pairs > dim or dtype not in FLOATS:
        raise checks.refuse("right", f"heads of {dim} at rank {rank} with {pairs} pairs, as {dtype}")
    if uses_reference(left.device) or dim not in DIMS or not (interleaved or 2 * pairs in (0, dim)):
        return reference.reconstruct(left.float(), right.float(), chosen, cos, sin, interleaved).to(dtype)
    count = chosen.shape[1]
    out = torch.empty((heads, count, dim), dtype=dtype, device=left.device)
    if out.numel():
        args = (left, rank, right, chosen, count, tokens, cos, sin, pairs, out)
        name = f"reconstruct<{FLOATS[dtype]}, {dim}, {str(interleaved).lower()}>"
        SOURCE.launch(name, (-(-count // ROWS), heads), args, left.device, threads=WARPS * 32, stream=stream)
    return out
