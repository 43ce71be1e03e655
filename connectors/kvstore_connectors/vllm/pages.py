"""Blocks between vLLM's paged cache and kvstore's memory: the only place that copies KV.

A stored block is ``[layer][side][page][...]``: with the canonical layout the sides are K and V and a page is
``[token][kv_head][dim]``, so pages of a side lie one after the other as ``[token]``. Where whole pages are kept there
is one side. Engine blocks are named by their ids; one block of kvstore covers several of them, in order.

`HostPages` copies between the cache and shared memory at once; for a CUDA device there is `device_pages.DevicePages`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore_connectors.vllm.layout import PageViews, same_layout

if TYPE_CHECKING:
    from kvstore_connectors.vllm.code import BlockCode, Codes

Bytes = NDArray[np.uint8]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes are copied as integers of the element's size: NumPy does not know bfloat16."""


class Piece(NamedTuple):
    """A block, or the first part of one that is wanted.

    Attributes
    ----------
    parts : sequence of ndarray, uint8
        The stored block's bytes in shared memory, in order.
    first : int
        Place in the block of the first engine block.
    engine_ids : sequence of int
        The engine blocks, in order.
    position : int
        Position of the block's first token.
    device : Tensor, uint8, or None
        The block's bytes in the memory of the cache's device, if they are there, too.
    code : BlockCode or None
        How the stored block is encoded.
    """

    parts: Sequence[Bytes]
    first: int
    engine_ids: Sequence[int]
    position: int = 0
    device: Any = None
    code: BlockCode | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored block."""
        return sum(part.nbytes for part in self.parts)


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
        Bytes of a block as the engine has it.
    codes : Codes or None
        How blocks of a lossy namespace may be encoded (`use`).
    """

    codes: Codes | None = None

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

    def use(self, codes: Codes) -> None:
        """Know encoded blocks when they are loaded, and store them encoded if this engine has a chain of its own."""
        self.codes = codes

    @property
    def code(self) -> BlockCode | None:
        """How this engine stores its blocks."""
        return None if self.codes is None else self.codes.own

    def stored_nbytes(self, position: int) -> int:
        """Bytes of a block as it is stored, whose first token has this position."""
        return self.nbytes if self.code is None else self.code.nbytes(position)

    def known(self, piece: Piece) -> Piece | None:
        """A stored block with its code; None if it can not be loaded."""
        if piece.nbytes == self.nbytes:
            return piece
        code = None if self.codes is None else self.codes.of(piece.parts, piece.position)
        return None if code is None else piece._replace(code=code)

    @abstractmethod
    def save(self, engine_ids: Sequence[int], into: Bytes, position: int = 0) -> None:
        """Copy a whole block out of the cache, and encode it if that was said.

        Parameters
        ----------
        engine_ids : sequence of int
            The engine blocks that make up the block, all of them.
        into : ndarray, uint8, [stored_nbytes]
        position : int
            Of the first token.

        Raises
        ------
        CannotEncode
            If the block has values that the code cannot say.
        """

    @abstractmethod
    def read(self, engine_ids: Sequence[int], into: torch.Tensor) -> None:
        """Copy engine blocks out of the cache, as they are there; on a device behind what its stream was given.

        Parameters
        ----------
        engine_ids : sequence of int
        into : Tensor, [layer, side, token, *row], dense
            On the cache's device; of its tokens, whole pages, the first ones are written.
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

    def start(self, pieces: Sequence[Piece], after: Any = None) -> Callable[[], None]:
        """`load` for several blocks; the function that is returned waits until all bytes are there."""
        for piece in pieces:
            whole = piece.parts[0] if len(piece.parts) == 1 else np.concatenate(piece.parts)
            if piece.code is not None:
                whole = piece.code.decode(whole, piece.position)
            self.load(whole, piece.first, piece.engine_ids, after)
        return lambda: None

    def mark(self) -> Any:
        """An event that is over when the work given to the device so far is over; None where nothing is queued."""
        return None


class HostPages(Pages):
    """The cache lies in the machine's memory. NumPy copies: one thread, no interpreter lock, no OpenMP team."""

    def __init__(self, layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> None:
        super().__init__(layers, block_tokens, engine_block, page_tokens)
        self._arrays = [[side.numpy() for side in layer] for layer in self.caches]
        self._kind = self._arrays[0][0].dtype

    def save(self, engine_ids: Sequence[int], into: Bytes, position: int = 0) -> None:
        """See `Pages.save`."""
        if self.code is not None:
            raw = np.empty(self.nbytes, np.uint8)
            self._copy_out(engine_ids, raw)
            self.code.encode(raw, position, into)
        else:
            self._copy_out(engine_ids, into)

    def read(self, engine_ids: Sequence[int], into: torch.Tensor) -> None:
        """See `Pages.read`."""
        self._copy_out(engine_ids, into.view(torch.uint8).flatten().numpy())

    def _copy_out(self, engine_ids: Sequence[int], into: Bytes) -> None:
        layers, sides, _, *page = self.shape
        stored = into.view(self._kind).reshape(layers, sides, -1, *page)
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


def consecutive(ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of ids that follow one another: (place of the first, first id, length)."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield start, ids[start], place - start
            start = place
