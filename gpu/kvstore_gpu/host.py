"""Host memory that kernels and the copy engine can reach: slabs of the daemon, registered with CUDA as they are met.

A slab is mapped once by the process and stays mapped while anybody holds a view of it. Registering pins memory and
gives it an address on the device. Meanwhile the driver lets nobody else in, the engine's launches included, and memory
that was never touched is touched under that lock: half a gigabyte held an engine up for a quarter of a second. So
memory is touched first, and registered in windows; the engine gets in between. No copy may span two windows (`reach`).
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import PAGESIZE
from typing import Any

import numpy as np
import torch

from kvstore.errors import DeviceUnavailable
from kvstore.memory import populate_at
from kvstore_gpu import checks
from kvstore_gpu.compile import cupy

WINDOW = 32 << 20
"""Bytes registered at a time, counted from the first page of the mapping."""

_MAPPED = 2
"""cudaHostRegisterMapped"""

_ALREADY = 712
"""cudaErrorHostMemoryAlreadyRegistered"""

Run = tuple[int, int]
"""Memory that one copy may span: its address and length."""

_lock = threading.RLock()
"""Entered again where a garbage collection under it lets a mapping go."""

_known: dict[int, dict[int, int]] = {}
"""Of each mapping, by the address of its first page: the windows that are registered, by number, and where they end."""

_bases: list[int] = []
"""These addresses, in order: there may be hundreds, and every block that is loaded or stored is looked up."""


def root(view: np.ndarray) -> np.ndarray:
    """The array of the whole mapping that an array is a view of."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def reach(view: np.ndarray, device: torch.device) -> list[np.ndarray]:
    """Make memory known to CUDA, at once if it is already: the view in pieces that one copy may span each.

    The device is the one that this process works on: threads begin on the first one, and would leave a context there.

    Raises
    ------
    DeviceUnavailable
        If the driver refuses: no more memory can be pinned.
    """
    begin = view.__array_interface__["data"][0]
    base, windows = _windows(begin, view.nbytes)
    if not windows:
        whole = root(view)
        base = _base(whole)
        windows = range((begin - base) // WINDOW, -(-(begin - base + view.nbytes) // WINDOW))
        for window in windows:
            if window not in _known.get(base, ()):
                _register(whole, window, device)
    at = begin - base
    return [view[max(window * WINDOW - at, 0) : (window + 1) * WINDOW - at] for window in windows]


def ahead(whole: np.ndarray, device: torch.device) -> Iterator[None]:
    """Register a mapping window by window; the caller says when by asking for the next.

    Raises
    ------
    DeviceUnavailable
        As `reach`.
    """
    base = _base(whole)
    for window in range(-(-(whole.ctypes.data + whole.nbytes - base) // WINDOW)):
        if window not in _known.get(base, ()):
            _register(whole, window, device)
            yield


def _base(whole: np.ndarray) -> int:
    return whole.ctypes.data // PAGESIZE * PAGESIZE


def _register(whole: np.ndarray, window: int, device: torch.device) -> None:
    base = _base(whole)
    begin = max(base + window * WINDOW, whole.ctypes.data)
    end = min(base + (window + 1) * WINDOW, whole.ctypes.data + whole.nbytes)
    populate_at(base + window * WINDOW, end - base - window * WINDOW)  # a hint: else the driver touches
    with _lock, _driver(device) as cuda:
        if base not in _known:
            _known[base] = {}
            insort(_bases, base)
            weakref.finalize(whole, _forget, base, whole.ctypes.data, device)
        if window in _known[base]:
            return
        code = int(cuda.cudaHostRegister(begin, end - begin, _MAPPED))
        if code not in (0, _ALREADY):
            raise DeviceUnavailable(
                f"{end - begin} bytes of shared memory cannot be pinned (CUDA error {code}).",
                "`kvstore doctor` shows the limits of pinned memory.",
            )
        _known[base][window] = end


@contextmanager
def _driver(device: torch.device) -> Iterator[Any]:
    """CUDA's runtime, with a device as the thread's own."""
    with torch.cuda.device(device):
        yield torch.cuda.cudart()


def _forget(base: int, start: int, device: torch.device) -> None:
    # Before the mapping goes, since the array holds it until its own end.
    with _lock:
        windows = _known.pop(base, {})
        if base in _bases:
            _bases.remove(base)
        if windows:
            with _driver(device) as cuda:
                for window in windows:
                    cuda.cudaHostUnregister(max(base + window * WINDOW, start))


def copy(to: int, at: int, nbytes: int, stream: torch.cuda.Stream) -> None:
    """Copy between addresses, either way; nothing waits for it. One of torch's takes five times as long to ask for.

    Who asks keeps the memory until it is over.
    """
    copy_all([to], [at], [nbytes], stream)


def copy_all(to: Sequence[int], at: Sequence[int], nbytes: Sequence[int], stream: torch.cuda.Stream) -> None:
    """As `copy`, several."""
    runtime, queue = cupy().cuda.runtime, stream.cuda_stream
    ask, kind = runtime.memcpyAsync, runtime.memcpyDefault
    for one in zip(to, at, nbytes, strict=True):
        ask(*one, kind, queue)


class Held:
    """Blocks in memory that copies can reach, each in runs; a part of all of them is brought in one go.

    Parameters
    ----------
    blocks : sequence of sequence of Run
    """

    def __init__(self, blocks: Sequence[Sequence[Run]]) -> None:
        runs = np.array([run for block in blocks for run in block], np.int64).reshape(-1, 2)
        counts = np.array([len(block) for block in blocks], np.int64)
        self._address, self._nbytes = runs.T
        self._block = np.repeat(np.arange(len(blocks)), counts)
        total = np.append(0, np.cumsum(self._nbytes))
        ends = np.cumsum(counts)
        begins = total[ends - counts]
        self._sizes = total[ends] - begins
        self._start = total[:-1] - begins[self._block]  # of each run, in its block

    def bring(self, begin: np.ndarray, end: np.ndarray, to: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy bytes `begin` to `end` of each block, one after the other, to memory of a device; nothing waits for it.

        Raises
        ------
        InvalidParams
            If a block has less, or this is not their room.
        """
        sizes = end - begin
        if ((begin < 0) | (sizes < 0) | (end > self._sizes)).any():
            raise checks.refuse("end", "a part leaves its block")
        if to.numel() != sizes.sum() or not to.is_contiguous() or to.dtype != torch.uint8:
            raise checks.refuse("to", f"{tuple(to.shape)} of {to.dtype} for {sizes.sum()} bytes")
        begins = begin[self._block]
        first = np.maximum(begins, self._start)
        last = np.minimum(end[self._block], self._start + self._nbytes)
        places = to.data_ptr() + (np.cumsum(sizes) - sizes)[self._block] + first - begins
        some = first < last
        at, nbytes = self._address + first - self._start, last - first
        copy_all(places[some].tolist(), at[some].tolist(), nbytes[some].tolist(), stream)


def registered() -> tuple[int, int]:
    """Mappings of which something is pinned, and the windows that are."""
    with _lock:
        return len(_known), sum(map(len, _known.values()))


def addresses(blocks: Sequence[torch.Tensor], device: torch.device) -> list[int]:
    """Where a device finds blocks: its own memory, or host memory that is registered or pinned.

    With unified addressing registered memory has the same address on both sides.
    """
    out = []
    for block in blocks:
        if block.device != device and not (block.device.type == "cpu" and _reachable(block)):
            raise checks.refuse("block", f"memory on {block.device} that {device} cannot reach; register it first")
        out.append(block.data_ptr())
    return out


def window(block: torch.Tensor, device: torch.device) -> tuple[int, int] | None:
    """The registered window that host memory lies in, by its mapping and number; None if it is pinned in another way.

    Raises
    ------
    InvalidParams
        If the device cannot reach it.
    """
    base, needed = _windows(block.data_ptr(), block.nbytes)
    if len(needed) == 1:
        return base, needed[0]
    addresses([block], device)
    return None


def _windows(begin: int, nbytes: int) -> tuple[int, range]:
    """The only mapping that memory can lie in, and the windows that hold it; none unless all of them are registered."""
    end = begin + nbytes
    with _lock:
        at = bisect_right(_bases, begin)
        base = _bases[at - 1] if at else begin
        windows = _known.get(base, {})
        needed = range((begin - base) // WINDOW, -(-(end - base) // WINDOW))
        for number in needed:
            if number not in windows:
                return base, range(0)
        return base, needed if needed and end <= windows[needed[-1]] else range(0)


def _reachable(block: torch.Tensor) -> bool:
    return bool(_windows(block.data_ptr(), block.nbytes)[1]) or block.is_pinned()
