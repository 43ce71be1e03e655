"""Blocks through the copy engine: a ring of slots on the device between host memory and the kernels.

The copy engine reaches all of PCIe where blocks are large, which kernels that reach across PCIe do not, and it needs no
multiprocessor; and a kernel that decodes reads its bytes where that is cheap. While a kernel works on one slot the next
one is copied. What the kernels need is made ready once for all blocks, while the first ones are copied. Each call of
the driver takes microseconds of the host, so neighbours in memory are one copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from kvstore_gpu import checks, host
from kvstore_gpu.jobs import HostPart, Launch, Part

Work = Callable[[Sequence[Part], torch.cuda.Stream], Launch]
"""Makes work ready for parts whose blocks lie on the device, on a stream: ``scattering``, ``unpacking``, …"""

_ALIGN = 256

GAP = 16 << 10
"""Most bytes between blocks that one copy brings over together, and no more than a sixteenth of the block before: what
the last page of a block in shared memory, as the daemon cuts it, may leave empty. The other way nothing is written
between blocks."""


class _Group(NamedTuple):
    """Parts, from `first` on up to `last`, that share a slot for a while."""

    slot: int
    first: int
    last: int


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
        self._here = [torch.cuda.Event() for _ in range(slots)]
        self._free = [torch.cuda.Event() for _ in range(slots)]
        self._next = 0
        self._lock = threading.Lock()
        torch.cuda.current_stream(device).synchronize()  # the memory may have had another use on this stream

    def load(self, parts: Sequence[HostPart], land: Work, stream: torch.cuda.Stream) -> None:
        """Bring blocks over and hand them to ``land``, in order; when this returns nothing may have run yet.

        What is on ``stream`` already comes before ``land``. After an error ``stream`` waits for what was begun.

        Raises
        ------
        InvalidParams
            If a block is larger than a slot, or lies in memory that is not registered.
        """
        with self._lock, torch.cuda.device(self._device):
            staged, groups = self._place(parts, GAP)
            try:
                ahead = len(self._slots)
                for group in groups[:1]:
                    self._bring(group, parts, staged)
                launch = land(staged, stream)  # what it uploads comes right behind the first blocks, not behind more
                for group in groups[1:ahead]:
                    self._bring(group, parts, staged)
                for group, later in zip_longest(groups, groups[ahead:]):
                    stream.wait_event(self._here[group.slot])
                    launch(group.first, group.last)
                    self._free[group.slot].record(stream)
                    if later is not None:
                        self._bring(later, parts, staged)
            except BaseException:
                stream.wait_stream(self._copies)
                raise

    def _bring(self, group: _Group, parts: Sequence[HostPart], staged: Sequence[Part]) -> None:
        self._copies.wait_event(self._free[group.slot])
        for there, here, nbytes in self._copied(group, parts, staged, GAP):
            host.copy(here, there, nbytes, self._copies)
        self._here[group.slot].record(self._copies)

    def store(
        self, parts: Sequence[HostPart], take: Work, stream: torch.cuda.Stream
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Let ``take`` fill slots, and bring them to the blocks.

        Returns
        -------
        (taken, arrived)
            When the cache's pages are no longer needed; when the bytes are in host memory.
        """
        taken, arrived = torch.cuda.Event(), torch.cuda.Event()
        with self._lock, torch.cuda.device(self._device):
            staged, groups = self._place(parts, 0)
            launch = take(staged, stream)
            for group in groups:
                stream.wait_event(self._free[group.slot])
                launch(group.first, group.last)
                self._here[group.slot].record(stream)
                self._copies.wait_event(self._here[group.slot])
                for there, here, nbytes in self._copied(group, parts, staged, 0):
                    host.copy(there, here, nbytes, self._copies)
                self._free[group.slot].record(self._copies)
            taken.record(stream)
            arrived.record(self._copies if groups else stream)
        return taken, arrived

    def _place(self, parts: Sequence[HostPart], gap: int) -> tuple[list[Part], list[_Group]]:
        """Where each part goes, and which go there together: as many as fit into a slot.

        Neighbours on the host, with at most such a gap between them, are as far apart in a slot.
        """
        limit = len(self._slots[0])
        staged: list[Part] = []
        groups: list[_Group] = []
        first = used = end = 0
        for number, part in enumerate(parts):
            nbytes = part.nbytes
            if nbytes > limit:
                raise checks.refuse("block", f"{nbytes} bytes for a slot of {limit}")
            start = used + part.pieces[0].data_ptr() - end if part.pieces else used
            near = min(gap, staged[-1].block.numel() // 16) if staged else 0
            if not 0 <= start - used <= near or start % _ALIGN:
                start = -(-used // _ALIGN) * _ALIGN
            if start + nbytes > limit:
                groups.append(_Group(self._turn(), first, number))
                first, start = number, 0
            block = self._slots[self._next][start : start + nbytes]
            staged.append(Part(block, part.pages, part.first, part.position))
            used = start + nbytes
            end = part.pieces[-1].data_ptr() + part.pieces[-1].numel() if part.pieces else 0
        if parts:
            groups.append(_Group(self._turn(), first, len(parts)))
        return staged, groups

    def _turn(self) -> int:
        """The slot whose turn it is."""
        slot, self._next = self._next, (self._next + 1) % len(self._slots)
        return slot

    def _copied(
        self, group: _Group, parts: Sequence[HostPart], staged: Sequence[Part], gap: int
    ) -> Iterator[tuple[int, int, int]]:
        """What to copy of a group: address on the host, in the slot, and bytes; what is near in both is one."""
        there = here = nbytes = 0
        window = None
        for part, block in zip(parts[group.first : group.last], staged[group.first : group.last], strict=True):
            at = block.block.data_ptr()
            for piece in part.pieces:
                begin, size, its = piece.data_ptr(), piece.numel(), host.window(piece, self._device)
                near = begin - there == at - here and 0 <= begin - there - nbytes <= gap
                if window is not None and its == window and near:
                    nbytes = begin + size - there
                else:
                    if nbytes:
                        yield there, here, nbytes
                    there, here, nbytes, window = begin, at, size, its
                at += size
        if nbytes:
            yield there, here, nbytes
