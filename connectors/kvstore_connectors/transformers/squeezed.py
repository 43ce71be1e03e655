"""Squeezed Attention decoding: the mean keys of a fixed context first, then the keys of the clusters that matter.

See `kvstore.codecs.clusters`. Thresholds are one number a level for the whole model, such that the last queries of the
context leave out the share of its keys that was asked for: heads that look everywhere read much, others little. The
first tokens stay out of the clusters and are always read: most heads park their attention there, and as a share of what
is left the cluster that holds an answer stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kvstore.codecs import clusters
from kvstore.codecs.clusters import HeadIndex, Squeezed
from kvstore_connectors.transformers.sparse import SparseCache, SparseLayer, attention, nbytes
from kvstore_connectors.transformers.support import base_model
from kvstore_gpu import centroid

SINKS = 4
"""First tokens, which are always read."""


class Centroids:
    """Mean keys of all heads of a layer, scored together.

    Parameters
    ----------
    heads : sequence of HeadIndex
        Those with fewer clusters or groups are filled up with ones of no keys.
    """

    def __init__(self, heads: Sequence[HeadIndex]) -> None:
        self._sizes = pad_sequence([one.sizes for one in heads], batch_first=True)
        self._parent = pad_sequence([one.parent for one in heads], batch_first=True)
        self._groups = pad_sequence([one.group_means for one in heads], batch_first=True)
        self._group_sizes = pad_sequence([one.group_sizes for one in heads], batch_first=True)
        self._means = torch.cat([pad_sequence([one.means for one in heads], batch_first=True), self._groups], 1)

    def choose(self, query: torch.Tensor, scale: float, thresholds: tuple[float, float]) -> torch.Tensor:
        """Clusters to read for the query ``[head, dim]`` of one token: bool ``[kv_head, cluster]``.

        Groups above the first threshold for any head are opened; of their clusters, those above the second are read.
        The denominator of the second look has the clusters that were opened, and the groups that were not.
        """
        query = query.float()
        opened = centroid.scores(query, self._groups, self._group_sizes, scale) > thresholds[0]
        inside = opened.gather(1, self._parent)
        sizes = torch.cat([self._sizes * inside, self._group_sizes * ~opened], 1)
        scores = centroid.scores(query, self._means, sizes, scale)[:, : inside.shape[1]]
        return (scores > thresholds[1]) & inside & (self._sizes > 0)


class SqueezedLayer(SparseLayer):
    """Keys and values of a layer, cluster by cluster; see `SparseLayer`."""

    def __init__(self, rule: Squeezed) -> None:
        super().__init__()
        self._rule = rule
        self.thresholds = (0.0, 0.0)
        self.heads: list[HeadIndex] = []
        self.scores: list[tuple[torch.Tensor, torch.Tensor]] = []

    def index(self, queries: torch.Tensor, scale: float) -> None:
        """See `SparseLayer.index`."""
        keys, values = self.keep_from(max(self.seen - self._rule.window, 0), SINKS)
        if not len(keys):
            return
        self.heads = [clusters.build(keys[:, head], values[:, head], self._rule) for head in range(keys.shape[1])]
        self._centroids = Centroids(self.heads)
        last = queries[-self._rule.window :].unflatten(1, (keys.shape[1], -1))
        self.scores = [clusters.scores(one, last[:, head], scale) for head, one in enumerate(self.heads)]

    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparseLayer.everything`."""
        if not self.heads:
            return self.keys[:, :, :0], self.values[:, :, :0]
        back = [one.order.argsort() for one in self.heads]
        keys = torch.stack([one.keys[order] for one, order in zip(self.heads, back, strict=True)])
        values = torch.stack([one.values[order] for one, order in zip(self.heads, back, strict=True)])
        return keys[None], values[None]

    def attend(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """See `SparseLayer.attend`. Each KV head reads as many keys as it needs."""
        self.touched = self.exact_nbytes
        chosen = self._centroids.choose(query, scale, self.thresholds) if self.heads else None
        found = []
        for head, own in enumerate(query.view(self.keys.shape[1], -1, query.shape[-1])):
            keys, values = self.keys[0, head], self.values[0, head]
            if chosen is not None:
                index = self.heads[head]
                rows = clusters.rows_of(index, chosen[head, : len(index.sizes)])
                near, far = index.keys[rows], index.values[rows]
                looked = len(index.means) + len(index.group_means)
                self.touched += nbytes(near, far) + looked * keys.shape[-1] * keys.element_size()
                keys, values = torch.cat([near, keys]), torch.cat([far, values])
            found.append(attention(own, keys[None], values[None], scale))
        return torch.cat(found)


class SqueezedCache(SparseCache):
    """A cache whose steps read the clusters that matter.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `KVStoreCache` takes.
    rule : Squeezed

    Examples
    --------
    >>> with SqueezedCache(model, Squeezed(sparsity=70)) as past:  # doctest: +SKIP
    ...     out = model.generate(**inputs, past_key_values=past)
    """

    def __init__(self, model: Any, rule: Squeezed) -> None:
        self._rule = rule
        count = int(base_model(model).config.num_hidden_layers)
        super().__init__(model, [SqueezedLayer(rule) for _ in range(count)])

    def complete(self) -> None:
        """Set the thresholds: quantiles of what all keys of the model get from the window's queries."""
        scores = [pair for layer in self.layers for pair in layer.scores]
        if not scores:
            return
        levels = []
        for level, share in enumerate((self._rule.coarse, self._rule.sparsity)):
            flat = torch.cat([pair[level].cpu() for pair in scores]).sort().values
            levels.append(float(flat[len(flat) * share // 100]) if share else -1.0)
        for layer in self.layers:
            layer.thresholds, layer.scores = (levels[0], levels[1]), []
