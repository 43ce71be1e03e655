"""The reconstruction, as it is defined."""

from __future__ import annotations

import torch

from kvstore_gpu.rope.reference import turn


def reconstruct(
    left: torch.Tensor,
    right: torch.Tensor,
    chosen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """Keys ``[kv_head, row, dim]`` in the precision given."""
    rows = chosen.long()
    keys = torch.einsum("gnr,gdr->gnd", left[rows], right)
    turned = [turn(one[:, None], cos[at], sin[at], interleaved)[:, 0] for one, at in zip(keys, rows, strict=True)]
    return torch.stack(turned)
