"""The sums, as they are defined."""

from __future__ import annotations

import torch


def column_sums(
    queries: torch.Tensor,
    positions: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums ``[kv_head, token]`` for dense keys and values ``[token, kv_head, dim]``, in the precision given."""
    group = queries.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->qhk", queries, keys.repeat_interleave(group, 1)) * scale
    hidden = torch.arange(len(keys), device=keys.device)[None, :] > positions[:, None]
    mass = (scores - lse[..., None]).exp().masked_fill(hidden[:, None, :], 0)
    sums = mass.sum(0).view(keys.shape[1], group, -1).sum(1)
    return sums if values is None else sums * torch.linalg.vector_norm(values, dim=-1).T
