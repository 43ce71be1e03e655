"""Merge and restore, as they are defined."""

from __future__ import annotations

import torch

PARALLEL = 1e-4


def merge(
    lower: torch.Tensor, upper: torch.Tensor, t: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Direction, lengths and angle, computed in a precision."""
    x, y = lower.to(dtype), upper.to(dtype)
    la, lb = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    a, b = (torch.where(n > 0, v / torch.where(n > 0, n, 1), 0) for v, n in ((x, la), (y, lb)))
    omega = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    empty = (la == 0) | (lb == 0)
    omega = torch.where(empty, 0, omega)
    flat = omega.sin() < PARALLEL
    sine = torch.where(flat, 1, omega.sin())
    wa = torch.where(flat, 1 - t, ((1 - t) * omega).sin() / sine)
    wb = torch.where(flat, t, (t * omega).sin() / sine)
    wa, wb = torch.where(empty, (la > 0).to(dtype), wa), torch.where(empty, (lb > 0).to(dtype), wb)
    e = wa * a + wb * b
    length = e.norm(dim=-1, keepdim=True)
    e = torch.where(length > 0, e / torch.where(length > 0, length, 1), 0)
    return e, torch.stack([la, lb]).squeeze(-1), omega.squeeze(-1).mean(-1)


def restore(direction: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The two layers."""
    e, n = direction.to(dtype), lengths.to(dtype)
    return e * n[0, ..., None], e * n[1, ..., None]
