"""Host memory that kernels can reach: slabs of the daemon, registered with CUDA when first met.

A slab is mapped once by the client and stays mapped while anybody holds a view of it. Registering pins it (2 GiB in
0.08 s on an H200) and gives it an address on the device; it ends when the mapping does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvstore.errors import DeviceUnavailable
from kvstore_gpu import checks

_MAPPED = 2
"""cudaHostRegisterMapped"""

_ALREADY = 712
"""cudaErrorHostMemoryAlreadyRegistered"""

_lock = threading.Lock()
_known: dict[int, int] = {}
"""Bytes of each registered mapping, by its address."""


def root(view: np.ndarray) -> np.ndarray:
    """The array of the whole mapping that an array is a view of."""
    while isinstance(view.base, np.ndarray):
        view = view.base
    return view


def register(view: np.ndarray) -> None:
    """Make the mapping that an array lies in known to CUDA; at once if it is already.

    Raises
    ------
    DeviceUnavailable
        If the driver refuses: no more memory can be pinned.
    """
    whole = root(view)
    start = whole.ctypes.data
    if _known.get(start, 0) >= whole.nbytes:
        return
    with _lock:
        if _known.get(start, 0) >= whole.nbytes:
            return
        code = int(_runtime().cudaHostRegister(start, whole.nbytes, _MAPPED))
        if code not in (0, _ALREADY):
            raise DeviceUnavailable(
                f"{whole.nbytes} bytes of shared memory cannot be pinned (CUDA error {code}).",
                "`kvstore doctor` shows the limits of pinned memory.",
            )
        _known[start] = whole.nbytes
        weakref.finalize(whole, _forget, start)


def _runtime() -> Any:
    return torch.cuda.cudart()


def _forget(start: int) -> None:
    # Before the mapping goes, since the array holds it until its own end.
    with _lock:
        if _known.pop(start, None) is not None:
            _runtime().cudaHostUnregister(start)


def registered() -> tuple[int, int]:
    """Mappings and bytes that are pinned."""
    with _lock:
        return len(_known), sum(_known.values())


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


def _reachable(block: torch.Tensor) -> bool:
    start, end = block.data_ptr(), block.data_ptr() + block.nbytes
    with _lock:
        if any(base <= start and end <= base + nbytes for base, nbytes in _known.items()):
            return True
    return block.is_pinned()
