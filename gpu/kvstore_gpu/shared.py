"""GPU memory that processes share by CUDA IPC: the daemon takes it and fills it, engines open it.

The daemon needs CuPy for this, and no torch. What has been taken is never freed (see `kvstore.gpu_memory`). An engine
keeps a slab open as long as anybody holds a tensor of it.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import DeviceUnavailable
from kvstore.units import format_size

if TYPE_CHECKING:
    import torch

    from kvstore.gpu_memory import Taken

log = logging.getLogger("kvstore.gpu")


def _runtime() -> Any:
    """The CUDA runtime; raises `DeviceUnavailable` where there is none."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise DeviceUnavailable(f"CuPy is not installed here ({error}).", "pip install cupy-cuda13x") from None
    return runtime


def _uuid(device: int) -> bytes:
    """UUID of a device, 16 bytes, from the driver: the runtime's properties, as CuPy gives them, end at a zero byte."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    codes = driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(handle), device), driver.cuDeviceGetUuid_v2(uuid, handle)
    if any(codes):
        raise DeviceUnavailable(f"device {device} tells no UUID (CUDA errors {codes}).")
    return uuid.raw


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """Errors of the runtime as ours."""
    try:
        yield
    except DeviceUnavailable:
        raise
    except Exception as error:  # CUDARuntimeError, and what CuPy raises where a library is missing
        raise DeviceUnavailable(f"{what}: {error}.") from None


class CudaMemory:
    """Memory of one device, for the daemon (`kvstore.gpu_memory.DeviceMemory`).

    Parameters
    ----------
    device : int
        Its number in this process.

    Raises
    ------
    DeviceUnavailable
        If there is no such device, or nothing that drives it.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._cuda = _runtime()
        with _typed("no CUDA device can be used"):
            count = self._cuda.getDeviceCount()
            if device >= count:
                raise DeviceUnavailable(f"there is no CUDA device {device}: {count} can be seen.")
            self._cuda.setDevice(device)
            self.name: str = self._cuda.getDeviceProperties(device)["name"].decode()
            self.gpu = _uuid(device)
            self._stream = self._cuda.streamCreateWithFlags(self._cuda.streamNonBlocking)

    def take(self, count: int, nbytes: int) -> list[Taken]:
        """See `DeviceMemory.take`."""
        from kvstore.gpu_memory import Taken  # which an engine has no use for

        taken: list[int] = []
        with _typed(f"{format_size(count * nbytes)} of GPU memory cannot be had"):
            self._cuda.setDevice(self._device)
            free, _ = self._cuda.memGetInfo()
            if free < count * nbytes:
                raise DeviceUnavailable(
                    f"{format_size(count * nbytes)} of GPU memory were asked for, {format_size(free)} are free.",
                    "Lower gpu.bytes, or start the daemon before the engines.",
                )
            try:
                for _ in range(count):
                    taken.append(self._cuda.malloc(nbytes))
                    self._cuda.memset(taken[-1], 0, nbytes)  # whatever was there is nobody's to read
                self._cuda.deviceSynchronize()
                return [Taken(address, bytes(self._cuda.ipcGetMemHandle(address))) for address in taken]
            except Exception:
                for address in taken:  # nobody was told of them yet
                    self._cuda.free(address)
                raise

    def copy(self, parts: Sequence[memoryview], address: int) -> None:
        """See `DeviceMemory.copy`. From pageable memory: slower than pinned, and nothing has to be kept pinned."""
        with _typed("copying to the GPU failed"):
            self._cuda.setDevice(self._device)
            sources = [np.frombuffer(part, np.uint8) for part in parts]
            for source in sources:
                kind = self._cuda.memcpyHostToDevice
                self._cuda.memcpyAsync(address, source.ctypes.data, source.nbytes, kind, self._stream)
                address += source.nbytes
            self._cuda.streamSynchronize(self._stream)


class Imports:
    """How an engine opens the daemon's GPU memory (`kvstore.client.device.Importer`).

    Parameters
    ----------
    device : torch.device
        The engine's.

    Raises
    ------
    DeviceUnavailable
        Where CuPy is missing, or the device.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._cuda = _runtime()
        with _typed("the device cannot be named"):
            self.gpu = _uuid(self._device.index)

    def open(self, handle: bytes, nbytes: int) -> torch.Tensor:
        """The memory behind a handle, uint8 ``[nbytes]`` on the device; closed when the last tensor of it goes.

        Raises
        ------
        DeviceUnavailable
            If CUDA does not open it: its owner is gone, or there is no memory to map it.
        """
        import torch

        with torch.cuda.device(self._device), _typed("GPU memory of the daemon cannot be opened"):
            address = self._cuda.ipcOpenMemHandle(handle)
            mapping = _Mapping(self._cuda, self._device.index, address, nbytes)
            return torch.as_tensor(mapping, device=self._device)


class _Mapping:
    """Memory of another process as an array of bytes; torch keeps this object as long as a tensor of it."""

    def __init__(self, cuda: Any, device: int, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
        # At exit the driver closes it; a call into CUDA could come too late there.
        weakref.finalize(self, _close, cuda, device, address).atexit = False


def _close(cuda: Any, device: int, address: int) -> None:
    before = cuda.getDevice()
    try:
        cuda.setDevice(device)
        cuda.ipcCloseMemHandle(address)
        cuda.setDevice(before)
    except Exception:  # the device has failed, and with it the mapping
        return


def importer(device: torch.device) -> Imports | None:
    """How to open GPU memory of the daemon on a device; None, and a word in the log, where that cannot be."""
    if device.type != "cuda":
        return None
    try:
        return Imports(device)
    except DeviceUnavailable as error:
        log.warning("blocks are read from host memory, none in GPU memory: %s", error)
        return None
