"""The scores, as they are defined."""

from __future__ import annotations

import torch


def scores(query: torch.Tensor, centroids: torch.Tensor, sizes: torch.Tensor, scale: float) -> torch.Tensor:
    """Scores ``[kv_head, centroid]`` in the precision given."""
    kv_heads, _, dim = centroids.shape
    logits = torch.einsum("gmd,gcd->gmc", query.view(kv_heads, -1, dim), centroids) * scale
    logits = logits.masked_fill((sizes <= 0)[:, None, :], -torch.inf)
    top = logits.amax(-1, keepdim=True)
    weight = (logits - torch.where(top.isfinite(), top, 0)).exp()
    total = (weight * sizes[:, None, :]).sum(-1, keepdim=True)
    return torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0).amax(1)
