"""Recomputing chosen tokens of a prompt layer by layer, among cached ones, while later layers may still be loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvstore.errors import InternalError
from kvstore_connectors.blend.prompt import LayerKV
from kvstore_gpu.carry import carry

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Cache
    from kvstore_gpu.carry import Carried


class Narrow(Protocol):
    """Drops rows on the way: given fresh and cached KV of the active rows, the mask of rows that go on."""

    def __call__(self, layer: int, rows: Tensor, fresh: LayerKV, cached: LayerKV) -> Tensor | None:
        """Mask over ``rows``, or None to keep all."""
        ...


class Watch(Protocol):
    """Sees the queries and keys of a layer just before its attention."""

    def __call__(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Rotated queries of ``rows`` and the rotated keys of all positions."""
        ...


@dataclass
class Pass:
    """One pass over the layers of a prompt.

    A row that is computed sees the keys of all positions up to its own: fresh ones of rows in this pass, those in the
    cache of the others.

    Attributes
    ----------
    rows : Tensor
        Sorted positions still active; fewer at the end where ``narrow`` dropped some.
    hidden : Tensor
        Hidden states of ``rows`` behind the layers passed so far.
    token_layers : int
        Rows computed, summed over layers: the work done.
    kv_only : bool
        Nobody reads the hidden states behind the last layer: it ends at its keys and values.
    tries : bool
        What is overwritten is kept, until `accept` or `take_back`.
    carried : Carried or None
        What the rows tell is carried on to cached tokens (`carried.carried_from`). Not with ``narrow``, which changes
        the rows on the way.
    reach, beyond : int and Tensor, or None
        From that layer on only these of the rows are computed, sorted.
    """

    model: Model
    ids: Tensor
    cache: Cache
    rows: Tensor
    narrow: Narrow | None = None
    watch: Watch | None = None
    wait_layer: Callable[[int], None] | None = None
    token_layers: int = 0
    kv_only: bool = False
    tries: bool = False
    carried: Carried | None = None
    reach: int | None = None
    beyond: Tensor | None = None

    def __post_init__(self) -> None:
        if self.carried is not None and self.narrow is not None:
            raise InternalError("rows that may change tell nothing of others.")
        self.model.ready(self.rows)
        self.hidden = self.model.embed(self.ids[self.rows])
        self._former: list[LayerKV] = []

    def steps(self) -> Iterator[int]:
        """Repair one layer after the other; yields each layer when its rows are written.

        `wait_layer` is called before a layer's cached rows are read and returns once they have come; what it raises
        ends the pass, with the layers from there on untouched.
        """
        for layer in range(self.model.layers):
            self._layer(layer)
            yield layer

    def accept(self) -> None:
        """Between two layers: these are the right rows."""
        self.tries = False
        self._former.clear()

    def take_back(self, rows: Tensor) -> None:
        """Between two layers: put back what was overwritten so far, and compute only these of the rows on, sorted."""
        for layer, (held, former) in enumerate(zip(self.cache, self._former, strict=False)):
            keys, values = 2 * former.keys - held.keys[self.rows], 2 * former.values - held.values[self.rows]
            held.keys.index_copy_(0, self.rows, former.keys)
            held.values.index_copy_(0, self.rows, former.values)
            if self.carried is not None:  # what they told is told the other way round
                carry(keys, values, held.keys, held.values, self.carried, layer=layer)
        self.accept()
        self.carried = self.reach = None
        self._only(rows)

    def run(self) -> Pass:
        """Pass all layers."""
        for _ in self.steps():
            pass
        return self

    def _only(self, rows: Tensor) -> None:
        self.rows, self.hidden = rows, self.hidden[torch.searchsorted(self.rows, rows)]

    def _layer(self, layer: int) -> None:
        held = self.cache[layer]
        if layer == self.reach and self.beyond is not None:
            self.carried = None
            self._only(self.beyond)
        queries, keys, values = self.model.qkv(layer, self.hidden)
        queries, keys = self.model.rope(layer, queries, keys, self.rows)
        if self.wait_layer is not None:  # so far nothing cached was needed
            self.wait_layer(layer)
        kept = None
        if self.narrow is not None:
            cached = LayerKV(held.keys[self.rows], held.values[self.rows])
            kept = self.narrow(layer, self.rows, LayerKV(keys, values), cached)
        keys, values = keys.to(held.keys.dtype), values.to(held.values.dtype)
        if self.carried is not None:
            carry(keys, values, held.keys, held.values, self.carried, layer=layer)
        if self.tries:
            self._former.append(LayerKV(held.keys[self.rows], held.values[self.rows]))
        held.keys.index_copy_(0, self.rows, keys)
        held.values.index_copy_(0, self.rows, values)
        if kept is not None:
            self.rows, self.hidden, queries = self.rows[kept], self.hidden[kept], queries[kept]
        self.token_layers += len(self.rows)
        if self.watch is not None:
            self.watch(layer, self.rows, queries, held.keys)
        if self.kv_only and layer == self.model.layers - 1:
            return
        out = self.model.attend(layer, queries, held.keys, held.values, self.rows)
        self.hidden = self.model.post(layer, self.hidden, out)


def empty_cache(model: Model, ids: Tensor, room: int = 0) -> list[LayerKV]:
    """A cache with nothing in it yet, for every token of a prompt and ``room`` more."""
    _, keys, values = model.qkv(0, model.embed(ids[:1]))
    shape = (len(ids) + room, *keys.shape[1:])
    return [LayerKV(keys.new_zeros(shape), values.new_zeros(shape)) for _ in range(model.layers)]


def prefill(model: Model, ids: Tensor, watch: Watch | None = None) -> tuple[Tensor, list[LayerKV]]:
    """Full prefill: hidden states of all tokens, and their KV."""
    cache = empty_cache(model, ids)
    whole = Pass(model, ids, cache, torch.arange(len(ids), device=ids.device), watch=watch).run()
    return whole.hidden, cache
