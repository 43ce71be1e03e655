"""Ordinary memory in the place of a GPU's: files that two processes map, behind the same interfaces as CUDA's.

With it everything about the GPU tier but CUDA itself is tested on any machine (`kvstore.gpu_memory.DeviceMemory`,
`kvstore.client.device.Importer`).
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.errors import DeviceUnavailable
from kvstore.gpu_memory import Taken

GPU = b"ordinary memory."
"""The UUID of the device that it stands for."""


class OrdinaryMemory:
    """A device whose memory is files in a folder.

    Parameters
    ----------
    folder : Path, optional
        Where they are made, in a folder of this device's own; short, since a handle has 64 bytes.
    before_copy : callable
        Called in the thread that copies, before each copy: to wait, or to raise `DeviceUnavailable`.
    """

    def __init__(self, folder: Path | None = None, before_copy: Callable[[], object] = lambda: None) -> None:
        self.name = "ordinary memory"
        self.gpu = GPU
        self.before_copy = before_copy
        self._folder = Path(tempfile.mkdtemp(prefix="kvg-", dir=folder))
        self._mappings: dict[int, np.ndarray] = {}

    def take(self, count: int, nbytes: int) -> list[Taken]:
        """See `DeviceMemory.take`; an address is that of the mapping in this process."""
        taken = []
        for number in range(count):
            path = self._folder / f"slab-{len(self._mappings)}-{number}"
            with path.open("wb") as file:
                file.truncate(nbytes)
            mapping = _map(path)
            self._mappings[mapping.ctypes.data] = mapping
            taken.append(Taken(mapping.ctypes.data, str(path).encode().ljust(64, b"\0")))
        return taken

    def copy(self, parts: Sequence[memoryview], address: int) -> None:
        """See `DeviceMemory.copy`."""
        self.before_copy()
        base = max(start for start in self._mappings if start <= address)
        at = address - base
        for part in parts:
            self._mappings[base][at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)


class OrdinaryImports:
    """What opens such memory in another process.

    Parameters
    ----------
    gpu : bytes
        UUID of the device this process has.
    fails : bool
        Whether opening fails, as for want of memory.
    """

    def __init__(self, gpu: bytes = GPU, *, fails: bool = False) -> None:
        self.gpu = gpu
        self.fails = fails
        self.opened = 0

    def open(self, handle: bytes, nbytes: int) -> Any:
        """See `Importer.open`."""
        if self.fails:
            raise DeviceUnavailable("out of memory.", "")
        self.opened += 1
        mapping = _map(Path(handle.rstrip(b"\0").decode()))
        if mapping.nbytes != nbytes:
            raise DeviceUnavailable(f"a handle of {mapping.nbytes} bytes was said to be of {nbytes}.", "")
        return mapping


def _map(path: Path) -> np.ndarray:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)


def open_ordinary(device: int, folder: Path | None = None) -> OrdinaryMemory:
    """In the place of `kvstore.gpu_memory.open_memory`: device 0 is there, others are not."""
    if device:
        raise DeviceUnavailable(f"there is no device {device}.", "")
    return OrdinaryMemory(folder)
