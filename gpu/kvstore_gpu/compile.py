"""From kernel.cu to functions: NVRTC through CuPy, templates instantiated by name, kept on disk by CuPy."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore.errors import DeviceUnavailable, InternalError

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-default-device", "--fmad=true")
ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities that kernels are compiled for in the tests: every instantiation for the first, the oldest."""

THREADS = 256
"""Threads of a block, where a kernel has no reason for another number."""

TENSOR_CORES = ("common.cuh", "mma.cuh")
"""Headers of kernels that multiply matrices."""

TURN = ("common.cuh", "turn.cuh")
"""Headers of kernels that turn keys."""

PLANES = ("common.cuh", "planes.cuh")
"""Headers of kernels that read and write planes of bits."""

_sources: dict[str, Source] = {}

emulator: Any = None
"""Runs kernels on the CPU where there is one (tests): called with source, name, grid, threads, shared, arguments."""


def uses_reference(device: torch.device) -> bool:
    """Whether work on a device is done by the reference."""
    return device.type == "cpu" and emulator is None


class Source:
    """The kernels of one operation.

    Parameters
    ----------
    operation : str
        Name of its folder.
    names : iterable of str
        C++ names of all instantiations, e.g. ``copy_pages<true, 16>``. Others do not exist.
    headers : tuple of str
        What stands before the kernel.
    """

    def __init__(self, operation: str, names: Iterable[str], headers: tuple[str, ...] = ("common.cuh",)) -> None:
        self.operation = operation
        self.names = tuple(names)
        self.headers = headers
        self._kernels: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()
        _sources[operation] = self

    @property
    def text(self) -> str:
        """Source code, with what is common to all kernels before it."""
        before = "\n".join((HERE / name).read_text("utf-8") for name in self.headers)
        kernel = (HERE / self.operation / "kernel.cu").read_text("utf-8")
        return f'{before}\n#line 1 "{self.operation}/kernel.cu"\n{kernel}'

    def launch(
        self,
        name: str,
        grid: int | tuple[int, ...],
        args: Sequence[Any],
        device: torch.device,
        *,
        threads: int = THREADS,
        shared: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Run an instantiation on a stream: the current one of the device unless another is given.

        Tensors among the arguments are passed as addresses, int as int32, float as float32.
        """
        if emulator is not None and device.type == "cpu":
            emulator(self, name, grid, threads, shared, args)
            return
        queue = stream if stream is not None else torch.cuda.current_stream(device)
        shape = grid if isinstance(grid, tuple) else (grid,)
        values = tuple(_argument(value) for value in args)
        with _current(queue.device_index):
            kernel = self._kernel(name, queue.device_index, shared)
            kernel(shape, (threads,), values, shared, _Queue(queue.cuda_stream))

    def _kernel(self, name: str, device: int, shared: int) -> Any:
        """The function as it is loaded on a device. CuPy's own wrapper would cost more than a small kernel runs."""
        found = self._kernels.get((name, device))
        if found is None:
            with self._lock:
                # A module for each instantiation: compiling all of them would take many seconds.
                if name not in self.names:
                    raise InternalError(f"{self.operation}: there is no instantiation {name}.")
                module = cupy().RawModule(code=self.text, options=OPTIONS, name_expressions=[name])
                kernel = module.get_function(name)
                if shared > 48 << 10:
                    kernel.max_dynamic_shared_size_bytes = shared  # more than 48 KiB have to be asked for
                found = self._kernels[name, device] = kernel.kernel
        return found


def sources() -> dict[str, Source]:
    """All operations by name."""
    from kvstore_gpu import ops

    del ops
    return dict(_sources)


def cubin(source: Source, architecture: str, names: Sequence[str] = ()) -> dict[str, str]:
    """Compile an operation for a compute capability, e.g. ``"90"``; needs NVRTC but no device.

    Returns
    -------
    dict
        Mangled name of each instantiation.

    Raises
    ------
    InternalError
        If it does not compile; with the compiler's words.
    """
    cupy()
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source.text, f"{source.operation}/kernel.cu", (), ())
    try:
        wanted = tuple(names) or source.names
        for name in wanted:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"-arch=sm_{architecture}"))
        except nvrtc.NVRTCError:
            raise InternalError(f"{source.operation}: {nvrtc.getProgramLog(program)}") from None
        if not nvrtc.getCUBIN(program):
            raise InternalError(f"{source.operation}: the compiler made nothing.")
        return {name: nvrtc.getLoweredName(program, name) for name in wanted}
    finally:
        nvrtc.destroyProgram(program)


@cache
def cupy() -> Any:
    """CuPy, imported when a device is first used.

    Raises
    ------
    DeviceUnavailable
        If it can not be.
    """
    try:
        import cupy
    except ImportError as error:
        raise DeviceUnavailable(f"CuPy cannot be imported ({error}).", "Install cupy-cuda13x.") from None
    return cupy


def _current(index: int) -> AbstractContextManager[None]:
    """A device as the current one. Where it is already, as a rule, nothing is asked of the driver."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


class _Queue:
    """A stream of torch's, as CuPy's functions take it."""

    __slots__ = ("ptr",)

    def __init__(self, pointer: int) -> None:
        self.ptr = pointer


_NUMBERS = {bool: np.int32, int: np.int32, float: np.float32, type(None): lambda _: np.uint64(0)}


def _argument(value: Any) -> Any:
    number = _NUMBERS.get(type(value))
    if number is not None:
        return number(value)
    return value if isinstance(value, np.generic) else np.uint64(value.data_ptr())


@cache
def processors(index: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def blocks_for(work: int, device: torch.device, max_blocks: int | None, each: int = 32) -> int:
    """Thread blocks for a kernel that strides over its work: no more than asked for, and enough to fill the device.

    That is several times as many as run at once (`each` a multiprocessor): how many do depends on a kernel's registers,
    and if the last of them were few, most of the device would wait for them.
    """
    fill = (processors(device.index) if device.type == "cuda" else 1) * each
    return max(1, min(work, fill, max_blocks or fill))
