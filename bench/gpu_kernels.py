"""Kernels against their bounds: what the device's memory, and PCIe, could do in the same run.

Shapes are those of Llama-3-8B: 32 layers, 8 KV heads of 128, bfloat16; pages of 16 tokens unless said. Data are random
and several times the L2. Each figure is a median over repetitions, timed with events, contestants in turns.

    python bench/gpu_kernels.py --out bench/results/h200/kernels.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvstore.codecs.fp8 import FP8
from kvstore.codecs.kv4 import KV4
from kvstore.rope import rotary
from kvstore_gpu import (
    carry,
    coded,
    colsum,
    deviation,
    fp8,
    hadamard,
    host,
    kv4,
    lowrank,
    paged,
    place,
    rope,
    rows,
    select,
    slerp,
    spreading,
)
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import HostPart, Launch, Part
from kvstore_gpu.spreading.reference import needed as spreading_in_torch
from kvstore_gpu.staging import Staging

LAYERS, HEADS, DIM, BLOCK = 32, 8, 128, 256
SLOT = 32 << 20
LLAMA3 = {
    "rope_theta": 500000.0, "head_dim": 128,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
Call = Callable[[], Any]
rows_out: list[dict[str, Any]] = []


def timed(calls: dict[str, Call], rounds: int = 9) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each call, in turns: on the device, and until the call returned.

    A kernel that sleeps goes first, so that the device is not seen waiting for the host. What works on streams of its
    own (names that end in ``staged``) does not wait for it: there the host's clock counts, from call to arrival.
    """
    for call in calls.values():
        call()
        call()
    torch.cuda.synchronize()
    device: dict[str, list[float]] = {name: [] for name in calls}
    caller: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if not name.endswith("staged"):
                torch.cuda._sleep(4_000_000)
            start.record()
            begun = time.perf_counter()
            call()
            caller[name].append(time.perf_counter() - begun)
            end.record()
            end.synchronize()
            whole = time.perf_counter() - begun
            device[name].append(whole if name.endswith("staged") else start.elapsed_time(end) / 1e3)
    return {n: median(t) for n, t in device.items()}, {n: median(t) for n, t in caller.items()}


def report(
    kernel: str, case: str, moved: float, bound: tuple[str, float], calls: dict[str, Call], rounds: int = 9
) -> None:
    """Time calls that move so many bytes; the first is ours."""
    times, caller = timed(calls, rounds)
    ours = next(iter(times.values()))
    entry = {
        "kernel": kernel, "case": case, "moved_bytes": moved, "bound": bound[0], "bound_bytes_s": bound[1],
        "seconds": times, "caller_seconds": caller, "share_of_bound": moved / ours / bound[1],
    }  # fmt: skip
    rows_out.append(entry)
    waited = next(iter(caller.values())) * 1e6
    others = "  ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in list(times.items())[1:])
    print(
        f"{kernel:<13} {case:<32} {ours * 1e6:8.0f} us {moved / ours / 1e9:7.1f} GB/s"
        f" {entry['share_of_bound']:6.1%} of {bound[0]:<8} call {waited:5.0f}  {others}",
        flush=True,
    )


def make_cache(layout: str, pages: int, tokens: int = 16, heads: int = HEADS, layers: int = LAYERS) -> PagedCache:
    """Random pages of one layout."""
    views = []
    for _ in range(layers):
        if layout == "nhd":
            both = torch.randn(2, pages, tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
            views.append([both[0], both[1]])
        elif layout == "hnd":
            both = torch.randn(2, pages, heads, tokens, DIM, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
            views.append([both[0], both[1]])
        else:  # K and V side by side in a head, as vLLM 0.26 and later have it
            both = torch.randn(pages, tokens, heads, 2 * DIM, device="cuda", dtype=torch.bfloat16)
            views.append([both[..., :DIM], both[..., DIM:]])
    return PagedCache.of(views)


def some_parts(cache: PagedCache, blocks: list[torch.Tensor], tokens: int = BLOCK) -> list[Part]:
    """Blocks made of pages in random order."""
    per = tokens // cache.page_tokens
    order = np.random.default_rng(1).permutation(cache.pages)[: per * len(blocks)].tolist()
    return [Part(block, order[i * per : (i + 1) * per]) for i, block in enumerate(blocks)]


def limits() -> tuple[tuple[str, float], tuple[str, float], tuple[str, float]]:
    """What copies reach here: device memory (read and written), host to device, device to host."""
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    pinned = torch.empty(1 << 28, dtype=torch.uint8).random_().pin_memory()
    part = a[: 1 << 28]
    times, _ = timed({
        "device": lambda: b.copy_(a),
        "in": lambda: part.copy_(pinned, non_blocking=True),
        "out": lambda: pinned.copy_(part, non_blocking=True),
    }, 21)  # fmt: skip
    found = 2 * (1 << 30) / times["device"], (1 << 28) / times["in"], (1 << 28) / times["out"]
    print(f"device copy {found[0] / 1e12:.2f} TB/s, in {found[1] / 1e9:.1f} GB/s, out {found[2] / 1e9:.1f} GB/s")
    return ("memory", found[0]), ("PCIe in", found[1]), ("PCIe out", found[2])


def in_device_memory(memory: tuple[str, float], layout: str) -> None:
    """Pages to blocks on the same device and back: as they are, turned, and coded."""
    cache = make_cache(layout, 1024)
    nbytes = cache.block_nbytes(BLOCK // 16)
    blocks = [torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_() for _ in range(16)]
    parts = some_parts(cache, blocks)
    ids = [torch.tensor(part.pages, device="cuda") for part in parts]

    def by_torch() -> None:
        for part, index in zip(parts, ids, strict=True):
            block = part.block.view(torch.bfloat16).view(LAYERS, 2, 16, 16, HEADS, DIM)
            for layer, sides in enumerate(cache.views):
                for side, view in enumerate(sides):
                    block[layer, side].copy_(view.index_select(0, index))

    def back_by_torch() -> None:
        for part, index in zip(parts, ids, strict=True):
            block = part.block.view(torch.bfloat16).view(LAYERS, 2, 16, 16, HEADS, DIM)
            for layer, sides in enumerate(cache.views):
                for side, view in enumerate(sides):
                    view.index_copy_(0, index, block[layer, side])

    moved = 2 * nbytes * len(parts)
    report("gather", f"{layout}, 4,096 tokens", moved, memory,
           {"ours": lambda: paged.gather(cache, parts, 16), "torch": by_torch})  # fmt: skip
    report("scatter", f"{layout}, 4,096 tokens", moved, memory,
           {"ours": lambda: paged.scatter(cache, parts, 16), "torch": back_by_torch})  # fmt: skip
    turning = rotary(LLAMA3)
    at = torch.arange(4096, device="cuda")
    turn = rope.Turn.of(turning, at)
    report("rope+scatter", f"{layout}, 4,096 tokens", moved, memory,
           {"ours": lambda: rope.scatter(cache, parts, 16, turn)})  # fmt: skip
    coder, spec = FP8("head"), coded.spec_of(cache, BLOCK)
    places = coded.offsets(coder, spec)
    packed = [Part(torch.empty(coded.nbytes(coder, spec), dtype=torch.uint8, device="cuda"), p.pages) for p in parts]
    bad = torch.zeros(len(parts), dtype=torch.int32, device="cuda")
    both = len(parts) * (nbytes + coded.nbytes(coder, spec))
    report(
        "fp8 pack",
        f"{layout}, 4,096 tokens",
        both,
        memory,
        {"ours": lambda: fp8.packing(cache, packed, spec, coder, places, bad)(0, len(packed))},
    )
    report(
        "fp8 unpack",
        f"{layout}, 4,096 tokens",
        both,
        memory,
        {"ours": lambda: fp8.unpacking(cache, packed, spec, coder, places)(0, len(packed))},
    )
    four = KV4()
    spec = coded.spec_of(cache, BLOCK, 256)
    where = coded.offsets(four, spec)
    small = [Part(torch.empty(coded.nbytes(four, spec), dtype=torch.uint8, device="cuda"), p.pages) for p in parts]
    both = len(parts) * (nbytes + coded.nbytes(four, spec))
    report(
        "kv4 pack",
        f"{layout}, 4,096 tokens",
        both,
        memory,
        {"ours": lambda: kv4.packing(cache, small, spec, four, where, turning, at, bad)(0, len(small))},
    )
    report(
        "kv4 unpack",
        f"{layout}, 4,096 tokens",
        both,
        memory,
        {"ours": lambda: kv4.unpacking(cache, small, spec, four, where, turning, at)(0, len(small))},
    )


def hosted_part(slab: np.ndarray, at: int, size: int, pages: Sequence[int]) -> HostPart:
    """A block in a registered mapping, in the pieces that a copy may span."""
    runs = host.reach(slab[at : at + size], torch.device("cuda", 0))
    return HostPart([torch.from_numpy(run) for run in runs], pages)


def across_pcie(into: tuple[str, float], out: tuple[str, float]) -> None:
    """Blocks in a registered mapping: kernels that reach across, and the copy engine with staging."""
    total = 1 << 29
    slab = np.random.default_rng(2).integers(0, 255, 1 << 20, np.uint8).repeat(total >> 20)
    list(host.ahead(slab, torch.device("cuda", 0)))
    stream = torch.cuda.Stream()
    for tokens, heads in ((16, 1), (16, 8), (64, 8), (256, 8)):
        cache = make_cache("side", 4096 * 8 // heads // tokens, tokens, heads)
        pages, size = BLOCK // tokens, cache.block_nbytes(BLOCK // tokens)
        places = range(0, total - size + 1, size)
        parts = some_parts(cache, [torch.from_numpy(slab[at : at + size]) for at in places])
        staging = Staging(cache.device, max(SLOT, size))
        case = f"{tokens} tokens x {heads} heads, {cache.page_nbytes >> 10} KiB"
        moved = size * len(parts)
        hosted = [hosted_part(slab, at, size, part.pages) for at, part in zip(places, parts, strict=True)]

        def load(cache=cache, hosted=hosted, pages=pages, staging=staging) -> None:
            with behind(stream):
                staging.load(hosted, lambda ps, s: paged.scattering(cache, ps, pages, stream=s), stream)

        def store(cache=cache, hosted=hosted, pages=pages, staging=staging) -> None:
            with behind(stream):
                _, arrived = staging.store(hosted, lambda ps, s: paged.gathering(cache, ps, pages, stream=s), stream)
                stream.wait_event(arrived)

        def across(op: Any, cap: int | None, cache=cache, parts=parts, pages=pages) -> Call:
            return lambda: op(cache, parts, pages, max_blocks=cap)

        kernels = {f"kernel, cap {cap}": across(paged.scatter, cap) for cap in (16, 32, 64, None)}
        report("load", case, moved, into, {"ours, staged": load, **kernels}, 5)
        kernels = {f"kernel, cap {cap}": across(paged.gather, cap) for cap in (8, 16, 32, None)}
        report("store", case, moved, out, {"ours, staged": store, **kernels}, 5)
        if (tokens, heads) == (16, 8):
            compressed(cache, slab, parts, staging, stream, into, out)


def compressed(
    cache: PagedCache, slab: np.ndarray, parts: list[Part], staging: Staging, stream: torch.cuda.Stream,
    into: tuple[str, float], out: tuple[str, float],
) -> None:  # fmt: skip
    """kv4 blocks from and to host memory: the bytes that cross are fewer, and are coded and decoded on the device."""
    coder, turning = KV4(), rotary(LLAMA3)
    spec = coded.spec_of(cache, BLOCK, 256)
    places, size = coded.offsets(coder, spec), coded.nbytes(coder, spec)
    room = -(-size // 256) * 256
    made = [hosted_part(slab, i * room, size, part.pages) for i, part in enumerate(parts)]
    at = torch.arange(BLOCK, device="cuda").repeat(len(made))
    bad = torch.zeros(len(made), dtype=torch.int32, device="cuda")

    def land(ps: Any, s: torch.cuda.Stream) -> Launch:
        return kv4.unpacking(cache, ps, spec, coder, places, turning, at, stream=s)

    def take(ps: Any, s: torch.cuda.Stream) -> Launch:
        return kv4.packing(cache, ps, spec, coder, places, turning, at, bad, stream=s)

    def load() -> None:
        with behind(stream):
            staging.load(made, land, stream)

    def store() -> None:
        with behind(stream):
            _, arrived = staging.store(made, take, stream)
            stream.wait_event(arrived)

    raw = cache.block_nbytes(BLOCK // cache.page_tokens)
    case = f"{len(made)} blocks, {size / raw:.2f} of the bytes"
    report("store kv4", case, size * len(made), out, {"ours, staged": store}, 5)
    report("load kv4", case, size * len(made), into, {"ours, staged": load}, 5)


@contextlib.contextmanager
def behind(stream: torch.cuda.Stream) -> Iterator[None]:
    """A side stream between what is on the current one and what comes."""
    stream.wait_stream(torch.cuda.current_stream())
    yield
    torch.cuda.current_stream().wait_stream(stream)


def on_tokens(memory: tuple[str, float]) -> None:
    """What works on one layer's tokens."""
    n = 1 << 17
    a, b = (torch.randn(n, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    size = a.nbytes
    plain = lambda: (a.float() - b.float()).square().sum((1, 2))  # noqa: E731
    report("deviation", f"{n} tokens", 2 * size, memory, {"ours": lambda: deviation.deviation(a, b), "torch": plain})
    report("hadamard", f"{n} tokens", 2 * size, memory, {"ours": lambda: hadamard.rotate(a, out=b)})
    report("slerp merge", f"{n} tokens", 3 * size, memory, {"ours": lambda: slerp.merge(a, b)})
    e, lengths, _ = slerp.merge(a, b)
    report("slerp restore", f"{n} tokens", 3 * size, memory, {"ours": lambda: slerp.restore(e, lengths)})
    view = torch.randn(n // 16, 16, HEADS, 2 * DIM, device="cuda", dtype=torch.bfloat16)[..., :DIM]
    slots = torch.randperm(n, device="cuda")
    flat = view.flatten(0, 1)
    report("rows scatter", f"{n} rows", 2 * size, memory,
           {"ours": lambda: rows.scatter(view, a, slots), "torch": lambda: flat.index_copy_(0, slots, a)})  # fmt: skip
    report(
        "rows gather",
        f"{n} rows",
        2 * size,
        memory,
        {"ours": lambda: rows.gather(view, a, slots), "torch": lambda: flat.index_select(0, slots)},
    )
    placed(memory)
    carried(memory)
    words_followed(memory)
    for count in (4096, 32768, 131072):
        scores = torch.randn(count, device="cuda")
        ours = lambda s=scores, c=count // 7: select.top(s, c)  # noqa: E731
        plain = lambda s=scores, c=count // 7: s.topk(c).indices.sort()  # noqa: E731
        report("select", f"{count // 7} of {count}", 4 * count, memory, {"ours": ours, "torch": plain})


def placed(memory: tuple[str, float]) -> None:
    """Chunks of 512 tokens to rows of a prompt of 16,384, 4 layers at a time, as a blend loads them."""
    layers, tokens, chunk = 4, 16384, 512
    sides = [torch.empty(2, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    prompt = [(both[0], both[1]) for both in sides]
    size = layers * 2 * chunk * HEADS * DIM * 2
    blocks = [
        torch.randn(size // 2, device="cuda", dtype=torch.bfloat16).view(torch.uint8) for _ in range(tokens // chunk)
    ]
    pieces = [place.Piece(chunk, 0, chunk, row) for row in torch.randperm(tokens // chunk).mul(chunk).tolist()]
    turn = rope.Turn.of(rotary(LLAMA3), torch.randint(-8000, 8000, (len(pieces),), device="cuda"))
    case = f"{len(pieces)} chunks of {chunk}, {layers} layers"
    report("place", case, 2.0 * size * len(blocks), memory, {"ours": lambda: place.place(prompt, pieces, blocks, turn)})


def carried(memory: tuple[str, float]) -> None:
    """What 15 % recomputed tokens tell of the others, a layer of a prompt of 16,384 tokens in chunks of 512."""
    tokens, chunk = 16384, 512
    keys, values = (torch.randn(tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    at = torch.randperm(tokens, device="cuda")[: int(0.15 * tokens)].sort().values
    fresh = torch.randn(len(at), 2 * HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    turn = rope.Turn.of(rotary(LLAMA3), torch.arange(tokens, device="cuda"))
    edges = [(start, start + chunk) for start in range(0, tokens, chunk)]
    plan = carry.Carried.of(edges, at, torch.rand(tokens, device="cuda"), turn)
    rows, told = 2 * HEADS * DIM * 2, len(at)
    moved = float(rows * (2 * (tokens - told) + 4 * told) + tokens * DIM * 4)
    ours = lambda: carry.carry(fresh[:, :HEADS], fresh[:, HEADS:], keys, values, plan)  # noqa: E731
    report("carry", f"{tokens} tokens, {told} recomputed", moved, memory, {"ours": ours})


def words_followed(memory: tuple[str, float]) -> None:
    """Where words lead in a prompt of chunks of 512; 200 bytes a token, and bound by launches."""
    for tokens in (16384, 32768):
        drawn = torch.rand(tokens, device="cuda").pow(4).mul(50_000).long() + 1000  # some words common, most rare
        owner = torch.arange(tokens, device="cuda") // 512
        owner[-64:] = -1
        edges = [(start, min(start + 512, tokens - 64)) for start in range(0, tokens, 512)]
        ours = lambda i=drawn, o=owner, e=edges: spreading.needed(i, o, e)  # noqa: E731
        torchs = lambda i=drawn, o=owner, e=edges: spreading_in_torch(i, o, e, spreading.PLAIN)  # noqa: E731
        report("spreading", f"{tokens} tokens", 200.0 * tokens, memory, {"ours": ours, "torch": torchs}, 5)


def on_matrices() -> None:
    """What tensor cores do, against a product of large matrices; operations count as bytes do elsewhere."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * 8192**3 / timed({"gemm": lambda: a @ b})[0]["gemm"]
    print(f"matrix product {peak / 1e12:.0f} TFLOP/s")
    cores, heads = ("matrix", peak), 32
    for tokens in (4096, 32768):
        keys = torch.randn(tokens // 16, 16, HEADS, 2 * DIM, device="cuda", dtype=torch.bfloat16)[..., :DIM]
        table = torch.randperm(tokens // 16, device="cuda").int()
        at = torch.arange(tokens - 64, tokens, device="cuda").int()
        queries = torch.randn(64, heads, DIM, device="cuda", dtype=torch.bfloat16)
        lse = torch.full((64, heads), 10.0, device="cuda")
        sums = lambda q=queries, p=at, e=lse, k=keys, t=table, n=tokens: colsum.column_sums(q, p, e, k, t, n, 0.088)  # noqa: E731
        report("column sums", f"64 queries, {tokens}", 2.0 * 64 * heads * DIM * tokens, cores, {"ours": sums}, 5)
    left, right = (torch.randn(*n, device="cuda", dtype=torch.bfloat16) for n in ((131072, 160), (HEADS, DIM, 160)))
    chosen = torch.stack([torch.randperm(131072, device="cuda")[:2048] for _ in range(HEADS)]).int()
    cos, sin = (
        rope.Turn.of(rotary(LLAMA3), torch.arange(131072, device="cuda")).cos,
        torch.rand(131072, 64, device="cuda"),
    )
    plain = lambda: torch.einsum("gnr,gdr->gnd", left[chosen.long()], right)  # noqa: E731
    ours = lambda: lowrank.reconstruct(left, right, chosen, cos, sin, torch.bfloat16)  # noqa: E731
    work = 2.0 * HEADS * 2048 * DIM * 160
    report("low rank", "2,048 rows, rank 160", work, cores, {"ours": ours, "torch, not turned": plain})


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels against their bounds.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed")
    torch.manual_seed(3)
    memory, into, out = limits()
    on_tokens(memory)
    on_matrices()
    across_pcie(into, out)
    for layout in ("nhd", "hnd", "side"):
        in_device_memory(memory, layout)
    if options.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit,
            "command": " ".join(sys.argv),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps(
                {**facts, "limits": {"memory": memory[1], "in": into[1], "out": out[1]}, "rows": rows_out}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
