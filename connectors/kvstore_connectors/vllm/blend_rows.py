"""Single tokens' KV in vLLM's paged cache: read through the learned views, written by the layer's own operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.blend.prompt import brought
from kvstore_connectors.blend.varlen import PAGE
from kvstore_connectors.vllm.layout import PageViews, WriteOp
from kvstore_connectors.vllm.pages import Pages

if TYPE_CHECKING:
    from torch import Tensor


class _Slots(NamedTuple):
    """Page of each token, place in it, and both in one number as the engine counts them."""

    pages: Tensor
    places: Tensor
    slots: Tensor


class Rows:
    """The cache of all layers, by token.

    Parameters
    ----------
    layers : list of PageViews
        One for each layer, in the order of the model.
    writes : list of (write operation, cache)
        Of each layer; empty where nothing will be written.
    pages : Pages
    page_tokens : int
        Tokens in a page of the kernels' cache.

    Raises
    ------
    ConfigError
        If the order of tokens inside a page is not known.
    """

    def __init__(
        self, layers: list[PageViews], writes: list[tuple[WriteOp, Tensor]], pages: Pages, page_tokens: int
    ) -> None:
        if not all(views.page_tokens_known for views in layers):
            raise ConfigError(
                "chunks: the order of tokens inside a page of this attention backend is not known.",
                "Use another attention backend, or reuse prefixes only.",
            )
        self._views = [views.sides for views in layers]
        self._writes = writes
        self._pages = pages
        self._page_tokens = page_tokens
        self.layers = len(layers)
        self.engine_block = pages.engine_block
        sample = layers[0].sides[0]
        self.dtype, self.device = sample.dtype, sample.device
        self.shape = (int(sample.shape[2]), int(sample.shape[3]))
        self._last: tuple[Sequence[int], int, int, _Slots] | None = None

    def _slots(self, table: Sequence[int], start: int, stop: int) -> _Slots:
        """Where each token lies; layer after layer asks with the same table."""
        if self._last is None or self._last[0] is not table or self._last[1:3] != (start, stop):
            pages = brought(torch.tensor(self._pages.page_ids(table), dtype=torch.int64), self.device)
            tokens = torch.arange(start, stop, device=self.device)
            pages, places = pages[tokens // self._page_tokens], tokens % self._page_tokens
            self._last = table, start, stop, _Slots(pages, places, pages * self._page_tokens + places)
        return self._last[3]

    def read(self, layer: int, table: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V ``[token, head, dim]`` of tokens `start` to `stop` of a request with this block table."""
        pages, places, _ = self._slots(table, start, stop)
        keys, values = self._views[layer]
        return keys[pages, places], values[pages, places]

    def room(self, tokens: int) -> tuple[int, ...]:
        """Shape of memory for so many tokens of all layers: ``[layer, side, token, head, dim]``, in whole pages."""
        page = math.lcm(PAGE, self._page_tokens)
        return self.layers, 2, -(-tokens // page) * page, *self.shape

    def read_front(self, table: Sequence[int], stop: int, room: Tensor) -> None:
        """All layers' K and V of the tokens before `stop`, the end of an engine block, to where a `room` begins."""
        self._pages.read(table[: stop // self.engine_block], room)

    def write(self, layer: int, table: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Put K and V ``[token, head, dim]`` of tokens from `start` on where the engine looks for them."""
        write, cache = self._writes[layer]
        write(keys.contiguous(), values.contiguous(), cache, self._slots(table, start, start + len(keys)).slots)
