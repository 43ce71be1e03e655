"""clusters: the keys of a fixed context by what they look at, in two levels (Squeezed Attention, arXiv 2411.09688).

An index beside KV, not a step of a chain. Keys of a head are clustered by direction; a query scores the mean key of
each cluster as if it stood for all its keys, and only clusters whose share of the attention is above a threshold are
read. Clusters stand in groups, which are scored first. Keys and values are kept cluster by cluster, so what is read is
a few runs of memory; attention does not mind the order, since keys carry their positions.

The keys are those of one place in a prompt, after RoPE: the index serves exact prefixes, no moved chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvstore.errors import CannotEncode

ROUNDS = 10
"""Rounds of k-means. It starts from keys that stand evenly spaced, so the same keys give the same clusters."""


@dataclass(frozen=True, slots=True)
class Squeezed:
    """How fine an index is, and how much a query leaves out.

    Attributes
    ----------
    clusters, groups : int
        Clusters, and groups of clusters, in tenths of a percent of the keys (the paper's: 5 % and 1 %).
    sparsity : int
        Percent of the keys that a query leaves out, on average over the queries of the window.
    coarse : int
        Percent of the keys that are left out by looking at groups alone; less than ``sparsity``.
    window : int
        Last tokens of the context: always read, and their queries set the thresholds.
    """

    clusters: int = 50
    groups: int = 10
    sparsity: int = 70
    coarse: int = 0
    window: int = 100

    def __post_init__(self) -> None:
        if not (1 <= self.groups <= self.clusters <= 1000 and 0 <= self.coarse <= self.sparsity < 100):
            raise CannotEncode(f"{self}: groups <= clusters <= 1000, coarse <= sparsity < 100.")
        if self.window < 1:
            raise CannotEncode("the window has at least one token.")


@dataclass(slots=True)
class HeadIndex:
    """The keys and values of one KV head, cluster by cluster, and what is known of the clusters.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[token, dim]``, in the order of ``order``.
    order : torch.Tensor
        ``[token]``: which token of the context each row is.
    means, sizes, starts : torch.Tensor
        ``[cluster, dim]``, ``[cluster]``, ``[cluster]``: mean key, keys, and first row of each cluster.
    parent : torch.Tensor
        ``[cluster]``: its group, never falling.
    group_means, group_sizes : torch.Tensor
        ``[group, dim]`` and ``[group]``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor
    means: torch.Tensor
    sizes: torch.Tensor
    starts: torch.Tensor
    parent: torch.Tensor
    group_means: torch.Tensor
    group_sizes: torch.Tensor


def k_means(rows: torch.Tensor, count: int, weights: torch.Tensor) -> torch.Tensor:
    """Labels ``[row]`` of so many clusters by direction; some may stay empty.

    Parameters
    ----------
    rows : torch.Tensor
        ``[row, dim]``, float32.
    count : int
    weights : torch.Tensor
        ``[row]``: how many keys each row stands for.
    """
    unit = F.normalize(rows, dim=-1)
    centres = unit[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]
    labels = (unit @ centres.T).argmax(1)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, labels, unit * weights[:, None])
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=-1), centres)
        fresh = (unit @ centres.T).argmax(1)
        if torch.equal(fresh, labels):
            break
        labels = fresh
    return labels


def _means(rows: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Labels without gaps, and mean and weight of each cluster."""
    labels = labels.unique(return_inverse=True)[1]
    count = int(labels.max()) + 1
    total = rows.new_zeros(count).index_add_(0, labels, weights)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, labels, rows * weights[:, None])
    return labels, sums / total[:, None], total


def build(keys: torch.Tensor, values: torch.Tensor, rule: Squeezed) -> HeadIndex:
    """Index of keys and values ``[token, dim]`` of one KV head."""
    rows, ones = keys.float(), keys.new_ones(len(keys), dtype=torch.float32)
    count, coarse = (max(1, len(keys) * share // 1000) for share in (rule.clusters, rule.groups))
    labels, means, sizes = _means(rows, k_means(rows, count, ones), ones)
    parent, group_means, group_sizes = _means(means, k_means(means, min(coarse, len(means)), sizes), sizes)
    by_group = parent.argsort(stable=True)
    place = torch.empty_like(by_group)
    place[by_group] = torch.arange(len(by_group), device=keys.device)
    order = place[labels].argsort(stable=True)
    sizes = sizes[by_group]
    return HeadIndex(
        keys[order].contiguous(), values[order].contiguous(), order, means[by_group], sizes, sizes.cumsum(0) - sizes,
        parent[by_group], group_means, group_sizes,
    )  # fmt: skip


def shares(queries: torch.Tensor, means: torch.Tensor, sizes: torch.Tensor, scale: float) -> torch.Tensor:
    """Share of its attention that each query ``[query, dim]`` gives one key of each cluster, ``[query, cluster]``.

    Times ``sizes`` they add up to 1.
    """
    logits = queries.float() @ means.T * scale
    return (logits - (logits + sizes.log()).logsumexp(-1, keepdim=True)).exp()


def scores(index: HeadIndex, queries: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each key's group and cluster get from some queries ``[query, head, dim]``, ``[token]`` each.

    The mean over queries of the most that a head of the KV head's group gives.
    """
    found = []
    for means, sizes in ((index.group_means, index.group_sizes), (index.means, index.sizes)):
        by_query = shares(queries.flatten(0, 1), means, sizes, scale).view(*queries.shape[:2], -1)
        found.append(by_query.amax(1).mean(0).repeat_interleave(sizes.long()))
    return found[0], found[1]


def rows_of(index: HeadIndex, chosen: torch.Tensor) -> torch.Tensor:
    """Rows of the keys and values of chosen clusters (bool ``[cluster]``), rising."""
    starts, sizes = index.starts[chosen].long(), index.sizes[chosen].long()
    ends = sizes.cumsum(0)
    rows = torch.arange(int(ends[-1]) if len(ends) else 0, device=chosen.device)
    return rows + (starts - ends + sizes).repeat_interleave(sizes)
