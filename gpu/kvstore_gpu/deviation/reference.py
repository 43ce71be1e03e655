"""The deviation, as it is defined."""

from __future__ import annotations

import torch


def deviation(fresh: torch.Tensor, kept: torch.Tensor, relative: bool, dtype: torch.dtype) -> torch.Tensor:
    """Squared distance of each token, in a precision."""
    a, b = fresh.to(dtype).flatten(1), kept.to(dtype).flatten(1)
    distance = (a - b).square().sum(1)
    return distance / a.square().sum(1).clamp(min=1e-30) if relative else distance
