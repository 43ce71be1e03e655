"""Kernels on a CPU: compiled by g++ against ``emulated.h`` and called with the arguments of a launch."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore_gpu.compile import Source

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing")
PRELUDE = """
#define KVSTORE_EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
inline unsigned __float_as_uint(float x) { unsigned y; __builtin_memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; __builtin_memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
"""


def launch(source: Source, name: str, grid: Any, threads: int, shared: int, arguments: Any) -> None:
    """Run a kernel; what `kvstore_gpu.compile.emulator` is set to."""
    if shared:
        raise NotImplementedError("dynamic shared memory is not emulated")
    shape = grid if isinstance(grid, tuple) else (grid,)
    x, y = (*shape, 1)[:2]
    values = [_value(one) for one in arguments]
    array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(one) for one in values))
    _library(source.text, source.names)["launch"](source.names.index(name), x, y, threads, array)


def _value(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_uint64(0)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_uint64(argument.data_ptr())
    if isinstance(argument, bool | int):
        return ctypes.c_int32(int(argument))
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, np.generic):
        return np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
    raise TypeError(f"{argument!r} is no argument of a kernel")


@cache
def _library(text: str, names: tuple[str, ...]) -> ctypes.CDLL:
    cases = "\n".join(
        f"case {i}: emulated::body = [](void* v) {{ emulated::call({name}, static_cast<void**>(v)); }}; break;"
        for i, name in enumerate(names)
    )
    code = f"""{PRELUDE}{text}
extern "C" void launch(int which, unsigned x, unsigned y, unsigned threads, void** values) {{
    switch (which) {{ {cases} }}
    emulated::body_arguments = values;
    emulated::run(x, y, threads);
}}"""
    digest = hashlib.sha256((code + (HERE / "emulated.h").read_text()).encode()).hexdigest()[:24]
    target = Path(tempfile.gettempdir()) / f"kvstore-emulated-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "kernel.cpp").write_text(code)
            made = Path(place) / "kernel.so"
            command = [str(COMPILER), *FLAGS, f"-I{HERE}", str(Path(place) / "kernel.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
            shutil.move(made, target)
    return ctypes.CDLL(str(target))
