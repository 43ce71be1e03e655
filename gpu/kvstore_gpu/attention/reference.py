"""The attention, as it is defined."""

from __future__ import annotations

import torch


def attend(
    queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp for dense keys and values ``[token, kv_head, dim]``, in the precision given."""
    group = queries.shape[1] // keys.shape[1]
    k, v = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", queries, k) * scale
    hidden = torch.arange(len(k), device=k.device)[None, :] > positions[:, None]
    scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("qhk,khd->qhd", (scores - lse[..., None]).exp(), v), lse


def dense(view: torch.Tensor, table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens ``[token, head, dim]`` of pages in the order of a table."""
    return view[table.long()].flatten(0, 1)[:tokens]


def runs(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending positions as maximal runs, for an engine's own attention.

    Each run is given as a sequence of its own that shares the page table; a mask at its lower right is then exact.

    Returns
    -------
    (starts, lengths)
        int32: where each run begins among the queries, and with one more at the end; how many keys it sees.
    """
    fresh = torch.ones_like(positions, dtype=torch.bool)
    fresh[1:] = positions[1:] != positions[:-1] + 1
    begins = fresh.nonzero().flatten()
    starts = torch.cat([begins, begins.new_tensor([len(positions)])]).int()
    return starts, (positions[starts[1:].long() - 1] + 1).int()
