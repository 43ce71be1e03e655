"""The rotation, as it is defined."""

from __future__ import annotations

import torch

from kvstore.codecs import hadamard


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension in its own precision."""
    size = hadamard.size_of(values.shape[-1])
    return (values.reshape(-1, size) @ hadamard.signs(size, values.dtype)).mul_(size**-0.5).view(values.shape)
