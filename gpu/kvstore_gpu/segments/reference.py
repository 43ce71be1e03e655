"""The masses, as they are defined."""

from __future__ import annotations

import torch


def masses(parts: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Mean over heads of exp(part - whole)."""
    return (parts - whole).exp().mean(1)
