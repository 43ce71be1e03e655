"""Blocks between vLLM's paged cache and kvstore's memory: the only place that copies KV.

A stored block is ``[layer][side][page][...]``: with the canonical layout the sides are K and V and a page is
``[token][kv_head][dim]``, so pages of a side lie one after the other as ``[token]``. Where whole pages are kept there
is one side. Engine blocks are named by their ids; one block of kvstore covers several of them, in order.

Two implementations do the same: `HostPages` copies between the cache and shared memory at once; `DevicePages` lets the
copy engine move whole blocks between shared memory and a few slots on the device, and kernels sort them into pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import CannotEncode, ConfigError
from kvstore_connectors.vllm.layout import PageViews, same_layout
from kvstore_gpu import host, paged
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.frames import Frames, has_kernels
from kvstore_gpu.jobs import HostPart, Part
from kvstore_gpu.staging import Staging, Work

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

    def _copy_out(self, engine_ids: Sequence[int], into: Bytes) -> None:
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


class Taken(NamedTuple):
    """Blocks on their way from a device.

    Attributes
    ----------
    taken, arrived : Event
        When their pages may be used again; when their bytes are in shared memory.
    bad : list of Tensor
        Flags of encoded blocks, in pinned memory, once they have arrived.
    blocks : int
        How many.
    """

    taken: torch.cuda.Event
    arrived: torch.cuda.Event
    bad: list[torch.Tensor]
    blocks: int

    def wait(self) -> list[bool]:
        """Wait until the bytes are there; of each block, whether it may be kept."""
        self.arrived.synchronize()
        flags = [not flag for some in self.bad for flag in some.tolist()]
        return flags if self.bad else [True] * self.blocks


SLOT_NBYTES = 64 << 20
"""A slot of staging memory holds at least a block; this much lets several small ones share a kernel."""

SLOTS = 4
"""Slots for each direction."""


class DevicePages(Pages):
    """The cache lies on a CUDA device.

    Nothing here waits for the engine's stream on the host. Loading waits for ``after`` on a stream of its own, since
    kernels that were given to the device earlier may still read the pages' old content. Saving is split: `take` queues
    the gathering, behind the kernels that write; until its first event is over the pages must not be used again.

    Raises
    ------
    DeviceUnavailable
        If kernels can not be made here.
    """

    def __init__(self, layers: list[PageViews], block_tokens: int, engine_block: int, page_tokens: int) -> None:
        super().__init__(layers, block_tokens, engine_block, page_tokens)
        self._cache = PagedCache.of(self.caches)
        self._frames: dict[BlockCode, Frames] = {}
        self._block_pages = self.shape[2]
        free, _ = torch.cuda.mem_get_info(self.device)
        slot = max(self.nbytes, min(SLOT_NBYTES, free // (8 * SLOTS)))
        staging = 2 * SLOTS * slot
        if staging > free:
            raise ConfigError(
                f"vllm: {staging} bytes of staging memory do not fit the {free} bytes that are free on the device.",
                "Lower gpu_memory_utilization a little, or `block_tokens` in kv_connector_extra_config.",
            )
        self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._loads, self._saves = Staging(self.device, slot, SLOTS), Staging(self.device, slot, SLOTS)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile the kernels now, not under the first request; page 0 is copied onto itself."""
        block = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        paged.gather(self._cache, [Part(block, [0])], self._block_pages)
        paged.scatter(self._cache, [Part(block, [0])], self._block_pages)
        torch.cuda.current_stream(self.device).synchronize()

    def use(self, codes: Codes) -> None:
        """See `Pages.use`. Raises `ConfigError` if there are no kernels for its chain."""
        super().use(codes)
        if codes.own is not None:
            self._frames_of(codes.own)

    def _frames_of(self, code: BlockCode) -> Frames:
        if code not in self._frames:
            views = [[side.view(self.dtype) for side in layer] for layer in self.caches]
            self._frames[code] = Frames(PagedCache.of(views), code.chain, self.block_tokens, code.context)
        return self._frames[code]

    def start(self, pieces: Sequence[Piece], after: Any = None) -> Callable[[], None]:
        """See `Pages.start`."""
        if after is not None:
            self._in.wait_event(after)
        try:
            for code, some in groupby(pieces, lambda piece: piece.code):
                if code is None:
                    self._land(list(some), self._scatter)
                elif has_kernels(code.chain):
                    self._land(list(some), self._frames_of(code).unpack)
                else:
                    self._loads.load([self._decoded(piece, code) for piece in some], self._scatter, self._in)
        except BaseException:
            self._in.synchronize()  # before the daemon's memory may be let go
            raise
        landed = torch.cuda.Event()
        landed.record(self._in)
        return landed.synchronize

    def _land(self, pieces: Sequence[Piece], land: Work) -> None:
        """Sort blocks into pages: straight from this device's memory, or brought here first."""
        near = [piece for piece in pieces if piece.device is not None]
        if near:
            ids = [self.page_ids(piece.engine_ids) for piece in near]
            first = [piece.first * self._split for piece in near]
            land([Part(p.device, i, f, p.position) for p, i, f in zip(near, ids, first, strict=True)], self._in)
        self._loads.load([self.reach(piece) for piece in pieces if piece.device is None], land, self._in)

    def _decoded(self, piece: Piece, code: BlockCode) -> HostPart:
        """A block of a chain that has no kernels, decoded on the CPU."""
        whole = piece.parts[0] if len(piece.parts) == 1 else np.concatenate(piece.parts)
        raw = torch.from_numpy(code.decode(whole, piece.position)).pin_memory()
        return HostPart([raw], self.page_ids(piece.engine_ids), piece.first * self._split)

    def load(self, payload: Bytes, first: int, engine_ids: Sequence[int], after: Any = None) -> None:
        """See `Pages.load`."""
        self.start([Piece([payload], first, engine_ids)], after)()

    def take(self, parts: Sequence[HostPart], after: Any = None) -> Taken:
        """Queue the copying of whole blocks, made ready by `reach`, out of the cache; they are encoded on the way."""
        if after is not None:
            self._out.wait_event(after)
        bad: list[torch.Tensor] = []
        frames = None if self.code is None else self._frames_of(self.code)

        def pack(some: Sequence[Part], stream: torch.cuda.Stream) -> None:
            if frames is not None:
                flags = frames.pack(some, stream)
                with torch.cuda.stream(stream):
                    bad.append(flags.to("cpu", non_blocking=True))

        taken, arrived = self._saves.store(parts, self._gather if frames is None else pack, self._out)
        return Taken(taken, arrived, bad, len(parts))

    def seal(self, room: Sequence[Bytes], position: int) -> None:
        """Finish a block that has arrived: an encoded one gets its header."""
        if self.code is not None:
            whole = room[0] if len(room) == 1 else np.concatenate(room)
            self._frames_of(self.code).seal(whole, position)
            if len(room) > 1:
                at = 0
                for part in room:
                    part[:] = whole[at : at + part.nbytes]
                    at += part.nbytes

    def save(self, engine_ids: Sequence[int], into: Bytes, position: int = 0) -> None:
        """See `Pages.save`."""
        taken = self.take([self.reach(Piece([into], 0, engine_ids, position))], self.mark())
        if not all(taken.wait()):
            raise CannotEncode("a block has values that its code cannot say.")
        self.seal([into], position)

    def reach(self, piece: Piece) -> HostPart:
        """Make a block's memory known to the device; the first time it is met that takes some milliseconds."""
        pieces = [torch.from_numpy(run) for part in piece.parts for run in host.reach(part)]
        return HostPart(pieces, self.page_ids(piece.engine_ids), piece.first * self._split, piece.position)

    def _scatter(self, parts: Sequence[Part], stream: torch.cuda.Stream) -> None:
        paged.scatter(self._cache, parts, self._block_pages, stream=stream)

    def _gather(self, parts: Sequence[Part], stream: torch.cuda.Stream) -> None:
        paged.gather(self._cache, parts, self._block_pages, stream=stream)

    def mark(self) -> Any:
        """See `Pages.mark`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the engine's next kernels wait for an event, on the device."""
        torch.cuda.current_stream(self.device).wait_event(event)


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
