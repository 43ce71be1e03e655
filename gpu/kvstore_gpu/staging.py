"""Blocks through the copy engine: a ring of slots on the device between host memory and the kernels.

The copy engine reaches all of PCIe where blocks are large, which kernels that reach across PCIe do not, and it needs no
multiprocessor; and a kernel that decodes reads its bytes where that is cheap. While a kernel works on one slot the next
one is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from kvstore_gpu import checks, host
from kvstore_gpu.jobs import HostPart, Part

Work = Callable[[Sequence[Part], torch.cuda.Stream], None]
"""Work on parts whose blocks lie on the device, on a stream: ``scatter``, ``unpack``, ``gather``, ``pack``."""

_ALIGN = 256


class Staging:
    """A ring of slots, each for one block or several.

    Parameters
    ----------
    device : torch.device
    slot_nbytes : int
        At least the largest block.
    slots : int
        Two let copies and kernels overlap; with more, a late kernel does not hold up the copies.
    """

    def __init__(self, device: torch.device, slot_nbytes: int, slots: int = 4) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._slots = [torch.empty(slot_nbytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]
        self._next = 0
        self._lock = threading.Lock()
        torch.cuda.current_stream(device).synchronize()  # the memory may have had another use on this stream

    def load(self, parts: Sequence[HostPart], land: Work, stream: torch.cuda.Stream) -> None:
        """Bring blocks over and hand them to ``land``, in order; when this returns nothing may have run yet.

        What is on ``stream`` already comes before ``land``.

        Raises
        ------
        InvalidParams
            If a block is larger than a slot, or lies in memory that is not registered.
        """
        with self._lock:
            for group in self._groups(parts):
                index, staged = self._place(group)
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(self._free[index])
                    for piece, here in _pieces(group, staged):
                        here.copy_(piece, non_blocking=True)
                    stream.wait_event(_record())
                land(staged, stream)
                self._free[index].record(stream)

    def store(
        self, parts: Sequence[HostPart], take: Work, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Let ``take`` fill slots, and bring them to the blocks.

        Returns
        -------
        (taken, arrived)
            When the cache's pages are no longer needed; when the bytes are in host memory.
        """
        with self._lock:
            with torch.cuda.stream(stream):
                taken = arrived = _record()
            for group in self._groups(parts):
                index, staged = self._place(group)
                stream.wait_event(self._free[index])
                take(staged, stream)
                with torch.cuda.stream(stream):
                    taken = _record()
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(taken)
                    for piece, here in _pieces(group, staged):
                        piece.copy_(here, non_blocking=True)
                    arrived = _record()
                    self._free[index].record()
        return taken, arrived

    def _groups(self, parts: Sequence[HostPart]) -> Iterator[list[HostPart]]:
        """Parts as they fit into slots."""
        limit = len(self._slots[0])
        group: list[HostPart] = []
        used = 0
        for part in parts:
            size = _room(part)
            if size > limit:
                raise checks.refuse("block", f"{part.nbytes} bytes for a slot of {limit}")
            host.addresses(part.pieces, self._device)
            if used + size > limit:
                yield group
                group, used = [], 0
            group.append(part)
            used += size
        if group:
            yield group

    def _place(self, group: Sequence[HostPart]) -> tuple[int, list[Part]]:
        """The next slot, and where in it each part goes."""
        index, self._next = self._next, (self._next + 1) % len(self._slots)
        out, at = [], 0
        for part in group:
            out.append(Part(self._slots[index][at : at + part.nbytes], part.pages, part.first, part.position))
            at += _room(part)
        return index, out


def _pieces(group: Sequence[HostPart], staged: Sequence[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each piece in host memory, and its bytes in the slot."""
    for part, here in zip(group, staged, strict=True):
        at = 0
        for piece in part.pieces:
            yield piece, here.block[at : at + piece.numel()]
            at += piece.numel()


def _room(part: HostPart) -> int:
    return -(-part.nbytes // _ALIGN) * _ALIGN


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
