"""mikv: all tokens at few bits, the important ones at more ("No Token Left Behind", arXiv 2402.18096), as refinement
planes.

The quantizer is kv4's, at the high bits. The low bit planes of all tokens are the first plane, usable at once; the
second holds a bitmap of the important tokens and their remaining bits. Which tokens are important is the context's
affair.

Plane 0 is plane 0 of ``kv4(k=hi,v=hi)`` followed by bit planes 2 to lo - 1 of keys and values. Plane 1: the bitmap,
one bit a token that is no sink, then for each bit from lo on, the bit plane of the important tokens' keys, then of
their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs import quant
from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context, need
from kvstore.codecs.kv4 import KV4
from kvstore.errors import CannotEncode, CorruptBlock


@dataclass(frozen=True)
class MiKV(BlockCoder):
    """Two precisions.

    Attributes
    ----------
    hi, lo : int
        Bits of important tokens, and of the others.
    share : int
        Percent of the tokens that are important.
    group, sinks : int
        As in kv4.
    """

    hi: int = 8
    lo: int = 4
    share: int = 25
    group: int = 64
    sinks: int = 4
    name: ClassVar[str] = "mikv"
    lossy: ClassVar[bool] = True
    by_importance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (2 <= self.lo < self.hi <= 8 and 0 <= self.share <= 100):
            raise CannotEncode(f"mikv takes 2 <= lo < hi <= 8 bits and a share of 0 to 100 percent, not {self}.")
        _ = self.full

    @property
    def full(self) -> KV4:
        """The quantizer underneath."""
        return KV4(self.hi, self.hi, self.group, self.sinks)

    def required(self) -> int:
        return 1

    def _rows(self, spec: BlockSpec) -> tuple[int, int]:
        rows = spec.tokens - self.full.kept(spec)
        return rows, -(-rows * self.share // 100)

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        rows, high = self._rows(spec)
        low = sum(self.full.planes(spec, layer, context)[: self.lo - 1])
        plane = quant.plane_nbytes(spec.layers * high * spec.channels)
        return low, quant.plane_nbytes(rows) + 2 * (self.hi - self.lo) * plane

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        rows, high = self._rows(spec)
        weights = need(context.importance, "the importance of the tokens", encoding=True)
        if tuple(weights.shape) != (spec.tokens,) or not bool(torch.isfinite(weights).all()):
            raise CannotEncode(f"importance is {tuple(weights.shape)}, not one finite number for {spec.tokens} tokens.")
        sizes = self.full.planes(spec, layer, context)
        parts = [np.empty(size, np.uint8) for size in sizes]
        self.full.encode(unit, spec, layer, parts, context)
        out[0][:] = np.concatenate(parts[: self.lo - 1])
        order = torch.argsort(weights[spec.tokens - rows :], descending=True, stable=True)
        chosen = np.zeros(rows, np.uint8)
        chosen[order[:high].numpy()] = 1
        fine = [np.packbits(chosen, bitorder="little")]
        shape, picked = (spec.layers, rows, spec.channels), chosen.astype(bool)
        for part in parts[self.lo - 1 :]:
            for half in np.split(part, 2):
                bits = np.unpackbits(half, count=int(np.prod(shape)), bitorder="little").reshape(shape)
                fine.append(np.packbits(bits[:, picked], bitorder="little"))
        out[1][:] = np.concatenate(fine)

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        sizes = self.full.planes(spec, layer, context)[: self.lo - 1]
        low = np.split(planes[0], np.cumsum(sizes)[:-1])
        self.full.decode(low, spec, layer, out, context)
        rows, high = self._rows(spec)
        if len(planes) < 2 or not high:
            return
        chosen = np.unpackbits(planes[1], count=rows, bitorder="little").astype(bool)
        if int(chosen.sum()) != high:
            raise CorruptBlock(f"{int(chosen.sum())} tokens are marked important instead of {high}.")
        full = torch.empty(out.shape, dtype=torch.float32)
        shape = (spec.layers, rows, spec.channels)
        n = quant.plane_nbytes(spec.layers * high * spec.channels)
        at, fine = quant.plane_nbytes(rows), []
        for _ in range(self.lo, self.hi):
            halves = []
            for _ in ("keys", "values"):
                bits = np.zeros(shape, np.uint8)
                count = spec.layers * high * spec.channels
                found = np.unpackbits(planes[1][at : at + n], count=count, bitorder="little")
                bits[:, chosen] = found.reshape(spec.layers, high, spec.channels)
                halves.append(np.packbits(bits, bitorder="little"))
                at += n
            fine.append(np.concatenate(halves))
        self.full.decode([*low, *fine], spec, layer, full, context)
        where = torch.from_numpy(np.flatnonzero(chosen)) + spec.tokens - rows
        out[:, :, where] = full[:, :, where].to(out.dtype)
