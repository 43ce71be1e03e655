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
from kvstore.codecs.kv4 import KV4, Side, unrotated, write
from kvstore.codecs.raw import finite
from kvstore.codecs.scratch import scratch
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
        if tuple(weights.shape) != (spec.tokens,) or not finite(weights):
            raise CannotEncode(f"importance is {tuple(weights.shape)}, not one finite number for {spec.tokens} tokens.")
        order = weights[spec.tokens - rows :].argsort(descending=True, stable=True)
        chosen = torch.zeros(rows, dtype=torch.uint8).index_fill(0, order[:high].cpu(), 1)
        where = chosen.nonzero()[:, 0]
        bitmap, fine = self._fine(out[1], rows)
        bitmap[:] = np.packbits(chosen.numpy(), bitorder="little")
        numbers, codes = self.full.coded(unit, spec)
        low = self._low(out[0], spec, layer, context)
        slots = self.full.slots(spec, low, write(low[0], numbers))
        for side, coarse, rest in zip(codes, slots, (fine[::2], fine[1::2]), strict=True):
            quant.pack(side.reshape(-1).numpy(), self.hi, coarse)
            quant.pack(side.index_select(1, where).reshape(-1).numpy(), self.hi, list(rest), first=self.lo)

    def _low(self, plane: Bytes, spec: BlockSpec, layer: int, context: Context) -> list[Bytes]:
        """The planes of `full` that plane 0 consists of."""
        sizes = self.full.planes(spec, layer, context)[: self.lo - 1]
        return np.split(plane, np.cumsum(sizes)[:-1])

    def _fine(self, plane: Bytes, rows: int) -> tuple[Bytes, np.ndarray]:
        """The bitmap in plane 1; its bit planes, of keys and values in turn."""
        at = quant.plane_nbytes(rows)
        return plane[:at], plane[at:].reshape(2 * (self.hi - self.lo), -1)

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        self.decode_sides(planes, spec, layer, out[:, 0], out[:, 1], context)

    def decode_sides(
        self,
        planes: Sequence[Bytes],
        spec: BlockSpec,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        context: Context,
    ) -> None:
        rows, high = self._rows(spec)
        kept, k, v = self.full.opened(self._low(planes[0], spec, layer, context), spec)
        refined = self._refined(planes[1], rows, high, k, v) if len(planes) > 1 and high else None
        self.full.fill(kept, k, v, keys, values)
        if refined is None:
            return
        where, k, v = refined
        here = where + spec.tokens - rows
        found = quant.dequantize(k.codes, k.low[:, :, 0], k.scale[:, :, 0], self.hi, self.hi)
        keys.index_copy_(1, here, found.view(v.codes.shape).to(keys.dtype))
        turned = scratch("refined", tuple(v.codes.shape), values.dtype)
        unrotated(v.codes, v.low, v.scale, self.hi, self.hi, turned)
        values.index_copy_(1, here, turned)

    def _refined(self, plane: Bytes, rows: int, high: int, k: Side, v: Side) -> tuple[torch.Tensor, Side, Side]:
        """Rows of the important tokens, and their keys and values with all bits, each row with its own numbers."""
        bitmap, fine = self._fine(plane, rows)
        chosen = np.unpackbits(bitmap, count=rows, bitorder="little")
        where = torch.from_numpy(np.flatnonzero(chosen))
        if len(where) != high:
            raise CorruptBlock(f"{len(where)} tokens are marked important instead of {high}.")
        sides = []
        for side, own, bits in zip((k, v), (where // self.group, where), (fine[::2], fine[1::2]), strict=True):
            codes = side.codes.index_select(1, where)
            rest = torch.from_numpy(quant.unpack(list(bits), codes.numel())).view(codes.shape)
            codes.bitwise_left_shift_(self.hi - self.lo).bitwise_or_(rest)
            sides.append(Side(codes, side.low.index_select(1, own), side.scale.index_select(1, own), self.hi))
        return where, *sides
