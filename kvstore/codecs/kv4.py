"""kv4: keys quantized per channel, values per token after a Hadamard rotation, the sinks kept, in planes of one bit
each.

After KIVI (arXiv 2402.02750), KVQuant (2401.18079) and QuaRot (2404.00456). Keys should come from ``prerope``. Any
prefix of the planes from two bits on is usable, so a block loses precision by being cut off.

Plane 0 of a unit: sinks in the block's dtype ``[layer][K|V][sink][channel]``; lows, then scales, float16, of keys
``[layer][group][channel]``; lows, then scales, of values ``[layer][token][kv_head]``; then two bit planes of keys,
two of values, each flat in the order ``[layer][token][channel]`` (`kvstore.codecs.quant` says the bit order). Plane
p: bit plane p + 1 of keys, then of values; empty where a tensor has no such bit. Sinks are the first tokens of a
prompt, and are in no group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from kvstore.codecs import hadamard, quant
from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context
from kvstore.codecs.raw import as_bytes, finite, from_bytes
from kvstore.codecs.scratch import scratch
from kvstore.errors import CannotEncode, CorruptBlock

BASE_BITS = 2
"""Bits in plane 0: fewer are not usable."""


class Side(NamedTuple):
    """Codes of keys or of values as short as there are planes, how many bits that is, and the numbers of their groups.

    Keys: codes ``[layer, row, channel]``, numbers ``[layer, group, 1, channel]``; values: codes
    ``[layer, row, kv_head, dim]``, numbers ``[layer, row, kv_head, 1]``. Rows are the tokens that are no sinks.
    """

    codes: torch.Tensor
    low: torch.Tensor
    scale: torch.Tensor
    known: int


@dataclass(frozen=True)
class KV4(BlockCoder):
    """Uniform quantization in planes.

    Attributes
    ----------
    k, v : int
        Bits of keys and values, 2 to 8.
    group : int
        Tokens that share a channel's scale.
    sinks : int
        First tokens of a prompt that are kept as they are.
    """

    k: int = 4
    v: int = 4
    group: int = 64
    sinks: int = 4
    name: ClassVar[str] = "kv4"
    lossy: ClassVar[bool] = True
    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (2 <= self.k <= 8 and 2 <= self.v <= 8 and 1 <= self.group <= 1 << 16 and 0 <= self.sinks <= 64):
            raise CannotEncode(f"kv4 takes 2 to 8 bits, groups of 1 to 65536, 0 to 64 sinks, not {self}.")

    def span(self, spec: BlockSpec, context: Context) -> int:
        """A layer: kernels decode it by itself (`kvstore_gpu.kv4`)."""
        del spec, context
        return 1

    def required(self) -> int:
        return 1

    def kept(self, spec: BlockSpec) -> int:
        """Sinks in such a block."""
        return min(max(self.sinks - spec.position, 0), spec.tokens)

    def _fields(self, spec: BlockSpec) -> tuple[int, int, int, int, int]:
        """Counts in plane 0: kept values, groups of keys, groups of values; codes; bytes of a bit plane."""
        sinks = self.kept(spec)
        rows = spec.tokens - sinks
        codes = spec.layers * rows * spec.channels
        keys = spec.layers * -(-rows // self.group) * spec.channels
        return (
            2 * spec.layers * sinks * spec.channels,
            keys,
            spec.layers * rows * spec.kv_heads,
            codes,
            quant.plane_nbytes(codes),
        )

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        del layer, context
        kept, keys, values, _, plane = self._fields(spec)
        base = spec.torch_dtype.itemsize * kept + 4 * (keys + values) + 2 * BASE_BITS * plane
        return (base, *(plane * ((self.k > bit) + (self.v > bit)) for bit in range(BASE_BITS, max(self.k, self.v))))

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        del layer, context
        numbers, codes = self.coded(unit, spec)
        at = write(out[0], numbers)
        for side, bits, slots in zip(codes, (self.k, self.v), self.slots(spec, out, at), strict=True):
            quant.pack(side.reshape(*out[0].shape[:-1], -1).numpy(), bits, slots)

    def coded(
        self, unit: torch.Tensor, spec: BlockSpec
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What plane 0 begins with, in order: sinks, lows and scales; and the codes (uint8) of keys and of values."""
        sinks = self.kept(spec)
        keys = unit[:, 0, sinks:].reshape(spec.layers, spec.tokens - sinks, spec.channels)
        k_codes, *k_numbers = _by_group(keys, self.k, self.group)
        v_codes, *v_numbers = quant.quantize(hadamard.rotate(unit[:, 1, sinks:].contiguous()), self.v, -1)
        return [unit[:, :, :sinks].to(spec.torch_dtype), *k_numbers, *v_numbers], (k_codes, v_codes)

    def slots(self, spec: BlockSpec, planes: Sequence[Bytes], start: int) -> tuple[list[Bytes], list[Bytes]]:
        """Where the bit planes of keys and of values are, in plane 0 from a byte on and in the planes after it."""
        n = self._fields(spec.of(1) if planes[0].ndim == 2 else spec)[4]
        base = planes[0][..., start:]
        keys = [base[..., i * n : (i + 1) * n] for i in range(BASE_BITS)]
        values = [base[..., i * n : (i + 1) * n] for i in range(BASE_BITS, 2 * BASE_BITS)]
        for bit, part in enumerate(planes[1:], BASE_BITS):
            at = 0
            if self.k > bit:
                keys.append(part[..., :n])
                at = n
            if self.v > bit:
                values.append(part[..., at : at + n])
        return keys, values

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
        del layer, context
        self.fill(*self.opened(planes, spec), keys, values)

    def opened(self, planes: Sequence[Bytes], spec: BlockSpec) -> tuple[torch.Tensor, Side, Side]:
        """Sinks ``[layer][K|V][sink][kv_head][dim]``, and what is known of the other keys and values, out of planes.

        Raises
        ------
        CorruptBlock
            A kept value, a low or a scale is not finite, or a scale is negative.
        """
        one = spec.of(1) if planes[0].ndim == 2 else spec
        kept, k_groups, v_groups, codes, _ = self._fields(one)
        sinks = self.kept(spec)
        rows = spec.tokens - sinks
        ends = np.cumsum([spec.torch_dtype.itemsize * kept, 2 * k_groups, 2 * k_groups, 2 * v_groups, 2 * v_groups])
        first, k_low, k_scale, v_low, v_scale, _ = np.split(planes[0], ends, axis=-1)
        k_bits, v_bits = self.slots(spec, planes, int(ends[-1]))
        exact = from_bytes(np.ascontiguousarray(first).reshape(-1), spec.torch_dtype)
        if kept and not finite(exact):
            raise CorruptBlock("a kept value is not finite.")
        k = torch.from_numpy(quant.unpack(k_bits, codes)).view(spec.layers, rows, spec.channels)
        v = torch.from_numpy(quant.unpack(v_bits, codes)).view(spec.layers, rows, *spec.shape[3:])
        groups = -(-rows // self.group)
        return (
            exact.view(spec.layers, 2, sinks, *spec.shape[3:]),
            Side(k, *_numbers(k_low, k_scale, (spec.layers, groups, 1, spec.channels)), len(k_bits)),
            Side(v, *_numbers(v_low, v_scale, (*v.shape[:3], 1)), len(v_bits)),
        )

    def fill(self, kept: torch.Tensor, k: Side, v: Side, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill keys and values ``[layer][token][kv_head][dim]`` with what `opened` found; its codes are changed."""
        sinks = kept.shape[2]
        if sinks:
            keys[:, :sinks], values[:, :sinks] = kept[:, 0], kept[:, 1]
        if not k.codes.shape[1]:
            return
        self._keys(k, keys[:, sinks:].view(k.codes.shape))
        unrotated(v.codes, v.low, v.scale, self.v, v.known, values[:, sinks:])

    def _keys(self, side: Side, out: torch.Tensor) -> None:
        codes, low, scale, known = side
        layers, rows, channels = codes.shape
        whole = rows // self.group * self.group
        if whole:
            shape = (layers, whole // self.group, self.group, channels)
            full = shape[1]
            target = out[:, :whole].view(shape)
            quant.dequantize(codes[:, :whole].view(shape), low[:, :full], scale[:, :full], self.k, known, target)
        if whole < rows:
            quant.dequantize(codes[:, whole:], low[:, -1], scale[:, -1], self.k, known, out[:, whole:])

    def tolerance(
        self, unit: torch.Tensor, spec: BlockSpec, layer: int, planes: int, context: Context
    ) -> torch.Tensor | None:
        del layer, context
        sinks = self.kept(spec)
        found = torch.zeros(unit.shape)
        if sinks == spec.tokens:
            return found
        _, _, scale = _by_group(unit[:, 0, sinks:].reshape(spec.layers, -1, spec.channels), self.k, self.group)
        by_token = scale.float().repeat_interleave(self.group, 1)[:, : spec.tokens - sinks]
        missing = [max(bits - BASE_BITS - planes + 1, 0) for bits in (self.k, self.v)]
        found[:, 0, sinks:] = by_token.view(spec.layers, -1, *spec.shape[3:]) * (2.0 ** missing[0] / 2)
        _, _, scale = quant.quantize(hadamard.rotate(unit[:, 1, sinks:]), self.v, -1)
        found[:, 1, sinks:] = scale.float() * (2.0 ** missing[1] / 2 * hadamard.size_of(spec.head_dim) ** 0.5)
        return found


def unrotated(
    codes: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bits: int, known: int, out: torch.Tensor
) -> None:
    """Values of rotated codes, rotated back, into ``out``; ``codes`` is changed.

    A constant over a head becomes one element by the rotation, so only codes around zero are rotated: integers of at
    most 8 bits, whose sums are exact.
    """
    size = hadamard.size_of(codes.shape[-1])
    half = 1 << (known - 1)
    found = scratch("turned", tuple(codes.shape), torch.float32)
    hadamard.sums(codes.sub_(half).view(torch.int8).view(-1, size), found.view(-1, size))
    scale = scale.float()
    step = scale * float(1 << (bits - known))
    middle = torch.add(low.float(), step, alpha=half).add_(step.sub(scale), alpha=0.5)
    found.mul_(step * size**-0.5)
    found[..., ::size].add_(middle, alpha=size**0.5)
    out.copy_(found)


def _by_group(keys: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of keys ``[layer, token, channel]``; lows and scales of channels by groups of tokens, the last shorter."""
    layers, rows, channels = keys.shape
    whole = rows // group * group
    found = []
    if whole:
        codes, low, scale = quant.quantize(keys[:, :whole].reshape(layers, -1, group, channels), bits, 2)
        found.append((codes.view(layers, whole, channels), low[:, :, 0], scale[:, :, 0]))
    if whole < rows:
        found.append(quant.quantize(keys[:, whole:], bits, 1))
    if not found:
        empty = keys.new_empty(0, dtype=torch.float16)
        return keys.to(torch.uint8), empty, empty
    codes, low, scale = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return codes, low, scale


def _numbers(low: Bytes, scale: Bytes, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return quant.numbers(low, np.float16).view(shape), quant.numbers(scale, np.float16, positive=True).view(shape)


def write(out: Bytes, parts: Sequence[torch.Tensor]) -> int:
    """Tensors ``[layer, …]`` one after the other into a plane, or into one ``[layer, bytes]``; its bytes they took."""
    at = 0
    for part in parts:
        data = as_bytes(part.contiguous()).reshape(*out.shape[:-1], -1)
        end = at + data.shape[-1]
        out[..., at:end] = data
        at = end
    return at
