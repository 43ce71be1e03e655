"""The choice, as it is defined."""

from __future__ import annotations

import torch


def top(scores: torch.Tensor, wanted: int, forced: torch.Tensor | None) -> torch.Tensor:
    """Ascending indices of the highest scores; of equal ones the first."""
    keys = scores.to(torch.float64) + 0.0
    keys = torch.where(keys.isnan(), torch.full_like(keys, torch.inf), keys)
    order = torch.argsort(keys, descending=True, stable=True)
    nan = scores.isnan()[order]
    order = torch.cat([order[nan], order[~nan]])
    if forced is not None:
        order = torch.cat([order[forced[order]].sort().values, order[~forced[order]]])
    return order[:wanted].sort().values.to(torch.int32)
