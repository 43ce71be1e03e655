"""byteplanes: the bytes of each element apart, so that an entropy coder behind it sees exponents among exponents.

A 16-bit element is turned left by one bit first: the sign goes behind the mantissa, and for bfloat16 the high byte
is the exponent and nothing else. Plane 0 holds the high bytes of the unit in the block's order, the last plane the
low bytes. Exact for every bit pattern. ``lossless`` is short for ``byteplanes|zstd``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.codecs.raw import as_bytes


@dataclass(frozen=True)
class BytePlanes(BlockCoder):
    """Split elements into planes of bytes, most significant first."""

    name: ClassVar[str] = "byteplanes"
    native: ClassVar[bool] = True

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        size = spec.torch_dtype.itemsize
        return (spec.nbytes // size,) * size

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del layer, context
        word = np.dtype(f"<u{spec.torch_dtype.itemsize}")
        words = as_bytes(unit.contiguous()).view(word)
        turned = words << word.type(1)
        turned |= words >> word.type(8 * word.itemsize - 1)
        for place, target in zip(range(8 * word.itemsize - 8, -1, -8), out, strict=True):
            target[:] = turned >> word.type(place)  # the last byte of each

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        del layer, context
        word = np.dtype(f"<u{spec.torch_dtype.itemsize}")
        turned = planes[0].astype(word)
        for plane in planes[1:]:
            turned <<= word.type(8)
            turned |= plane
        words = turned >> word.type(1)
        words |= turned << word.type(8 * word.itemsize - 1)
        out.copy_(torch.from_numpy(words.view(np.uint8)).view(spec.torch_dtype).view(spec.shape))
