"""Affine quantization and bit planes, shared by the codecs that quantize.

A group is coded as ``low + scale * code`` with codes of 0 to 2^bits - 1. ``low`` is rounded down and ``scale`` up to
float16 before any code is made, so encoder and decoder use the same numbers and nothing saturates: the error is at
most scale / 2.

Bit order: plane p holds bit (bits - 1 - p) of every code, most significant first. Codes are taken in their flat
order; code 8i + j is bit j (of value 2^j) of byte i, and the last byte is filled with zeros. From the first m planes
a code is known up to 2^(bits-m) values; the middle of them is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.codecs.base import Bytes
from kvstore.codecs.scratch import scratch
from kvstore.errors import CannotEncode, CorruptBlock

_ONE = np.uint64(1)
_MAGNITUDE, _INFINITY = np.uint16(0x7FFF), 0x7C00


def quantize(values: torch.Tensor, bits: int, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8) of float32 values, and the lows and scales (float16) of the groups along an axis.

    Raises
    ------
    CannotEncode
        A group lies outside what float16 can say.
    """
    least, most = values.amin(axis, keepdim=True), values.amax(axis, keepdim=True)
    low = _round(least, down=True)
    scale = _round((most - low.float()) / (2**bits - 1), down=False)
    if not bool(torch.isfinite(low).all() and torch.isfinite(scale).all()):
        raise CannotEncode("a group of values is outside the range of float16.")
    step = scale.float()
    codes = (values - low.float()).mul_(torch.where(step > 0, 1 / step, 0.0)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.int32).to(torch.uint8), low, scale  # twice as fast as in one step


def _round(values: torch.Tensor, *, down: bool) -> torch.Tensor:
    """To float16, never up (or never down)."""
    half = values.to(torch.float16)
    wrong = half.float() > values if down else half.float() < values
    target = np.float16(-np.inf if down else np.inf)
    with np.errstate(over="ignore"):  # what becomes infinite is refused by who asked
        return torch.where(wrong, torch.from_numpy(np.nextafter(half.numpy(), target)), half)


def dequantize(
    codes: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, bits: int, known: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of codes of which the first ``known`` of ``bits`` bits are there (the codes are that short).

    They are computed in ``out`` if that is float32, else in memory of this thread, good until it calls this again, and
    copied into ``out`` if there is one.
    """
    rest, step = bits - known, scale.float()
    start = torch.add(low.float(), step, alpha=((1 << rest) - 1) / 2) if rest else low.float()
    there = out is not None and out.dtype == torch.float32
    found = out if out is not None and there else scratch("dequantize", tuple(codes.shape), torch.float32)
    found.copy_(codes).mul_(step * float(1 << rest) if rest else step).add_(start)
    return found if out is None or there else out.copy_(found)


def plane_nbytes(codes: int) -> int:
    """Bytes of one plane of so many codes."""
    return -(-codes // 8)


def pack(codes: Bytes, bits: int, planes: Sequence[Bytes], first: int = 0) -> None:
    """Write planes ``first``, ``first + 1``, … ``[…, bytes]`` of codes ``[…, count]``."""
    for plane, out in enumerate(planes, first):
        out[:] = np.packbits(codes & np.uint8(1 << (bits - 1 - plane)), axis=-1, bitorder="little")


def unpack(planes: Sequence[Bytes], count: int) -> Bytes:
    """Codes of planes ``[…, bytes]``, as short as there are planes: ``[…, count]``."""
    words = _bits(planes[0])  # eight codes a word: no bit of one leaves its byte
    for plane in planes[1:]:
        np.left_shift(words, _ONE, out=words)
        np.bitwise_or(words, _bits(plane), out=words)
    return np.ascontiguousarray(words.view(np.uint8).reshape(*planes[0].shape[:-1], -1)[..., :count])


def _bits(plane: Bytes) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(plane).reshape(-1), bitorder="little").view(np.uint64)


def numbers(data: Bytes, dtype: type[np.floating], *, positive: bool = False) -> torch.Tensor:
    """Numbers out of a part, which must be finite (and not negative), flat."""
    found = data.copy("C").reshape(-1).view(dtype)  # aligned, whatever the part is, and writable, as torch wants it
    if dtype is np.float16 and _plain(found.view(np.uint16), positive):
        return torch.from_numpy(found)
    if not np.isfinite(found).all() or (positive and (found < 0).any()):
        raise CorruptBlock("a scale, offset or kept value is not a finite number, or is negative.")
    return torch.from_numpy(found)


def _plain(bits: np.ndarray, positive: bool) -> bool:
    """Whether float16 numbers are plainly finite (and not negative), told by their bits: ten times as fast."""
    return not bits.size or int((bits if positive else bits & _MAGNITUDE).max()) < _INFINITY
