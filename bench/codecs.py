"""Speed of codecs on the CPU, one core, both ways, beside memcpy of the same block in the same turns.

A block of 256 tokens of an 8B model's shape and of SmolLM2's, bfloat16, from position 256, in memory that begins at a
page, as that of tiers does. Processor time, best of some rounds: other programs on the machine slow a core's memory
down, never speed it up. GiB/s are of the raw block.

`raw` stands there three times: as it is, copied and checked; copied by the same pieces without checks; and in place,
which is what a block costs that lies in memory already: its checksums are made, or verified, and nothing is moved.

    python bench/codecs.py --out bench/results/codecs.json
    python bench/codecs.py --basis FILE …

With a basis (`kvstore calibrate` leaves one beside its profile) `pca` is measured, too, on a block that is distributed
as the basis says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from common import arguments, finish

from kvstore.codecs import BlockSpec, Context, frame, parse, read
from kvstore.codecs.basis import Basis, load_basis
from kvstore.codecs.prerope import PreRope
from kvstore.encoding import pages
from kvstore.rope import Rotary

SHAPES = {"32 x 8 x 128": (32, 8, 128), "30 x 3 x 64": (30, 3, 64)}
CHAINS = (
    "raw", "lossless", "fp8", "kv4", "kv4(k=8,v=8)", "kv4(k=2,v=2)", "prerope|kv4", "prerope|kv4|zstd", "mikv",
    "raw|seal",
)  # fmt: skip


def fastest(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of processor time of the fastest call of each, in turns."""
    found = [math.inf] * len(runs)
    for _ in range(rounds):
        for index, run in enumerate(runs):
            began = time.thread_time()
            run()
            found[index] = min(found[index], time.thread_time() - began)
    return found


def aligned(nbytes: int) -> np.ndarray:
    """Memory that begins at a page, touched."""
    found = np.frombuffer(pages(nbytes), np.uint8)
    found[:] = 0
    return found


def copied(source: np.ndarray, target: np.ndarray) -> None:
    """Copy by pieces, as `frame.copied` does, without checks."""
    for at in range(0, source.size, frame.PIECE):
        target[at : at + frame.PIECE] = source[at : at + frame.PIECE]


def checked(data: np.ndarray) -> None:
    """Make the checksums of a block of `raw` where it lies."""
    for at in range(0, data.size, frame.PIECE):
        xxhash.xxh3_64_intdigest(data[at : at + frame.PIECE].data)


def verified(data: np.ndarray) -> None:
    """Verify an encoded block, and leave it where it lies."""
    parsed = read(data)
    for plane, unit in np.ndindex(parsed.planes, parsed.units):
        parsed.part(data, plane, unit)


def drawn(basis: Basis, spec: BlockSpec, context: Context) -> torch.Tensor:
    """A block whose components are spread as the basis says, keys turned to their positions."""
    generator, block = torch.Generator().manual_seed(2), torch.empty(spec.shape)
    for first, group in zip(range(0, spec.layers, basis.span), basis.groups, strict=True):
        sides = block[first : first + basis.span]
        for kind, part in zip(basis.kinds, group, strict=True):
            components = torch.randn(spec.tokens, len(part.spread), generator=generator) * part.spread
            shape = (spec.tokens, len(sides), len(kind), *spec.shape[3:])
            rows = (part.mean + components @ part.inverse).view(shape).permute(1, 2, 0, 3, 4)
            (sides if kind == "kv" else sides[:, :1] if kind == "k" else sides[:, 1:])[:] = rows
    return PreRope().inverse(block, spec, 0, context).to(torch.bfloat16)


def main() -> None:
    """Measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--basis", type=Path, help="a model's basis, for pca")
    args = parser.parse_args()
    basis = None if args.basis is None else load_basis(args.basis)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    rows = []
    for shape, (layers, heads, dim) in SHAPES.items():
        spec = BlockSpec(layers, 256, heads, dim, position=256)
        source, target, back = aligned(spec.nbytes), aligned(spec.nbytes), aligned(spec.nbytes)
        block, decoded = (torch.from_numpy(memory).view(torch.bfloat16).view(spec.shape) for memory in (source, back))
        block.copy_(torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)))
        context = Context(
            rotary=Rotary(tuple(10_000.0 ** (-i / dim) for i in range(0, dim, 2))),
            importance=torch.rand(256, generator=torch.Generator().manual_seed(1)),
            keys={"default": bytes(32)},
        )
        names = {name: name for name in CHAINS}
        if basis is not None and (basis.layers, basis.kv_heads, basis.head_dim) == (layers, heads, dim):
            context = replace(context, bases={basis.digest: basis})
            names |= {f"pca(step={n})|zstd": f"prerope|pca(basis={basis.digest},step={n})|zstd" for n in (5, 15)}
        for label, name in names.items():
            if "pca" in label and basis is not None:
                block.copy_(drawn(basis, spec, context))
            chain = parse(name)
            out = aligned(chain.bound(spec, context))
            size = chain.encode(block, spec, out, context)
            ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                label: (
                    partial(chain.encode, block, spec, out, context),
                    partial(chain.decode, out[:size], spec, decoded, context),
                )
            }
            if label == "raw":
                inside = out[out.size - spec.nbytes :]
                ways["raw, no checks"] = partial(copied, source, inside), partial(copied, inside, back)
                ways["raw, in place"] = partial(checked, source), partial(verified, out)
            for way, runs in ways.items():
                speeds = fastest([partial(np.copyto, target, source), *runs], args.rounds)
                memcpy, encode, decode = (spec.nbytes / 2**30 / seconds for seconds in speeds)
                smaller = spec.nbytes / size
                results.setdefault(shape, {})[way] = {
                    "memcpy_gib_s": memcpy, "encode_gib_s": encode, "decode_gib_s": decode, "smaller": smaller,
                }  # fmt: skip
                rows.append(
                    (shape, way, f"{smaller:.2f}", f"{encode:.2f}", f"{decode:.2f}", f"{memcpy:.1f}",
                     f"{encode / memcpy:.2f}", f"{decode / memcpy:.2f}")
                )  # fmt: skip
    header = ("layers x heads x dim", "chain", "smaller", "encode", "decode", "memcpy", "enc/memcpy", "dec/memcpy")
    finish(args, "codecs", results, header, rows)


if __name__ == "__main__":
    main()
