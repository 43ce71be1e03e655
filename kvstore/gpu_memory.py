"""Memory of a GPU as the daemon needs it, and slabs of it. CUDA itself is in `kvstore_gpu.shared`; this imports none.

All of the budget is taken at once, before engines look how much is free, and none of it is ever freed: a slab whose
handle was given out may be open in another process, CUDA forbids to free it then, and a lost connection does not prove
that the process is gone. So a slab also stays with the trust domain that needed it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvstore.arena import Pool, Region

_SMALLEST, _LARGEST = 16 << 20, 512 << 20
"""Bytes of a slab. Whole multiples of 2 MiB: CUDA shares memory in such pieces."""


class Taken(NamedTuple):
    """A piece of GPU memory: where it is in this process, and the CUDA IPC handle another process opens it by."""

    address: int
    handle: bytes


class DeviceMemory(Protocol):
    """The memory of one GPU. What it raises is `DeviceUnavailable`.

    Attributes
    ----------
    name : str
        The device, in words.
    gpu : bytes
        Its UUID, 16 bytes, by which it is known whatever its number is in a process.
    """

    name: str
    gpu: bytes

    def take(self, count: int, nbytes: int) -> list[Taken]:
        """So many pieces of so many bytes each, zeroed; all or none."""
        ...

    def copy(self, parts: Sequence[memoryview], address: int) -> None:
        """Copy host memory there, one part after the other. Returns when it is there for every process to read."""
        ...


class DeviceSlab(Region):
    """A piece of GPU memory of one trust domain."""

    def __init__(self, slab_id: int, domain: str, nbytes: int, taken: Taken) -> None:
        super().__init__(slab_id, domain, nbytes)
        self.address = taken.address
        self.handle = taken.handle


class DevicePool(Pool[DeviceSlab]):
    """Slabs of GPU memory, as far as they were taken."""

    def __init__(self, taken: Sequence[Taken], slab_bytes: int) -> None:
        super().__init__(len(taken) * slab_bytes, slab_bytes, 0)
        self._spare = list(taken)

    def _make_slab(self, domain: str) -> DeviceSlab:
        return DeviceSlab(self._new_id(), domain, self.slab_bytes, self._spare.pop())

    def movable(self, domain: str) -> set[int]:
        """None: see above."""
        return set()


def slab_size(budget: int) -> int:
    """Bytes of a slab: an eighth of the budget, within bounds; the largest block that fits."""
    eighth = 1 << max(budget // 8, 1).bit_length() - 1
    return min(max(eighth, _SMALLEST), _LARGEST)


def open_memory(device: int) -> DeviceMemory:
    """The memory of a CUDA device; raises `DeviceUnavailable` where there is none, or nothing that drives it."""
    from kvstore_gpu.shared import CudaMemory  # pyright: ignore[reportMissingImports] - beside this package

    return CudaMemory(device)
