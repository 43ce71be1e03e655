"""Rows and slots, as they are defined."""

from __future__ import annotations

import torch


def scatter(view: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows into slots."""
    there = (slots >= 0) & (slots < view.shape[0] * view.shape[1])
    page, token = slots[there] // view.shape[1], slots[there] % view.shape[1]
    view[page, token] = rows[there]


def gather(view: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Read slots into rows."""
    there = (slots >= 0) & (slots < view.shape[0] * view.shape[1])
    rows[there] = view[slots[there] // view.shape[1], slots[there] % view.shape[1]]
