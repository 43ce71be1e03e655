"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import numpy as np
import torch

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.slerp import reference

LANES = (4, 8, 16, 32)
SOURCE = Source(
    "slerp",
    [f"merge<{k}, {n}>" for k in FLOATS.values() for n in LANES] + [f"restore<{k}>" for k in FLOATS.values()],
)


def merge(
    lower: torch.Tensor,
    upper: torch.Tensor,
    t: float = 0.6,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge two layers' keys, or values.

    Parameters
    ----------
    lower, upper : Tensor, [token, head, dim]
        ``dim``: a multiple of 8, at most 256.
    t : float
        Place of the direction between lower (0) and upper (1).

    Returns
    -------
    (direction, lengths, angle)
        Of the layers' type, ``[token, head, dim]``; float32 ``[2, token, head]``; float32 ``[token]``.

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.kv(lower, "lower", (None, None, None))
    checks.kv(upper, "upper", tuple(lower.shape), lower)
    tokens, heads, dim = lower.shape
    if not 0.0 <= t <= 1.0 or checks.multiple(dim, 8, "dim") > 256:
        raise checks.refuse("t or dim", f"{t}, {dim}: a share and at most 256 are needed")
    if uses_reference(lower.device):
        e, lengths, angle = reference.merge(lower, upper, t, torch.float32)
        return e.to(lower.dtype), lengths, angle
    direction = torch.empty_like(lower)
    lengths = torch.empty((2, tokens, heads), dtype=torch.float32, device=lower.device)
    angle = torch.empty(tokens, dtype=torch.float32, device=lower.device)
    if lower.numel():
        lanes = next(n for n in LANES if n * 8 >= dim)
        grid = blocks_for(-(-tokens * 32 // THREADS), lower.device, max_blocks)
        args = (lower, upper, tokens, heads, dim, float(t), direction, lengths, angle)
        SOURCE.launch(f"merge<{FLOATS[lower.dtype]}, {lanes}>", grid, args, lower.device, stream=stream)
    return direction, lengths, angle


def restore(
    direction: torch.Tensor,
    lengths: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two layers of a merge; parameters and errors as of `merge`."""
    checks.kv(direction, "direction", (None, None, None))
    tokens, heads, dim = direction.shape
    checks.multiple(dim, 8, "dim")
    checks.tensor(lengths, "lengths", shape=(2, tokens, heads), dtypes=(torch.float32,), device=direction.device)
    if uses_reference(direction.device):
        lower, upper = reference.restore(direction, lengths, torch.float32)
        return lower.to(direction.dtype), upper.to(direction.dtype)
    lower, upper = torch.empty_like(direction), torch.empty_like(direction)
    if direction.numel():
        grid = blocks_for(-(-direction.numel() // 8 // THREADS), direction.device, max_blocks)
        args = (direction, lengths, np.int64(tokens * heads), dim // 8, lower, upper)
        SOURCE.launch(f"restore<{FLOATS[direction.dtype]}>", grid, args, direction.device, stream=stream)
    return lower, upper
