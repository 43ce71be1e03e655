"""pca: a calibrated basis over some layers, one step size for all components, in planes of falling importance.

After KVTC (arXiv 2511.01815), with the basis of `kvstore.codecs.basis`. Keys should come from ``prerope``. A component
is coded as the nearest multiple of the step; where its spread on the calibration texts is far below the step, it is
left out (reverse water-filling). An entropy coder must follow: ``prerope|pca(basis=…,step=40)|zstd``.

The planes hold components by the ratio of their spread to the step, so that what is coded together is distributed
alike, and few-valued codes share a byte:

    plane  ratio         codes                 bytes
    0      16 and more   -32767 to 32767       sinks first; all low bytes, then all high bytes
    1, 2   4, 1          -127 to 127           one each, plus 128
    3      1/2           -7 to 7               two to a byte, base 15, the first the least significant
    4      least         -2 to 2               three to a byte, base 5

Components stand in order of falling spread, each with its codes of all tokens one after the other. Sinks are the first
tokens of a prompt, in the block's dtype, ``[layer][K|V][sink][channel]``; they are in no plane.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from kvstore.codecs import processor
from kvstore.codecs.base import BlockCoder, BlockSpec, Bytes, Context, need
from kvstore.codecs.basis import Basis
from kvstore.codecs.raw import as_bytes, finite, from_bytes
from kvstore.errors import CannotEncode, CorruptBlock

UNIT = 1e-4
"""What one `step` is, in units of the basis."""
LEAST = 0.3
"""Components with a smaller spread than so many steps cost more to code than they bring."""
EDGES = (float("inf"), 16.0, 4.0, 1.0, 0.5, LEAST)
LARGEST = (32767, 127, 127, 7, 2)
TOGETHER = (1, 1, 1, 2, 3)
"""Codes in a byte, by plane; plane 0 takes two bytes a code."""
HALF = frozenset({"avx512_bf16", "amx_bf16"})
"""Processors' extensions, one of which makes products of bfloat16 fast."""


@dataclass(frozen=True)
class PCA(BlockCoder):
    """Transform coding in a calibrated basis.

    Attributes
    ----------
    basis : str
        Digest of the basis in the context.
    step : int
        Step of the quantizer in ten-thousandths of the basis' unit: larger is smaller and worse.
    sinks : int
        First tokens of a prompt that are kept as they are.
    """

    basis: str = ""
    step: int = 100
    sinks: int = 4
    name: ClassVar[str] = "pca"
    lossy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.step <= 1 << 20 and 0 <= self.sinks <= 64):
            raise CannotEncode(f"pca takes a step of 1 to {1 << 20} and 0 to 64 sinks, not {self}.")

    def reference(self, context: Context) -> str:
        found = context.bases.get(self.basis)
        return f"{found.digest}/{found.rotary}" if isinstance(found, Basis) else ""

    def required(self) -> int:
        return 1

    def span(self, spec: BlockSpec, context: Context) -> int:
        return self._basis(spec, context).span

    def kept(self, spec: BlockSpec) -> int:
        """Sinks in such a block."""
        return min(max(self.sinks - spec.position, 0), spec.tokens)

    def _basis(self, spec: BlockSpec, context: Context) -> Basis:
        found = need(context.bases.get(self.basis), f"the basis {self.basis!r}", encoding=True)
        if not isinstance(found, Basis) or (found.kv_heads, found.head_dim) != (spec.kv_heads, spec.head_dim):
            raise CannotEncode(f"the basis {self.basis} is of another model.")
        return found

    def _group(self, spec: BlockSpec, layer: int, context: Context) -> _Group:
        basis = self._basis(spec, context)
        index, rest = divmod(layer, basis.span)
        if rest or index >= len(basis.groups) or spec.layers != min(basis.span, basis.layers - layer):
            raise CannotEncode(f"the basis {self.basis} has no group of layers {layer} to {layer + spec.layers}.")
        return _Group(basis, index, self.step * UNIT)

    def planes(self, spec: BlockSpec, layer: int, context: Context) -> tuple[int, ...]:
        group, rows = self._group(spec, layer, context), spec.tokens - self.kept(spec)
        sizes = [-(-len(members) * rows // each) for members, each in zip(group.members, TOGETHER, strict=True)]
        sinks = 2 * spec.layers * self.kept(spec) * spec.channels * spec.torch_dtype.itemsize
        return (sinks + 2 * sizes[0], *sizes[1:])

    def encode(self, unit: torch.Tensor, spec: BlockSpec, layer: int, out: Sequence[Bytes], context: Context) -> None:
        group, sinks = self._group(spec, layer, context), self.kept(spec)
        head = as_bytes(unit[:, :, :sinks].to(spec.torch_dtype).contiguous())
        out[0][: head.size] = head
        targets = [out[0][head.size :], *out[1:]]
        found = group.forward(unit[:, :, sinks:]).T
        for plane, target in enumerate(targets):
            most = LARGEST[plane]
            codes = found[group.members[plane]].round_().clamp_(-most, most).to(torch.int16)
            _pack(codes.view(-1).numpy(), plane, target)

    def decode(self, planes: Sequence[Bytes], spec: BlockSpec, layer: int, out: torch.Tensor, context: Context) -> None:
        group, sinks = self._group(spec, layer, context), self.kept(spec)
        rows, head = spec.tokens - sinks, 2 * spec.layers * sinks * spec.channels * spec.torch_dtype.itemsize
        if sinks:
            kept = from_bytes(planes[0][:head], spec.torch_dtype)
            if not finite(kept):
                raise CorruptBlock("a kept value is not finite.")
            out[:, :, :sinks] = kept.view(spec.layers, 2, sinks, *spec.shape[3:])
        codes = [
            torch.from_numpy(_unpack(part, plane, len(members) * rows)).view(len(members), rows)
            for plane, (part, members) in enumerate(zip([planes[0][head:], *planes[1:]], group.members, strict=False))
        ]
        group.inverse(codes, out[:, :, sinks:], half=spec.dtype == "bfloat16" and bool(HALF & processor.flags()))


class _Group:
    """The transforms of a group of layers as one, in steps of the quantizer."""

    def __init__(self, basis: Basis, index: int, step: float) -> None:
        self._basis, self._parts, self._step = basis, basis.groups[index], step
        ratio = torch.cat([part.spread for part in self._parts]) / step
        order = torch.argsort(ratio, descending=True, stable=True)
        falling = ratio[order]
        self.members = [order[(falling < high) & (falling >= low)] for high, low in itertools.pairwise(EDGES)]
        """Components of each plane."""
        self._ends = list(itertools.accumulate(len(part.spread) for part in self._parts))

    def forward(self, unit: torch.Tensor) -> torch.Tensor:
        """Components ``[token, component]``, in steps, of a unit ``[layer][K|V][token][kv_head][dim]``; those that are
        in no plane are left out if they are the last ones, as they are in each part."""
        found = []
        for kind, part in zip(self._basis.kinds, self._parts, strict=True):
            rows = _side(unit, kind).permute(2, 0, 1, 3, 4).reshape(unit.shape[2], len(part.mean))
            coded = int((part.spread >= LEAST * self._step).sum())
            found.append(F.pad((rows - part.mean) @ part.forward[:, :coded], (0, len(part.spread) - coded)))
        return torch.cat(found, 1).mul_(1 / self._step)

    def inverse(self, codes: Sequence[torch.Tensor], out: torch.Tensor, *, half: bool) -> None:
        """Fill a unit from the codes ``[component, token]`` of its first planes.

        Codes of plane 0 need float32. The others are of at most 8 bits, which bfloat16 has exactly: what becomes
        bfloat16 (``half``) is computed in it from these, at twice the speed where the processor has it.
        """
        begin = 0
        for kind, part, end in zip(self._basis.kinds, self._parts, self._ends, strict=True):
            rows = part.mean
            for first, last, dtype in (
                (0, 1, torch.float32),
                (1, len(codes), torch.bfloat16 if half else torch.float32),
            ):
                if first >= last:
                    continue
                members = torch.cat(self.members[first:last])
                mine = (members >= begin) & (members < end)
                own = torch.cat([part.to(dtype) for part in codes[first:last]])[mine]
                matrix = _rows(part.inverse, members[mine] - begin).to(dtype)
                rows = torch.add(rows, own.T @ matrix, alpha=self._step)
            shape = (out.shape[2], out.shape[0], len(kind), *out.shape[3:])
            _side(out, kind).copy_(rows.view(shape).permute(1, 2, 0, 3, 4))
            begin = end


def _rows(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix; no copy where they follow each other, as they do where keys and values share a part."""
    if len(index) and int(index[-1]) - int(index[0]) == len(index) - 1:
        return matrix[int(index[0]) : int(index[-1]) + 1]
    return matrix[index]


def _side(unit: torch.Tensor, kind: str) -> torch.Tensor:
    return unit if kind == "kv" else unit[:, :1] if kind == "k" else unit[:, 1:]


def _pack(codes: np.ndarray, plane: int, out: Bytes) -> None:
    """Codes (int16, flat) as bytes of a plane."""
    if plane == 0:
        pairs = codes.view(np.uint8).reshape(-1, 2)
        out[: len(codes)], out[len(codes) :] = pairs[:, 0], pairs[:, 1]
        return
    most, each = LARGEST[plane], TOGETHER[plane]
    digits = np.zeros(len(out) * each, np.uint8)
    digits[: len(codes)] = codes + (128 if each == 1 else most)
    base = np.uint8(2 * most + 1)
    total = digits[each - 1 :: each].copy()
    for place in range(each - 2, -1, -1):
        total = total * base + digits[place::each]
    out[:] = total


def _unpack(data: Bytes, plane: int, count: int) -> np.ndarray:
    """Codes (int16) of a plane's bytes."""
    if plane == 0:
        return np.stack([data[:count], data[count:]], 1).reshape(-1).view(np.int16)
    most, each = LARGEST[plane], TOGETHER[plane]
    if each == 1:
        return data.astype(np.int16) - np.int16(128)
    base = 2 * most + 1
    if data.size and int(data.max()) >= base**each:
        raise CorruptBlock(f"a byte of plane {plane} holds no codes.")
    table = np.array([[byte // base**place % base for place in range(each)] for byte in range(base**each)], np.int16)
    return (table[data] - np.int16(most)).reshape(-1)[:count]
