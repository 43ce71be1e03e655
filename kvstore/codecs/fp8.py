"""fp8: one byte an element (OCP E4M3, 448 the largest), with a scale a token and head, or a token.

Plane 0 of a unit: scales ``[layer][K|V][token][kv_head]`` (or ``[…][token]``), one byte each, then codes in the
block's order. A scale is a power of two, its exponent plus 127 (E8M0, as in the OCP microscaling formats): a
floating-point code loses nothing by that, and decoding into bfloat16 is exact. It is the least with which nothing
saturates; an element is off by at most 2^-4 of itself, or 2^-10 of the scale. Keys may be coded after RoPE: a scale
shared by a head does not care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.errors import CannotEncode, CorruptBlock

LARGEST = 448.0
_BIAS = 127
_LEAST, _MOST = -126, 119
"""Least and largest exponent of a scale: times 448 it is still finite."""


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
    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale not in ("token", "head"):
            raise CannotEncode(f"fp8 has no scale per {self.scale!r}: token or head.")

    def _rows(self, spec: BlockSpec) -> tuple[int, int]:
        """How many scales, and how many elements share one."""
        heads, dim = (spec.kv_heads, spec.head_dim) if self.scale == "head" else (1, spec.channels)
        return 2 * spec.layers * spec.tokens * heads, dim

    def span(self, spec: BlockSpec, context: Context) -> int:
        """A layer: kernels decode it by itself (`kvstore_gpu.fp8`)."""
        del spec, context
        return 1

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        count, dim = self._rows(spec)
        return (count + count * dim,)

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del layer, context
        count, dim = self._rows(spec)
        rows = unit.reshape(count, dim)
        exponents = _exponents(rows)
        codes = (rows * _power(-exponents)[:, None]).to(torch.float8_e4m3fn)
        shape = out[0].shape[:-1]
        scales = (exponents + _BIAS).to(torch.uint8).numpy().reshape(*shape, -1)
        out[0][..., : scales.shape[-1]] = scales
        out[0][..., scales.shape[-1] :] = codes.view(torch.uint8).numpy().reshape(*shape, -1)

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        del layer, context
        count, dim = self._rows(spec.of(1) if planes[0].ndim == 2 else spec)
        exponents, codes = planes[0][..., :count].reshape(-1), planes[0][..., count:].reshape(-1)
        if count and not _LEAST + _BIAS <= int(exponents.min()) <= int(exponents.max()) <= _MOST + _BIAS:
            raise CorruptBlock("a scale is out of bounds.")
        if codes.size and int((codes & 0x7F).max()) == 0x7F:
            raise CorruptBlock("a code is not a number.")
        scale = _power(torch.from_numpy(exponents.astype(np.int32)) - _BIAS)[:, None]
        pairs = codes if codes.ctypes.data % 2 == 0 else codes.copy()
        words = np.take(_table(), pairs.view(np.uint16), mode="clip")
        values = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).view(-1, dim)
        if out.dtype == torch.bfloat16:
            out.copy_(values.mul_(scale.to(torch.bfloat16)).view(out.shape))
        else:
            out.copy_((values * scale).view(out.shape))

    def tolerance(
        self, unit: torch.Tensor, spec: BlockSpec, layer: int, planes: int, context: Context
    ) -> torch.Tensor | None:
        del layer, planes, context
        rows = unit.float().reshape(self._rows(spec))
        return torch.maximum(rows.abs() / 16, _power(_exponents(rows))[:, None] / 1024).view(unit.shape)


def _exponents(rows: torch.Tensor) -> torch.Tensor:
    """Exponents (int32) of the least powers of two that bring each row into E4M3's range."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.int32)
    most = torch.maximum(rows.amax(1), rows.amin(1).neg_())
    if float(most.amax()) > LARGEST * 2.0**_MOST:
        raise CannotEncode(f"a value is larger than fp8 with a scale can say ({LARGEST * 2.0**_MOST:.4g}).")
    return torch.frexp(most / LARGEST).exponent.clamp_(_LEAST, _MOST)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """Two to the power of these, in float32, exactly."""
    return ((exponents.to(torch.int32) + _BIAS) << 23).view(torch.float32)


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Two bfloat16 (as one uint32) for each two codes: one look-up for two elements."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    single = codes.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return (single[None, :] | single[:, None] << np.uint32(16)).reshape(-1)
