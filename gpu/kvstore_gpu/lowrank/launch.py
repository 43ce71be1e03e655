"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TENSOR_CORES, Source, uses_reference
from kvstore_gpu.lowrank import reference
from kvstore_gpu.queries import DIMS, HALVES, ROWS, WARPS

SOURCE = Source(
    "lowrank",
    [f"reconstruct<{FLOATS[kind]}, {dim}, {style}>" for kind in HALVES for dim in DIMS for style in ("false", "true")],
    TENSOR_CORES,
)


def reconstruct(
    left: torch.Tensor,
    right: torch.Tensor,
    chosen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> torch.Tensor:
    """Keys at chosen tokens.

    Parameters
    ----------
    left : Tensor, bfloat16 or float16, [token, rank]
    right : Tensor, [kv_head, dim, rank]
        ``dim``: 64 or 128.
    chosen : Tensor, int32, [kv_head, row]
        Tokens; rows of those that are not there are left as they come.
    cos, sin : Tensor, float32, [token, pair]
        Of all tokens; NeoX pairs fill the whole head.
    interleaved : bool

    Returns
    -------
    Tensor, [kv_head, row, dim]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.tensor(left, "left", shape=(None, None), dtypes=HALVES, align=16)
    tokens, rank = left.shape
    checks.tensor(right, "right", shape=(None, None, rank), dtypes=(left.dtype,), device=left.device, align=16)
    heads, dim = right.shape[:2]
    checks.tensor(chosen, "chosen", shape=(heads, None), dtypes=(torch.int32,), device=left.device)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(table, name, shape=(tokens, None), dtypes=(torch.float32,), device=left.device)
    pairs = cos.shape[1]
    if (
        dim not in DIMS
        or rank % 16
        or sin.shape != cos.shape
        or 2 * pairs > dim
        or (not interleaved and 2 * pairs != dim)
    ):
        raise checks.refuse("right", f"heads of {dim} at rank {rank} with {pairs} pairs")
    if uses_reference(left.device):
        return reference.reconstruct(left.float(), right.float(), chosen, cos, sin, interleaved).to(left.dtype)
    count = chosen.shape[1]
    out = torch.empty((heads, count, dim), dtype=left.dtype, device=left.device)
    if out.numel():
        args = (left, rank, right, chosen, count, tokens, cos, sin, pairs, out)
        name = f"reconstruct<{FLOATS[left.dtype]}, {dim}, {str(interleaved).lower()}>"
        SOURCE.launch(name, (-(-count // ROWS), heads), args, left.device, threads=WARPS * 32, stream=stream)
    return out
