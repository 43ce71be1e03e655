"""The ladder under pressure, through a daemon: what a disk too small for the prompts it was given still has of them.

The KV of real contexts, computed by a model, is stored in a daemon whose disk holds a small part of it, once in an
exact namespace and once in one whose profile has rungs. Then the daemon is started again, every context is asked for,
and the model goes on from what came back: hits, and their divergence from the KV that was stored, are those of bytes
that went through socket, encoder, file and decoder.

    python bench/ladder_pressure.py MODEL --profiles profiles --texts texts --out bench/results/ladder_pressure.json
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import arguments, finish, key, running_daemon

from kvstore import KVStoreClient, Namespace
from kvstore.profile import Profile, load_profile
from kvstore.types import BlockHeader, Miss, Stored
from kvstore_connectors.transformers.calibrate import Coded, Cost, Reference, cut, half_width
from kvstore_connectors.transformers.codec_eval import split
from kvstore_connectors.transformers.ladder import load

BLOCK = 256


def namespace(profile: Profile, fidelity: str) -> Namespace:
    """That of the profile's model."""
    return Namespace(
        model=profile.model, revision=profile.revision, dtype="bfloat16", layers=profile.layers,
        kv_heads=profile.kv_heads, head_dim=profile.head_dim, layout="lkthd1", block_tokens=BLOCK, fidelity=fidelity,
    )  # fmt: skip


def parts(reference: Reference) -> list[torch.Tensor]:
    """The whole blocks of a context."""
    block = reference.block
    return [block[:, :, at : at + BLOCK].contiguous() for at in range(0, block.shape[2] // BLOCK * BLOCK, BLOCK)]


def stored(client: KVStoreClient, references: Sequence[Reference]) -> dict[str, Any]:
    """Store all contexts, one after the other; the disk tier once all is written."""
    began = time.perf_counter()
    for number, one in enumerate(references):
        for index, part in enumerate(parts(one)):
            header = BlockHeader(parent=key(index - 1, f"{number}") if index else b"", position=BLOCK * index)
            data = part.view(-1).view(torch.uint8).numpy().data
            while not isinstance(client.put(key(index, f"{number}"), data, header), Stored):
                time.sleep(0.01)  # memory is full of blocks that are not written yet
    while client.stats()["queue"]["blocks"]:
        time.sleep(0.05)
    return {"seconds": time.perf_counter() - began, **client.stats()["tiers"]["disk"]}


def found(client: KVStoreClient, references: Sequence[Reference]) -> dict[str, Any]:
    """Ask for all contexts; tokens up to their first gap, and what the model makes of those that are there whole."""
    cost, hit, times = Cost(), 0, []
    for number, one in enumerate(references):
        got = []
        for index, part in enumerate(parts(one)):
            began = time.perf_counter()
            block: Any = client.get(key(index, f"{number}"))
            if isinstance(block, Miss):
                break
            got.append(torch.frombuffer(bytearray(block.data), dtype=torch.bfloat16).view(part.shape))
            times.append(time.perf_counter() - began)
        hit += BLOCK * len(got)
        if BLOCK * len(got) == one.block.shape[2]:
            one.add(Coded(torch.cat(got, 2), 0, 0, 0.0, 0.0), cost)
    return {
        "hit_tokens": hit,
        "whole_contexts": len(cost.kl),
        "kl": mean(cost.kl) if cost.kl else 0.0,
        "kl_interval": half_width(cost.kl) if len(cost.kl) > 1 else 0.0,
        "top1": mean(cost.top1) if cost.top1 else 1.0,
        "load_ms": 1e3 * median(times) if times else 0.0,
    }


def main() -> None:
    """Compute, store, start again, ask, print."""
    parser = arguments(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--profiles", type=Path, required=True, help="folder with the one profile of the model")
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--contexts", type=int, default=40, help="of 1,024 tokens (default 40)")
    parser.add_argument(
        "--percent", type=float, nargs="+", default=[10, 20], help="of all bytes that the disk may hold"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (path,) = args.profiles.glob("*.json")
    profile = load_profile(path)
    probe, encode = load(args.model, "cpu")
    samples = cut(split(args.texts, encode)[1], args.contexts, (4 * BLOCK, 4 * BLOCK), 64, seed=2 * args.seed + 2)
    references = [Reference(probe, sample) for sample in samples]
    tokens, raw = sum(len(one.sample.tokens) for one in references), sum(one.block.nbytes for one in references)
    results: dict[str, Any] = {"contexts": len(references), "tokens": tokens, "bytes": raw}
    rows = []
    for percent in args.percent:
        settings = {"disk.bytes": str(int(raw * percent / 100)), "host.bytes": "64MiB"}
        settings["codecs.profiles"] = str(args.profiles.resolve())
        for way, fidelity in (("raw, evicted", "exact"), ("ladder", f"lossy:{profile.name}")):
            with tempfile.TemporaryDirectory(prefix="kvb-") as place:
                with (
                    running_daemon(settings, Path(place)) as address,
                    KVStoreClient(address, namespace=namespace(profile, fidelity)) as client,
                ):
                    disk = stored(client, references)
                with (
                    running_daemon(settings, Path(place)) as address,
                    KVStoreClient(address, namespace=namespace(profile, fidelity)) as client,
                ):
                    after = found(client, references)
            codecs = disk["codecs"]
            seen = {name: disk[name] for name in ("capacity", "used", "blocks", "evicted", "seconds")}
            seen |= {"stepped_down": codecs["stepped_down"], "held": codecs["held"], **after}
            results.setdefault(f"{percent:g} %", {})[way] = seen
            hits = f"{100 * after['hit_tokens'] / tokens:.1f}"
            rows.append(
                (f"{percent:g} %", way, hits, f"{after['kl']:.4f}", f"{after['kl_interval']:.4f}",
                 f"{after['top1']:.3f}", seen["stepped_down"], seen["evicted"], f"{seen['seconds']:.1f}",
                 f"{after['load_ms']:.1f}")
            )  # fmt: skip
    header = ("disk", "kept how", "hits % of tokens", "KL", "±", "top-1", "steps", "evicted", "store s", "load ms")
    finish(args, "ladder_pressure", results, header, rows)


if __name__ == "__main__":
    main()
