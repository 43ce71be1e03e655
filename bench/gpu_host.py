"""What a block that is loaded onto a device costs the host, without a device.

Leased blocks go the worker's way, from `Transfers.load` to the last kernel, with the calls of CUDA and CuPy replaced by
ones that count themselves: microseconds of Python a block (processor time), and calls a load (the few uploads are not
counted). On a device what each call takes comes on top.

    .venv-vllm/bin/python bench/gpu_host.py --out bench/results/gpu_host.json
"""

from __future__ import annotations

import mmap
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engines"))

from common import arguments, finish
from kit import set_environment

LAYERS, DIM, PAGE, BLOCK = 32, 128, 16, 256
ARENA_PAGE = 16 << 10
TARGET_US = 100
LOADS = [("prerope|kv4", 8, 16), ("prerope|kv4", 8, 64), ("prerope|kv4", 8, 256), ("", 8, 64), ("", 1, 128)]
"""Chain, KV heads, blocks."""

calls: Counter[str] = Counter()


class Moment:
    """A stream, or an event."""

    cuda_stream, device_index = 0, 0

    def __init__(self, *_: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        calls["events"] += 1

    def synchronize(self) -> None: ...

    wait_event = wait_stream = record


def counted(name: str, result: Any = None) -> Any:
    """A call that only counts."""

    def call(*_: Any, **__: Any) -> Any:
        calls[name] += 1
        return result

    return call


def no_device() -> None:
    """Put stand-ins in the place of CUDA and CuPy, for this process."""
    from kvstore_gpu import compile as compiler
    from kvstore_gpu import host
    from kvstore_gpu.kv4 import launch as kv4

    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, Moment)
    for name in ("stream", "device"):
        setattr(torch.cuda, name, lambda _: nullcontext())
    torch.cuda.current_stream = lambda *_: Moment()  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (16 << 30, 16 << 30)  # type: ignore[assignment]
    runtime = SimpleNamespace(memcpyDefault=4, memcpyAsync=counted("copies"))
    host.cupy = lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))  # type: ignore[assignment]
    driver = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: 0)
    host._driver = lambda _: nullcontext(driver)  # type: ignore[assignment]
    host.populate_at = lambda *_: None  # type: ignore[assignment]
    kv4.table = angles  # type: ignore[assignment]
    compiler.emulator = lambda *_: None  # so that launchers do not take the reference, and…
    compiler.Source._kernel = lambda *_: counted("kernels")  # type: ignore[assignment, method-assign]
    compiler.Source.launch = launched  # type: ignore[assignment, method-assign]


def angles(rotary: Any, positions: torch.Tensor, stream: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`kvstore_gpu.rope.launch.table`, which a device computes."""
    calls["kernels"] += 3
    made = torch.empty(len(positions), len(rotary.frequencies))
    return made, made


def launched(self: Any, name: str, grid: Any, args: Any, device: Any, *, threads: int = 0, shared: int = 0,
             stream: Any = None) -> None:  # fmt: skip
    """…what `Source.launch` does on a device, but for the kernel."""
    from kvstore_gpu import compile as compiler

    values = tuple(compiler._argument(value) for value in args)
    with torch.cuda.device(device):
        self._kernel(name, 0, shared)((grid,), (threads,), values, shared, compiler._Queue(0))


class Lease:
    """A lease that holds."""

    def __init__(self, blocks: list[Any]) -> None:
        self.blocks = blocks

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None: ...

    def release(self) -> None: ...

    def valid(self) -> bool:
        """Always."""
        return True


class Load:
    """A prompt of so many blocks in shared memory, and the engine's pages that it is loaded into."""

    def __init__(self, chain: str, heads: int, blocks: int) -> None:
        from kvstore.rope import rotary
        from kvstore.types import Namespace
        from kvstore_connectors.base import Tally
        from kvstore_connectors.vllm.code import Codes
        from kvstore_connectors.vllm.device_pages import DevicePages
        from kvstore_connectors.vllm.identity import Scope
        from kvstore_connectors.vllm.jobs import LoadJob
        from kvstore_connectors.vllm.layout import CANONICAL, PageViews
        from kvstore_connectors.vllm.transfers import Transfers, keys_of

        pages = blocks * BLOCK // PAGE
        memory = [torch.empty(pages, PAGE, heads, 2 * DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
        views = [PageViews(CANONICAL, (one[..., :DIM], one[..., DIM:])) for one in memory]
        self.pages = DevicePages(views, BLOCK, PAGE, PAGE)
        namespace = Namespace(
            model="bench", dtype="bfloat16", layers=LAYERS, kv_heads=heads, head_dim=DIM, layout=CANONICAL,
            block_tokens=BLOCK, fidelity="lossy:bench" if chain else "exact",
        )  # fmt: skip
        if chain:
            self.pages.use(Codes(namespace, rotary({"rope_theta": 500000.0, "head_dim": DIM}), chain))
        hashes = [number.to_bytes(32, "little") for number in range(blocks)]
        self._leased = dict(zip(keys_of(namespace, hashes), self._stored(blocks), strict=True))
        self._transfers = Transfers(self.pages, namespace, Tally(), 60.0)
        ids = np.random.default_rng(1).permutation(pages).tolist()
        self._job = lambda: LoadJob("bench", Scope(), hashes, 0, ids, blocks * BLOCK, True)

    def _stored(self, blocks: int) -> list[Any]:
        """Blocks as the daemon lays them, one after the other, from page to page; only headers are written."""
        from kvstore.codecs.frame import seal_head

        sizes = [self.pages.stored_nbytes(number * BLOCK) for number in range(blocks)]
        starts = np.cumsum([0, *(-(-size // ARENA_PAGE) * ARENA_PAGE for size in sizes)]).tolist()
        slab = np.frombuffer(mmap.mmap(-1, starts[-1]), np.uint8)
        parts = [slab[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        if self.pages.code is not None:
            frames = self.pages._frames_of(self.pages.code)
            for number, part in enumerate(parts):
                form = frames._of(number * BLOCK)
                label = frames._label(replace(form.spec, position=number * BLOCK), len(form.sizes))
                seal_head(part, label, form.sizes, np.zeros(form.sizes.shape, np.uint64))
        return [SimpleNamespace(parts=[part], device=None) for part in parts]

    def run(self, what: str, work: Any) -> Any:
        """The link to a daemon that answers at once."""
        return work(self)

    def lease(self, keys: Any, **_: Any) -> Any:
        """The daemon's answer."""
        return Lease([self._leased[key] for key in keys])

    def once(self) -> float:
        """Load all; microseconds of processor time a block."""
        job = self._job()
        begun = time.thread_time()
        if self._transfers.load(self, job):  # type: ignore[arg-type]
            raise RuntimeError("blocks were not loaded")
        return (time.thread_time() - begun) / len(job.hashes) * 1e6


def main() -> None:
    """Run and report."""
    args = arguments(__doc__).parse_args()
    set_environment()
    torch.set_num_threads(1)
    no_device()
    results, rows = {}, []
    for chain, heads, blocks in LOADS:
        load = Load(chain, heads, blocks)
        load.once()
        calls.clear()
        load.once()
        made = dict(calls)
        times = [load.once() for _ in range(3 * args.rounds)]
        name = f"{blocks} blocks of {load.pages.stored_nbytes(BLOCK) / 2**20:.0f} MiB, {chain or 'raw'}"
        results[name] = {"us_a_block": median(times), "least": min(times), "target": TARGET_US, "calls": made}
        verdict = "ok" if median(times) <= TARGET_US else "short"
        rows.append((name, f"{median(times):.0f} µs (least {min(times):.0f})", f"<= {TARGET_US}", verdict, str(made)))
    finish(args, "gpu_host", results, ("load", "a block", "target", "", "calls a load"), rows)


if __name__ == "__main__":
    main()
