"""Blocks between vLLM's paged cache on a CUDA device and kvstore's memory.

The copy engine moves whole blocks between shared memory and a few slots on the device; kernels sort them into pages,
and encode and decode them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvstore.errors import CannotEncode, ConfigError
from kvstore_connectors.vllm.layout import PageViews
from kvstore_connectors.vllm.pages import Bytes, Pages, Piece
from kvstore_gpu import host, paged
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.frames import Frames, has_kernels
from kvstore_gpu.jobs import HostPart, Launch, Part
from kvstore_gpu.staging import Staging, Work

if TYPE_CHECKING:
    from kvstore_connectors.vllm.code import BlockCode, Codes


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

    def _warm_up(self, frames: Frames | None = None) -> None:
        """Compile the kernels now, not under the first request that stores or loads; page 0 is as it was afterwards."""
        block = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        paged.gather(self._cache, [Part(block, [0])], self._block_pages)
        if frames is not None:
            for position in (0, self.block_tokens):
                encoded = torch.empty(frames.nbytes(position), dtype=torch.uint8, device=self.device)
                part = Part(encoded, [0] * self._block_pages, position=position)
                frames.pack([part], None)
                frames.unpack([part], None)
        paged.scatter(self._cache, [Part(block, [0])], self._block_pages)
        torch.cuda.current_stream(self.device).synchronize()

    def use(self, codes: Codes) -> None:
        """See `Pages.use`. Raises `ConfigError` if there are no kernels for its chain."""
        super().use(codes)
        if codes.own is not None:
            self._warm_up(self._frames_of(codes.own))

    def _frames_of(self, code: BlockCode) -> Frames:
        if code not in self._frames:
            views = [[side.view(self.dtype) for side in layer] for layer in self.caches]
            self._frames[code] = Frames(PagedCache.of(views), code.chain, self.block_tokens, code.context)
        return self._frames[code]

    def read(self, engine_ids: Sequence[int], into: torch.Tensor) -> None:
        """See `Pages.read`."""
        part = Part(into.view(torch.uint8).flatten(), self.page_ids(engine_ids))
        paged.gather(self._cache, [part], into.shape[2] // self._cache.page_tokens)

    def start(self, pieces: Sequence[Piece], after: Any = None) -> Callable[[], None]:
        """See `Pages.start`."""
        if after is not None:
            self._in.wait_event(after)
        held: list[HostPart] = []  # until all has been copied
        try:
            for code, some in groupby(pieces, lambda piece: piece.code):
                if code is None or has_kernels(code.chain):
                    land = self._scattering if code is None else self._frames_of(code).unpacking
                    far = self._land_near(list(some), land)
                else:
                    land, far = self._scattering, [self._decoded(piece, code) for piece in some]
                held += far
                self._loads.load(far, land, self._in)
        except BaseException:
            self._in.synchronize()  # before the daemon's memory may be let go
            raise
        landed = torch.cuda.Event()
        landed.record(self._in)

        def wait() -> None:
            landed.synchronize()
            held.clear()

        return wait

    def _land_near(self, pieces: Sequence[Piece], land: Work) -> list[HostPart]:
        """Sort blocks that lie in this device's memory into pages; the others, which have to be brought here first."""
        near = [
            Part(piece.device, self.page_ids(piece.engine_ids), piece.first * self._split, piece.position)
            for piece in pieces
            if piece.device is not None
        ]
        if near:
            land(near, self._in)(0, len(near))
        return [self.reach(piece) for piece in pieces if piece.device is None]

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
        if self.code is None:
            return Taken(*self._saves.store(parts, self._gathering, self._out), bad, len(parts))
        frames = self._frames_of(self.code)

        def packing(some: Sequence[Part], stream: torch.cuda.Stream) -> Launch:
            with torch.cuda.stream(stream):
                flags = torch.zeros(len(some), dtype=torch.int32, device=self.device)
            pack = frames.packing(some, flags, stream)

            def launch(first: int, last: int) -> None:
                pack(first, last)
                with torch.cuda.stream(stream):
                    bad.append(flags[first:last].to("cpu", non_blocking=True))

            return launch

        return Taken(*self._saves.store(parts, packing, self._out), bad, len(parts))

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
        pieces = [torch.from_numpy(run) for part in piece.parts for run in host.reach(part, self.device)]
        return HostPart(pieces, self.page_ids(piece.engine_ids), piece.first * self._split, piece.position)

    def _scattering(self, parts: Sequence[Part], stream: torch.cuda.Stream) -> Launch:
        return paged.scattering(self._cache, parts, self._block_pages, stream=stream)

    def _gathering(self, parts: Sequence[Part], stream: torch.cuda.Stream) -> Launch:
        return paged.gathering(self._cache, parts, self._block_pages, stream=stream)

    def mark(self) -> Any:
        """See `Pages.mark`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the engine's next kernels wait for an event, on the device."""
        torch.cuda.current_stream(self.device).wait_event(event)
