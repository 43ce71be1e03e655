"""minicache: the upper layers in pairs, as one direction and two lengths (MiniCache, arXiv 2405.14366).

Whether neighbouring layers' keys and values point the same way is a property of a model that most do not have, so the
gate of `kvstore calibrate` measures it before this is used. Directions are merged on the sphere (SLERP) with the angle
from atan2, which is exact where acos is not; the tokens whose two directions lie farthest apart are kept as they are, a
fixed share of them, so that sizes are known.

A unit is a pair of layers. From ``start`` on, plane 0 of a pair holds, for keys and then for values: a bitmap of the
kept tokens; the lengths ``[2][token][kv_head]``, float16; the kept rows ``[2][kept][channel]`` in the block's dtype.
The merged directions follow, as ``kv4`` codes a layer. Pairs below ``start``, and a last single layer, are ``kv4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from kvstore.codecs import quant
from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.raw import as_bytes, finite, from_bytes
from kvstore.errors import CannotEncode, CorruptBlock

PARALLEL = 1e-4
"""Sine of an angle below which SLERP is a mean."""


@dataclass(frozen=True)
class MiniCache(BlockCoder):
    """Merge pairs of layers.

    Attributes
    ----------
    start : int
        First layer that is merged, as percent of all layers of the model; a pair is never split.
    layers : int
        Layers of the model.
    bits : int
        Bits of everything that is quantized.
    weight : int
        Weight of the upper layer's direction, in percent.
    kept : int
        Percent of the tokens that are kept unmerged; sinks are among them.
    """

    layers: int = 32
    start: int = 50
    bits: int = 8
    weight: int = 60
    kept: int = 5
    name: ClassVar[str] = "minicache"
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        shares = (self.start, self.weight, self.kept)
        if not (all(0 <= share <= 100 for share in shares) and 2 <= self.bits <= 8 and 1 <= self.layers <= 4096):
            raise CannotEncode(f"minicache takes shares of 0 to 100 percent and 2 to 8 bits, not {self}.")

    def span(self, spec: BlockSpec, context: Context) -> int:
        del spec, context
        return 2

    @property
    def _inner(self) -> KV4:
        return KV4(self.bits, self.bits)

    def _merged(self, spec: BlockSpec, layer: int) -> bool:
        return spec.layers == 2 and layer >= -(-self.layers * self.start // 200) * 2

    def _sizes(self, spec: BlockSpec, context: Context) -> tuple[int, int, int, int, int]:
        """Kept tokens; bytes of bitmap, lengths and rows of keys or values; bytes of the directions."""
        rows = min(spec.tokens, -(-spec.tokens * self.kept // 100) + max(4 - spec.position, 0))
        one = spec.of(1)
        return (
            rows,
            quant.plane_nbytes(spec.tokens),
            4 * spec.tokens * spec.kv_heads,
            2 * rows * spec.channels * spec.torch_dtype.itemsize,
            sum(self._inner.planes(one, 0, context)),
        )

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        if not self._merged(spec, layer):
            return (sum(self._inner.planes(spec, layer, context)),)
        _, *side, directions = self._sizes(spec, context)
        return (2 * sum(side) + directions,)

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        if not self._merged(spec, layer):
            self._put(unit, spec, out[0], context)
            return
        count, *side, _ = self._sizes(spec, context)
        merged, at = torch.empty(spec.of(1).shape), 0
        for which in (0, 1):
            direction, lengths, angle = merge(unit[0, which], unit[1, which], self.weight / 100)
            merged[0, which] = direction
            chosen = _farthest(angle, count, max(4 - spec.position, 0))
            rows = unit[:, which, chosen].to(spec.torch_dtype)
            half = lengths.to(torch.float16)
            if not finite(half):
                raise CannotEncode(f"layer {layer} has keys or values longer than float16 can say.")
            parts = (np.packbits(chosen.numpy(), bitorder="little"), as_bytes(half), as_bytes(rows.contiguous()))
            for size, part in zip(side, parts, strict=True):
                out[0][at : at + size] = part
                at += size
        self._put(merged, spec.of(1), out[0][at:], context)

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        if not self._merged(spec, layer):
            self._get(planes[0], spec, out, context)
            return
        count, *side, _ = self._sizes(spec, context)
        merged = torch.empty(spec.of(1).shape)
        self._get(planes[0][2 * sum(side) :], spec.of(1), merged, context)
        for which in (0, 1):
            bits, half, raw = np.split(planes[0][which * sum(side) :][: sum(side)], np.cumsum(side)[:-1])
            chosen = torch.from_numpy(np.unpackbits(bits, count=spec.tokens, bitorder="little").astype(bool))
            rows = from_bytes(raw, spec.torch_dtype)
            if int(chosen.sum()) != count or not finite(rows):
                raise CorruptBlock("the kept tokens of a pair of layers are not as many, or not numbers.")
            lengths = quant.numbers(half, np.float16, positive=True).view(2, spec.tokens, spec.kv_heads, 1)
            direction = merged[0, which]
            norm = direction.norm(dim=-1, keepdim=True)
            out[:, which] = lengths * torch.where(norm > 0, direction / norm.clamp(min=1e-20), 0.0)
            out[:, which, chosen] = rows.view(2, count, *spec.shape[3:]).to(out.dtype)

    def _put(self, unit: torch.Tensor, spec: BlockSpec, out: Bytes, context: Context) -> None:
        sizes = self._inner.planes(spec, 0, context)
        self._inner.encode(unit, spec, 0, np.split(out, np.cumsum(sizes)[:-1]), context)

    def _get(self, data: Bytes, spec: BlockSpec, out: torch.Tensor, context: Context) -> None:
        sizes = self._inner.planes(spec, 0, context)
        self._inner.decode(np.split(data, np.cumsum(sizes)[:-1]), spec, 0, out, context)


def merge(low: torch.Tensor, high: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge two layers' vectors ``[token, kv_head, dim]`` along the great circle.

    Returns
    -------
    direction : torch.Tensor
        Unit vectors, ``weight`` of the way from ``low`` to ``high``.
    lengths : torch.Tensor
        ``[2, token, kv_head]``.
    angle : torch.Tensor
        Mean over heads of the angle between the two, in radians, ``[token]``. Opposite vectors have no direction in
        between: they have the largest angle, so that they are the first to be kept.
    """
    lengths = torch.stack([low.norm(dim=-1), high.norm(dim=-1)])
    a, b = (
        _unit(vector, length, other) for vector, length, other in ((low, lengths[0], high), (high, lengths[1], low))
    )
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    along = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / sine.clamp(min=PARALLEL)
    found = torch.where(sine < PARALLEL, (1 - weight) * a + weight * b, along)
    norm = found.norm(dim=-1, keepdim=True)
    return found / norm.clamp(min=1e-20), lengths, angle.squeeze(-1).mean(1)


def _unit(vector: torch.Tensor, length: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A vector's direction; a zero vector takes the other's."""
    chosen = torch.where(length[..., None] > 0, vector, other)
    return chosen / chosen.norm(dim=-1, keepdim=True).clamp(min=1e-20)


def _farthest(angle: torch.Tensor, count: int, sinks: int) -> torch.Tensor:
    """A mask of the tokens to keep: the sinks, then those with the largest angle."""
    weight = angle.clone()
    weight[:sinks] = float("inf")
    chosen = torch.zeros(len(angle), dtype=torch.bool)
    chosen[weight.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def similarity(block: torch.Tensor) -> torch.Tensor:
    """What the gate asks: mean angle between neighbouring layers, ``[pair, K|V]``, of a block before RoPE."""
    even = block.shape[0] // 2 * 2
    pairs = block[:even].float().view(-1, 2, *block.shape[1:])
    return torch.stack([torch.stack([merge(pair[0, w], pair[1, w], 0.5)[2].mean() for w in (0, 1)]) for pair in pairs])
