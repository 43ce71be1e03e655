"""Memory that one thread of a codec uses again and again: fresh pages cost more than the arithmetic done in them."""

from __future__ import annotations

import math
import threading

import torch

MOST = 32 << 20
"""Bytes of a piece that is kept; larger ones are made anew each time."""

_own = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with anything in it, good until this thread asks for the same name again."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > MOST:
        return torch.empty(shape, dtype=dtype)
    kept: dict[str, torch.Tensor] = _own.__dict__.setdefault("kept", {})
    found = kept.get(name)
    if found is None or len(found) < nbytes:
        found = kept[name] = torch.empty(nbytes, dtype=torch.uint8)
    return found[:nbytes].view(dtype).view(shape)
