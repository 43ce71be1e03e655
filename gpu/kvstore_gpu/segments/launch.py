"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.segments import reference

SOURCE = Source("segments", ["masses"])


def masses(parts: torch.Tensor, whole: torch.Tensor, *, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
    """Share of each query's attention that falls on each segment.

    Parameters
    ----------
    parts : Tensor, float32, [segment, head, query]
        Log-sum-exp of the scores of a segment's keys; minus infinity where a query sees none of them.
    whole : Tensor, float32, [head, query]
        Log-sum-exp over all keys.

    Returns
    -------
    Tensor, float32, [segment, query]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.tensor(parts, "parts", shape=(None, None, None), dtypes=(torch.float32,))
    checks.tensor(whole, "whole", shape=parts.shape[1:], dtypes=(torch.float32,), device=parts.device)
    if uses_reference(parts.device):
        return reference.masses(parts, whole)
    segments, heads, queries = parts.shape
    out = torch.empty((segments, queries), dtype=torch.float32, device=parts.device)
    if out.numel() and heads:
        grid = blocks_for(-(-out.numel() // THREADS), parts.device, None)
        SOURCE.launch("masses", grid, (parts, whole, segments, heads, queries, out), parts.device, stream=stream)
    return out
