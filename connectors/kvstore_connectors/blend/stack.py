"""Many repairs of one prompt side by side in one pass, and many chunks captured in one: for measuring, and builders.

The rows of all copies lie behind each other, each copy in a stretch of its own, and attention stays inside a stretch.
Everything else of a model works row by row and does not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.blend.recompute import Pass, empty_cache

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Cache


class Stacked:
    """A model over ``copies`` stretches of ``stride`` positions; of each, equally many rows are computed."""

    def __init__(self, model: Model, copies: int, stride: int) -> None:
        self._model, self._copies, self._stride = model, copies, stride
        self.layers, self.scale = model.layers, model.scale
        self.embed, self.qkv, self.post, self.logits = model.embed, model.qkv, model.post, model.logits
        self._at: tuple[Tensor | None, Tensor | None] = (None, None)

    def rope(self, layer: int, rows: Tensor, positions: Tensor) -> Tensor:
        return self._model.rope(layer, rows, self._inside(positions))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        def stretches(rows: Tensor) -> Tensor:
            return rows.view(self._copies, -1, *rows.shape[1:]).transpose(1, 2)

        inside = self._inside(positions).view(self._copies, 1, -1, 1)
        seen = torch.arange(self._stride, device=keys.device) <= inside
        grouped = queries.shape[1] != keys.shape[1]
        out = scaled_dot_product_attention(
            stretches(queries), stretches(keys), stretches(values), attn_mask=seen, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).reshape(len(queries), -1)

    def total(self, scores: Tensor, how: Literal["sum", "max"]) -> Tensor:
        return self._model.total(scores, how)

    def _inside(self, positions: Tensor) -> Tensor:
        if self._at[0] is not positions:  # the same rows pass one layer after the other
            self._at = positions, positions % self._stride
        inside = self._at[1]
        return positions if inside is None else inside


def stack(cache: Cache, copies: int) -> list[LayerKV]:
    """Copies of a cache behind each other."""
    return [LayerKV(held.keys.repeat(copies, 1, 1), held.values.repeat(copies, 1, 1)) for held in cache]


def run_stacked(model: Model, ids: Tensor, cache: Cache, rows: Sequence[Tensor]) -> list[Tensor]:
    """One pass over a stack of copies, each with rows of its own.

    Parameters
    ----------
    ids : Tensor
        Token ids ``[stride]`` of one copy; rows of the cache beyond them are not used.
    cache : Cache
        ``[copies * stride, ...]``, as `stack` makes it; written in place.
    rows : sequence of Tensor
        Sorted positions to compute, for each copy.

    Returns
    -------
    list of Tensor
        Hidden states behind the last layer, for each copy as many as it has rows.
    """
    stride = len(cache[0].keys) // len(rows)
    ids = torch.nn.functional.pad(ids, (0, stride - len(ids)))
    longest = max(map(len, rows))
    padded = [torch.cat([one[:1].expand(longest - len(one)), one]) + i * stride for i, one in enumerate(rows)]
    whole = Pass(Stacked(model, len(rows), stride), ids.repeat(len(rows)), cache, torch.cat(padded)).run()
    hidden = whole.hidden.view(len(rows), longest, -1)
    return [part[longest - len(one) :] for part, one in zip(hidden, rows, strict=True)]


def prefill_stacked(model: Model, lead: Tensor, chunks: Sequence[Tensor]) -> list[list[LayerKV]]:
    """KV of chunks, each behind ``lead`` and blind to the others, in one pass.

    Returns
    -------
    list of list of LayerKV
        For each chunk, for each layer, its own rows.
    """
    ids = torch.stack([torch.cat([lead, one]) for one in pad_sequence(list(chunks), batch_first=True)])
    copies, stride = ids.shape
    cache = empty_cache(model, ids.flatten())
    Pass(Stacked(model, copies, stride), ids.flatten(), cache, torch.arange(ids.numel(), device=ids.device)).run()
    found = []
    for i, chunk in enumerate(chunks):
        own = slice(i * stride + len(lead), i * stride + len(lead) + len(chunk))
        found.append([LayerKV(held.keys[own].clone(), held.values[own].clone()) for held in cache])
    return found
