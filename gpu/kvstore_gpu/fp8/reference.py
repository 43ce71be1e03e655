"""The codec on the CPU: `kvstore.codecs.fp8`, through `kvstore_gpu.coded`."""

import torch

from kvstore.codecs.fp8 import LARGEST
from kvstore_gpu.coded import decode, encode

LARGEST_HALF = 63456.0
"""Largest float16 whose code is not decoded to 65,536, beyond the end of the type."""


def fits(unit: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether what is decoded from a layer's values is in the range of their type."""
    largest = LARGEST_HALF if dtype == torch.float16 else LARGEST * 2.0**119
    return not unit.numel() or float(unit.abs().max()) <= largest


__all__ = ["decode", "encode", "fits"]
