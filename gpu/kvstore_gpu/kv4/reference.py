"""The codec on the CPU: `kvstore.codecs.kv4` behind ``prerope``, through `kvstore_gpu.coded`."""

import torch

from kvstore.codecs import hadamard
from kvstore_gpu.coded import decode, encode

LARGEST_HALF, LARGEST_OTHER = 2.0**15, 2.0**127


def fits(unit: torch.Tensor, kept: int, dtype: torch.dtype) -> bool:
    """Whether nothing decoded from a layer can reach the end of its type, however few planes are there.

    Decoding turns a key, which makes it larger by up to the root of 2, and rotates values in groups of up to 32, which
    makes one larger by up to the root of 32. The first tokens are kept as they are, keys before their turn.
    """
    largest = LARGEST_HALF if dtype == torch.float16 else LARGEST_OTHER
    keys, sinks, values = unit[:, 0], unit[:, 1, :kept], hadamard.rotate(unit[:, 1, kept:].contiguous())
    return (
        bool((keys.abs() <= largest).all())
        and bool(torch.isfinite(sinks).all())
        and bool((values.abs() <= largest / 4).all())
    )


__all__ = ["decode", "encode", "fits"]
