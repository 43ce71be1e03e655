"""Speed of codecs on the CPU, one core, both ways, beside memcpy of the same block in the same turns.

A block of 256 tokens of an 8B model's shape and of SmolLM2's, bfloat16, from position 256. Processor time, best of some
rounds: other programs on the machine slow a core's memory down, never speed it up. GiB/s are of the raw block.

    python bench/codecs.py --out bench/results/codecs.json
    python bench/codecs.py --basis FILE …

With a basis (`kvstore calibrate` leaves one beside its profile) `pca` is measured, too, on a block that is distributed
as the basis says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, finish

from kvstore.codecs import BlockSpec, Context, parse
from kvstore.codecs.basis import Basis, load_basis
from kvstore.codecs.prerope import PreRope
from kvstore.rope import Rotary

SHAPES = {"32 x 8 x 128": (32, 8, 128), "30 x 3 x 64": (30, 3, 64)}
CHAINS = (
    "raw", "lossless", "fp8", "kv4", "kv4(k=8,v=8)", "kv4(k=2,v=2)", "prerope|kv4", "prerope|kv4|zstd", "mikv",
    "raw|seal",
)  # fmt: skip


def best(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of processor time of the fastest of some calls."""
    found = []
    for _ in range(rounds):
        began = time.thread_time()
        run()
        found.append(time.thread_time() - began)
    return min(found)


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
        block = torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        back = torch.zeros_like(block)
        source = block.view(-1).view(torch.uint8).numpy()
        target = np.zeros_like(source)
        context = Context(
            rotary=Rotary(tuple(10_000.0 ** (-i / dim) for i in range(0, dim, 2))),
            importance=torch.rand(256, generator=torch.Generator().manual_seed(1)),
            keys={"default": bytes(32)},
        )
        gib = spec.nbytes / 2**30
        names = {name: name for name in CHAINS}
        if basis is not None and (basis.layers, basis.kv_heads, basis.head_dim) == (layers, heads, dim):
            context = replace(context, bases={basis.digest: basis})
            names |= {f"pca(step={n})|zstd": f"prerope|pca(basis={basis.digest},step={n})|zstd" for n in (5, 15)}
        for label, name in names.items():
            if "pca" in label and basis is not None:
                block = drawn(basis, spec, context)
            chain = parse(name)
            out = np.zeros(chain.bound(spec, context), np.uint8)
            size = chain.encode(block, spec, out, context)
            memcpy = gib / best(lambda s=source, t=target: np.copyto(t, s), args.rounds)
            encode = gib / best(lambda c=chain, o=out, x=context, b=block, s=spec: c.encode(b, s, o, x), args.rounds)
            decode = gib / best(
                lambda c=chain, o=out[:size], x=context, b=back, s=spec: c.decode(o, s, b, x), args.rounds
            )
            results.setdefault(shape, {})[label] = {
                "memcpy_gib_s": memcpy, "encode_gib_s": encode, "decode_gib_s": decode, "smaller": spec.nbytes / size,
            }  # fmt: skip
            rows.append(
                (shape, label, f"{spec.nbytes / size:.2f}", f"{encode:.2f}", f"{decode:.2f}", f"{memcpy:.1f}",
                 f"{encode / memcpy:.2f}", f"{decode / memcpy:.2f}")
            )  # fmt: skip
    header = ("layers x heads x dim", "chain", "smaller", "encode", "decode", "memcpy", "enc/memcpy", "dec/memcpy")
    finish(args, "codecs", results, header, rows)


if __name__ == "__main__":
    main()
