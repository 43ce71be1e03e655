"""What launchers ask of tensors before a kernel sees their addresses: kernels trust every number."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.errors import InvalidParams

FLOATS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
"""Types of KV, and their names in the kernels."""

REMEDY = "See the operation's page in kvstore_gpu for the shapes and types it takes."


def refuse(name: str, cause: str) -> InvalidParams:
    """The error for an argument."""
    return InvalidParams(f"{name}: {cause}.", REMEDY)


def _fits(want: int | None, size: int) -> bool:
    return want is None or want == size


def tensor(
    value: torch.Tensor,
    name: str,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    align: int = 1,
) -> torch.Tensor:
    """A dense tensor of this shape (None: any size), one of these types, on this device, or a typed error.

    Raises
    ------
    InvalidParams
        If anything does not fit. `align`: bytes that the address is a multiple of, on CUDA devices.
    """
    have = value.shape
    if len(have) != len(shape) or not all(map(_fits, shape, have)):
        raise refuse(
            name, f"shape {tuple(value.shape)} where {tuple('*' if n is None else n for n in shape)} is needed"
        )
    if value.dtype not in dtypes:
        raise refuse(name, f"{value.dtype} is not among {', '.join(map(str, dtypes))}")
    where = value.device
    if device is not None and where != device:
        raise refuse(name, f"it lies on {where}, the others on {device}")
    if not value.is_contiguous():
        raise refuse(name, f"strides {tuple(value.stride())} are not those of a dense tensor")
    kind = where.type
    if kind not in ("cpu", "cuda"):
        raise refuse(name, f"devices of type {kind} are not known")
    if kind == "cuda" and value.data_ptr() % align:
        raise refuse(name, f"its address is not a multiple of {align} bytes")
    return value


def kv(value: torch.Tensor, name: str, shape: Sequence[int | None], like: torch.Tensor | None = None) -> torch.Tensor:
    """Dense KV; with `like`, of the same type and on the same device."""
    dtypes = tuple(FLOATS) if like is None else (like.dtype,)
    return tensor(value, name, shape=shape, dtypes=dtypes, device=None if like is None else like.device, align=16)


def multiple(value: int, of: int, name: str) -> int:
    """A number that has to be a multiple of another."""
    if value <= 0 or value % of:
        raise refuse(name, f"{value} is not a positive multiple of {of}")
    return value
