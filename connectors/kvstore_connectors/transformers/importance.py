"""Which tokens of a prompt get attention: measured while the model runs, stored with the blocks.

Of each pass at most `MOST` queries are looked at, evenly spaced and the last one among them, layer by layer: sums over
them are made from queries and keys in windows, and no attention matrix is kept. A pass of 4,000 tokens computes three
hundredths of its attention logits a second time.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from kvstore.codecs import importance
from kvstore_connectors.base import shielded
from kvstore_connectors.transformers.attention import Detour

if TYPE_CHECKING:
    from kvstore_connectors.transformers.prefix import PrefixCache

MOST = 128
"""Queries of a pass that are looked at."""


class Shares:
    """Attention that the tokens of a cache got, over layers and heads, as a multiple of an even share."""

    def __init__(self) -> None:
        self._total = torch.zeros(0, 0)
        self._queries = torch.zeros(0)

    def add(self, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        """Add what the last tokens' queries in one layer gave to all keys.

        Parameters
        ----------
        queries : torch.Tensor
            ``[batch, head, query, dim]``, after RoPE.
        keys : torch.Tensor
            ``[batch, kv_head, token, dim]``, after RoPE.
        scale : float
            What the model multiplies logits by.
        """
        count, tokens, dim = queries.shape[2], keys.shape[2], queries.shape[3]
        rows = torch.linspace(0, count - 1, min(count, MOST)).round().long()
        positions = (rows + (tokens - count)).to(keys.device)
        chosen = queries.detach()[:, :, rows.to(queries.device)].transpose(1, 2).float() * (scale * dim**0.5)
        fresh = torch.stack(
            [
                importance.even_shares(q, k.detach().transpose(0, 1), positions).mean(0)
                for q, k in zip(chosen, keys, strict=True)
            ]
        )
        if len(self._total):
            fresh[:, : self._total.shape[1]] += self._total
        seeing = (positions[:, None] >= torch.arange(tokens, device=keys.device)).sum(0).float()
        seeing[: len(self._queries)] += self._queries.to(seeing)
        self._total, self._queries = fresh, seeing

    def of(self, row: int, begin: int, end: int) -> bytes:
        """Importance of some tokens of a prompt for the header of their block; empty if no query has seen one."""
        if row >= len(self._total) or end > len(self._queries) or not bool((self._queries[begin:end] > 0).all()):
            return b""
        return importance.pack(self._total[row, begin:end] / self._queries[begin:end])

    def crop(self, tokens: int) -> None:
        """Forget the tokens behind the first ones."""
        self._total, self._queries = self._total[:, :tokens], self._queries[:tokens]

    def select(self, rows: Any) -> None:
        """Put the prompts into another order, or keep some, or repeat them."""
        if len(self._total):
            self._total = self._total[torch.as_tensor(rows, device=self._total.device)]

    def copy(self) -> Shares:
        """A copy that goes on independently."""
        twin = Shares()
        twin._total, twin._queries = self._total, self._queries
        return twin


class Watch:
    """Has a model's attention seen by the cache that is under way; holds neither.

    Raises
    ------
    ConfigError
        The model's attention cannot be watched.
    """

    def __init__(self, model: Any) -> None:
        self._past: weakref.ref[PrefixCache] | None = None
        self._detour = Detour(model, self._around)
        self._detour.__enter__()

    def look(self, past: PrefixCache | None) -> None:
        """The cache that the next pass fills, if any."""
        self._past = None if past is None else weakref.ref(past)

    def end(self) -> None:
        """Leave the model as it was."""
        self._detour.__exit__(None, None, None)

    def _around(self, inner: Any, module: Any, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        self._seen(module, query, key, options.get("scaling"))
        return inner(module, query, key, *rest, **options)

    @shielded()
    def _seen(self, module: Any, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
        past = None if self._past is None else self._past()
        if past is None or past.shares is None or past.layers[module.layer_idx].keys is not key:
            return  # a pass with another cache, or none
        with torch.no_grad():
            past.shares.add(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
