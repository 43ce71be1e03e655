"""Blocks between vLLM's paged cache and kvstore's memory: the only place that copies KV.

A stored block is ``[layer][side][page][...]``: with the canonical layout the sides are K and V and a page is
``[token][kv_head][dim]``, so pages of a side lie one after the other as ``[token]``. Where whole pages are kept there
is one side. Engine blocks are named by their ids; one block of kvstore covers several of them, in order.

Two implementations do the same: `HostPages` copies between the cache and shared memory at once; `DevicePages` goes
through staging memory on the device, so that the engine's stream only pays for a gather.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore_connectors.vllm.layout import PageViews, same_layout

Bytes = NDArray[np.uint8]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes are copied as integers of the element's size: NumPy does not know bfloat16."""


class Pages(ABC):
    """The cache of all layers of this rank, and how it is stored.

    Parameters
    ----------
    layers : list of PageViews
        One for each layer, in the order of the model.
    block_tokens : int
        Tokens in a block of kvstore.
    engine_block : int
        Tokens in a block of the engine's block table.
    page_tokens : int
        Tokens in a page of the kernels' cache; `engine_block` is a multiple of it.

    Attributes
    ----------
    nbytes : int
        Payload bytes of a block.
    """

    def __init__(self, layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> None:
        self.layout = same_layout(layers)
        if engine_block % page_tokens or block_tokens % engine_block:
            raise ConfigError(
                f"vllm: blocks of {block_tokens} tokens can not be made of engine blocks of {engine_block} tokens "
                f"and pages of {page_tokens}.",
                "Set `block_tokens` in kv_connector_extra_config to a multiple of vLLM's block size.",
            )
        self.block_tokens = block_tokens
        self.engine_block = engine_block
        self.per_block = block_tokens // engine_block
        self._split = engine_block // page_tokens
        sample = layers[0].sides[0]
        self.dtype = sample.dtype
        self.device = sample.device
        self.shape = (len(layers), len(layers[0].sides), block_tokens // page_tokens, *sample.shape[1:])
        """[layer, side, page, *page shape]"""
        self.nbytes = int(np.prod(self.shape)) * sample.element_size()
        integer = _INTEGER[sample.element_size()]
        self.caches: list[list[torch.Tensor]] = [[side.view(integer) for side in views.sides] for views in layers]

    def page_ids(self, engine_ids: Sequence[int]) -> list[int]:
        """Ids of kernel pages of some engine blocks."""
        if self._split == 1:
            return list(engine_ids)
        return [block * self._split + part for block in engine_ids for part in range(self._split)]

    @abstractmethod
    def save(self, engine_ids: Sequence[int], into: Bytes) -> None:
        """Copy a whole block out of the cache.

        Parameters
        ----------
        engine_ids : sequence of int
            The engine blocks that make up the block, all of them.
        into : ndarray, uint8, [nbytes]
        """

    @abstractmethod
    def load(self, payload: Bytes, first: int, engine_ids: Sequence[int], after: Any = None) -> None:
        """Copy a part of a block into the cache; the bytes are there when this returns.

        Parameters
        ----------
        payload : ndarray, uint8, [nbytes]
            The stored block.
        first : int
            Place in the block of the first engine block to fill.
        engine_ids : sequence of int
            The engine blocks to fill, in order.
        after : device event, optional
            What the copy has to wait for: kernels may still read what these blocks held before.
        """

    def mark(self) -> Any:
        """An event that is over when the work given to the device so far is over; None where nothing is queued."""
        return None


class HostPages(Pages):
    """The cache lies in the machine's memory. NumPy copies: one thread, no interpreter lock, no OpenMP team."""

    def __init__(self, layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> None:
        super().__init__(layers, block_tokens, engine_block, page_tokens)
        self._arrays = [[side.numpy() for side in layer] for layer in self.caches]
        self._kind = self._arrays[0][0].dtype

    def save(self, engine_ids: Sequence[int], into: Bytes) -> None:
        """See `Pages.save`."""
        stored = into.view(self._kind).reshape(self.shape)
        runs = list(consecutive(self.page_ids(engine_ids)))
        for layer, sides in enumerate(self._arrays):
            for side, cache in enumerate(sides):
                target = stored[layer, side]
                for place, page, count in runs:
                    np.copyto(target[place : place + count], cache[page : page + count])

    def load(self, payload: Bytes, first: int, engine_ids: Sequence[int], after: Any = None) -> None:
        """See `Pages.load`."""
        stored = payload.view(self._kind).reshape(self.shape)
        offset = first * self._split
        runs = list(consecutive(self.page_ids(engine_ids)))
        for layer, sides in enumerate(self._arrays):
            for side, cache in enumerate(sides):
                source = stored[layer, side]
                for place, page, count in runs:
                    np.copyto(cache[page : page + count], source[offset + place : offset + place + count])


class DevicePages(Pages):
    """The cache lies on a CUDA device.

    Saving takes two steps. `stage` runs on the engine's stream, behind the kernels that wrote the KV, and gathers the
    block into memory of its own; from then on the engine may reuse the pages. `save_staged` brings it to the host on a
    side stream, from another thread. Loading waits for `after` on the side stream, since kernels that were given to the
    device earlier may still read the pages' old content.
    """

    def __init__(
        self, layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int, staging: int = 8
    ) -> None:
        super().__init__(layers, block_tokens, engine_block, page_tokens)
        self._integer = self.caches[0][0].dtype
        with torch.cuda.device(self.device):
            self._out = torch.cuda.Stream()
            self._in = torch.cuda.Stream()
        self._free = [torch.empty(self.shape, dtype=self._integer, device=self.device) for _ in range(staging)]
        self._landing = torch.empty(self.shape, dtype=self._integer, device=self.device)
        self._landing_lock = threading.Lock()

    def stage(self, engine_ids: Sequence[int]) -> tuple[torch.Tensor, torch.cuda.Event] | None:
        """Gather a block on the current stream; None if all staging memory is in use."""
        try:
            staged = self._free.pop()
        except IndexError:
            return None
        ids = self._device_ids(engine_ids)
        for layer, sides in enumerate(self.caches):
            for side, cache in enumerate(sides):
                staged[layer, side].copy_(cache.index_select(0, ids))
        event = torch.cuda.Event()
        event.record()
        return staged, event

    def _device_ids(self, engine_ids: Sequence[int]) -> torch.Tensor:
        # From pinned memory: a copy from pageable memory would wait for everything queued on the stream.
        return torch.tensor(self.page_ids(engine_ids)).pin_memory().to(self.device, non_blocking=True)

    def unstage(self, staged: tuple[torch.Tensor, torch.cuda.Event]) -> None:
        """Give staging memory back."""
        self._free.append(staged[0])

    def save_staged(self, staged: tuple[torch.Tensor, torch.cuda.Event], into: Bytes) -> None:
        """Bring a staged block to the host; it is there when this returns."""
        buffer, event = staged
        target = torch.from_numpy(into).view(self._integer).view(self.shape)
        with torch.cuda.device(self.device), torch.cuda.stream(self._out):
            self._out.wait_event(event)
            target.copy_(buffer, non_blocking=True)
            self._out.synchronize()

    def save(self, engine_ids: Sequence[int], into: Bytes) -> None:
        """See `Pages.save`."""
        staged = self.stage(engine_ids)
        if staged is None:
            raise RuntimeError("all staging memory is in use")
        try:
            self.save_staged(staged, into)
        finally:
            self.unstage(staged)

    def load(self, payload: Bytes, first: int, engine_ids: Sequence[int], after: Any = None) -> None:
        """See `Pages.load`."""
        source = torch.from_numpy(payload).view(self._integer).view(self.shape)
        offset, count = first * self._split, len(engine_ids) * self._split
        with self._landing_lock, torch.cuda.device(self.device), torch.cuda.stream(self._in):
            if after is not None:
                self._in.wait_event(after)
            ids = self._device_ids(engine_ids)
            self._landing.copy_(source, non_blocking=True)
            for layer, sides in enumerate(self.caches):
                for side, cache in enumerate(sides):
                    cache.index_copy_(0, ids, self._landing[layer, side, offset : offset + count])
            self._in.synchronize()

    def mark(self) -> Any:
        """See `Pages.mark`."""
        event = torch.cuda.Event()
        event.record()
        return event


def consecutive(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of ids that follow one another: (place of the first, first id, length)."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield start, ids[start], place - start
            start = place


def make_pages(layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> Pages:
    """The implementation for the device that the cache lies on."""
    device = layers[0].sides[0].device
    if device.type == "cpu":
        return HostPages(layers, block_tokens, engine_block, page_tokens)
    if device.type == "cuda":
        return DevicePages(layers, block_tokens, engine_block, page_tokens)
    raise ConfigError(f"vllm: a cache on {device.type!r} is not supported.", "Supported are cpu and cuda.")
