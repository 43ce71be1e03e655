"""fp8: one byte an element (OCP E4M3, 448 the largest), with a float32 scale a token or a token and head.

Plane 0 of a unit: scales ``[layer][K|V][token]`` (or ``[…][token][kv_head]``), then codes in the block's order. The
scale is the largest magnitude over 448, so nothing saturates; the relative error of an element is at most 2^-4, its
absolute error at most scale x 2^-10 for the smallest ones. Keys may be coded after RoPE: a scale shared by a head
does not care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.errors import CannotEncode, CorruptBlock

LARGEST = 448.0


@dataclass(frozen=True)
class FP8(BlockCoder):
    """E4M3 with scales.

    Attributes
    ----------
    scale : str
        What shares a scale: ``token`` (all heads) or ``head``.
    """

    scale: str = "head"
    name: ClassVar[str] = "fp8"
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale not in ("token", "head"):
            raise CannotEncode(f"fp8 has no scale per {self.scale!r}: token or head.")

    def _scales(self, spec: BlockSpec) -> int:
        return 2 * spec.layers * spec.tokens * (spec.kv_heads if self.scale == "head" else 1)

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        return (4 * self._scales(spec) + 2 * spec.layers * spec.tokens * spec.channels,)

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del layer, context
        count = self._scales(spec)
        rows = unit.reshape(count, unit.numel() // count if count else spec.head_dim)
        scale = rows.abs().amax(1) / LARGEST
        codes = (rows / scale.clamp(min=1e-38)[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        out[0][: 4 * count] = scale.numpy().view(np.uint8)
        out[0][4 * count :] = codes.view(torch.uint8).view(-1).numpy()

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        del layer, context
        count = self._scales(spec)
        scale = np.frombuffer(planes[0][: 4 * count].tobytes(), np.float32)
        if not np.isfinite(scale).all() or (scale < 0).any():
            raise CorruptBlock("a scale is not a finite positive number.")
        codes = torch.from_numpy(planes[0][4 * count :].copy())
        if bool(((codes & 0x7F) == 0x7F).any()):
            raise CorruptBlock("a code is not a number.")
        values = expand(codes).view(count, -1) if count else torch.empty(0, spec.head_dim)
        torch.mul(values, torch.from_numpy(scale * np.float32(256)).view(-1, 1), out=values)
        out.copy_(values.view(spec.shape))


def expand(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes as float32 values over 256: moved into the fields of a float16, whose exponent bias is 8 larger."""
    wide = codes.to(torch.int16)
    return ((wide & 0x7F) << 7 | (wide & 0x80) << 8).view(torch.float16).to(torch.float32)
