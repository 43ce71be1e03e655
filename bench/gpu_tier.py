"""The GPU tier beside host memory: the same blocks into the same pages of an engine's cache, in turns.

Shapes are those of Llama-3-8B in bfloat16: blocks of 256 tokens, 32 MiB each, into pages of 16 tokens. The daemon runs
in a process of its own; this one is the engine. Loads are timed by the host's clock from the call to the last byte.
Also: what asking for places on the GPU adds to a lease, how long opening the slabs takes once, and how fast the daemon
copies.

    python bench/gpu_tier.py --out bench/results/h100/gpu_tier.json
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from common import arguments, finish, key, running_daemon, spread, timed

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.layout import learn
from kvstore_connectors.vllm.pages import Piece
from kvstore_gpu.shared import Imports

LAYERS, HEADS, DIM, TOKENS, BLOCK = 32, 8, 128, 16, 256
BLOCKS = 16
"""Blocks of a load: 4,096 tokens, 512 MiB."""

NAMESPACE = Namespace(model="bench")


def pages() -> DevicePages:
    """An engine's cache with room for one load."""

    def write(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache[slots // TOKENS, :, slots % TOKENS] = torch.cat([k, v], dim=-1)

    shape = BLOCKS * BLOCK // TOKENS, TOKENS, HEADS, 2 * DIM
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda").permute(0, 2, 1, 3) for _ in range(LAYERS)]
    return DevicePages([learn(cache, write, HEADS, DIM, "bench") for cache in caches], BLOCK, TOKENS, TOKENS)


def leased(client: KVStoreClient, keys: list[bytes]) -> Any:
    """A lease of blocks that are all on the GPU."""
    deadline = time.monotonic() + 60
    while True:
        lease = client.lease(keys, namespace=NAMESPACE)
        if all(block.device is not None for block in lease.blocks):
            return lease
        lease.release()
        if time.monotonic() > deadline:
            raise SystemExit("the blocks did not come to the GPU")
        time.sleep(0.001)


def main() -> None:
    """Measure and print."""
    args = arguments(__doc__).parse_args()
    cache = pages()
    keys = [key(number, "gpu") for number in range(BLOCKS)]
    ids = [list(range(16 * n, 16 * n + 16)) for n in range(BLOCKS)]
    settings = {"host.bytes": "4GiB", "gpu.bytes": "1GiB", "gpu.admission": "first"}
    with running_daemon(settings) as address:
        imports = Imports(torch.device("cuda"))
        near = KVStoreClient(address, device=imports, timeout_s=30)
        far = KVStoreClient(address, timeout_s=30)
        noise = np.random.default_rng(1).integers(0, 255, cache.nbytes, np.uint8)
        far.put_many([(k, np.roll(noise, n), BlockHeader()) for n, k in enumerate(keys)], namespace=NAMESPACE)
        before = time.perf_counter()
        leased(near, keys).release()
        came = time.perf_counter() - before
        with leased(near, keys) as lease:
            at_host = [Piece(b.parts, 0, i) for b, i in zip(lease.blocks, ids, strict=True)]
            at_gpu = [Piece(b.parts, 0, i, 0, b.device) for b, i in zip(lease.blocks, ids, strict=True)]
            cache.start(at_host)()
            expected = [side.clone() for layer in cache.caches for side in layer]
            for layer in cache.caches:
                for side in layer:
                    side.zero_()
            cache.start(at_gpu)()
            same = all(
                torch.equal(side, wanted)
                for side, wanted in zip((s for layer in cache.caches for s in layer), expected, strict=True)
            )
            if not same:
                raise SystemExit("what was loaded from the GPU is not what was loaded from host memory")
            seconds: dict[str, list[float]] = {"host": [], "gpu": []}
            for _ in range(args.rounds):
                seconds["host"].append(timed(lambda: cache.start(at_host)()))
                seconds["gpu"].append(timed(lambda: cache.start(at_gpu)()))
        asking: dict[str, list[float]] = {"host": [], "gpu": []}
        for _ in range(200):
            for name, client in (("host", far), ("gpu", near)):
                begun = time.perf_counter()
                lease = client.lease(keys, namespace=NAMESPACE)
                asking[name].append(time.perf_counter() - begun)
                lease.release()
        fresh = KVStoreClient(address, device=Imports(torch.device("cuda")), timeout_s=30)
        fresh.connect()
        opening = timed(lambda: fresh.lease(keys, namespace=NAMESPACE))
        state = far.stats()["tiers"]["gpu"]
    nbytes = BLOCKS * cache.nbytes
    results = {
        "device": torch.cuda.get_device_name(0),
        "bytes": nbytes,
        "load_s": {name: spread(times) for name, times in seconds.items()},
        "lease_s": {name: spread(times) for name, times in asking.items()},
        "first_lease_of_a_connection_s": opening,
        "all_blocks_copied_after_s": came,
        "tier": {name: state[name] for name in ("stored", "hits", "misses", "evicted", "refused")},
    }
    rows = [
        [name, f"{1e3 * found['median']:.2f} ms", f"{nbytes / found['median'] / 1e9:.0f} GB/s"]
        for name, found in results["load_s"].items()
    ]
    rows += [[f"lease, {name}", f"{1e6 * found['median']:.0f} µs", ""] for name, found in results["lease_s"].items()]
    rows += [["first lease of a connection", f"{1e3 * opening:.1f} ms", ""]]
    rows += [["all blocks copied", f"{1e3 * came:.0f} ms", f"{nbytes / came / 1e9:.1f} GB/s"]]
    finish(args, "gpu_tier", results, ["what", "time", "rate"], rows)


if __name__ == "__main__":
    main()
