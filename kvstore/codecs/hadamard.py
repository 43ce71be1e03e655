"""The Hadamard rotation of heads: it spreads an outlier over all channels, and is its own inverse.

Sylvester's matrix over the square root of its size, block by block: a head is cut into blocks of `size_of` elements.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kvstore.codecs import processor
from kvstore.codecs.scratch import scratch

MOST = 32
"""Larger matrices cost more and spread an outlier no better."""


@lru_cache(maxsize=16)
def signs(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sylvester's matrix of a size that is a power of two: entries of 1 and -1."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found.to(dtype)


def size_of(dim: int) -> int:
    """What is rotated as one: the largest power of two that divides a head, up to `MOST`."""
    return min(dim & -dim, MOST)


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension, in float32."""
    size = size_of(values.shape[-1])
    return (values.reshape(-1, size) @ signs(size)).mul_(size**-0.5).view(values.shape)


def sums(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Signed sums of rows of small integers (int8 ``[row, size]``) by Sylvester's matrix, exactly, into float32."""
    if len(codes):
        (summed_as_integers if in_integers() else summed_as_floats)(codes, out)


def summed_as_integers(codes: torch.Tensor, out: torch.Tensor) -> None:
    """As int8, summed up in int32."""
    out.copy_(torch.ops.aten._int_mm(codes, signs(codes.shape[1], torch.int8)))


def summed_as_floats(codes: torch.Tensor, out: torch.Tensor) -> None:
    """As float32, which holds such sums exactly."""
    torch.mm(scratch("codes", tuple(codes.shape), torch.float32).copy_(codes), signs(codes.shape[1]), out=out)


def in_integers() -> bool:
    """Whether integers are the faster way here: they take a third of the time of float32 where the processor has
    AVX-512 VNNI, up to twenty times as long where it has no instruction for such sums.
    """
    fast = "avx512_vnni" in processor.flags()
    return fast and hasattr(torch.ops.aten, "_int_mm") and torch.backends.mkldnn.is_available()
