"""Every kernel compiles for every architecture, and every instantiation, on a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.errors import InternalError
from kvstore_gpu.compile import ARCHITECTURES, Source, cubin, sources

SOURCES = sources()


def test_every_folder_with_a_kernel_is_known() -> None:
    from kvstore_gpu.compile import HERE

    assert set(SOURCES) == {path.parent.name for path in HERE.glob("*/kernel.cu")}


def compiled_for(architecture: str, source: Source) -> tuple[str, ...]:
    """The instantiations to compile: all for the oldest architecture, and where a kernel tells them apart. Else two of
    them will do for a later one: it can do all that the oldest can."""
    if architecture == ARCHITECTURES[0] or "__CUDA_ARCH__" in source.text:
        return source.names
    return tuple({source.names[0], source.names[-1]})


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[str, str], dict[str, str]]]:
    """What came of compiling one of all; the compiler works on several at once."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        made = {
            (source.operation, architecture): threads.submit(
                cubin, source, architecture, compiled_for(architecture, source)
            )
            for source in SOURCES.values()
            for architecture in ARCHITECTURES
        }
        yield lambda operation, architecture: made[operation, architecture].result()
        threads.shutdown(cancel_futures=True)  # where only some of the tests were asked for


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", SOURCES)
def test_kernels_compile(operation: str, architecture: str, compiled) -> None:
    source = SOURCES[operation]
    made = compiled(operation, architecture)
    assert set(made) == set(compiled_for(architecture, source))
    assert len(set(made.values())) == len(made)


def test_a_kernel_that_does_not_compile_says_why(tmp_path, monkeypatch) -> None:
    import kvstore_gpu.compile as module

    shutil.copy(module.HERE / "common.cuh", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kernel.cu").write_text("__global__ void f(int* x) { *x = nothing; }")
    monkeypatch.setattr(module, "HERE", tmp_path)
    with pytest.raises(InternalError, match=r"broken/kernel\.cu.*nothing.*undefined"):
        cubin(Source("broken", ["f"]), "90")
    module._sources.pop("broken")


def test_importing_launchers_loads_no_cupy() -> None:
    import sys

    code = "import sys, kvstore_gpu.ops; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
