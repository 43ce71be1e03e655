"""What a flood from one tenant costs another: hit rate of a tenant with a guarantee, alone and beside the flood.

A real daemon with memory and disk. Tenant *a* asks for prompts out of a set that fits into what it is guaranteed, the
popular ones more often; what is missing it stores. Tenant *b* stores new blocks as fast as it can and never asks for
any again. The hit rate of *a* is compared between a run alone and a run beside *b*, with the same requests; a third,
without the rule, says what the rule is worth.

With ``--changing`` tenant *b* is by turns as fast as it can be, slow, and silent, for times drawn at random.

    python bench/tenants.py --changing --out bench/results/tenants_changing.json
    python bench/tenants.py --out bench/results/tenants.json
"""

from __future__ import annotations

import math
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import arguments, finish, key, running_daemon, touched

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.quotas import QuotaRule
from kvstore.types import Hit, Stored

MIB = 1 << 20
BLOCK = MIB // 4
PER_PROMPT = 8
HOST, DISK = 64 * MIB, 192 * MIB
PAUSES_S = (0.0, 0.05, 0.5)
"""Between two offers of 16 blocks of a flood that changes."""
RULE = QuotaRule(name="a", tenant="a", guarantee="50%")
A, B = Namespace(model="bench", tenant="a"), Namespace(model="bench", tenant="b")


def prompts_of(seed: int, count: int, share: float) -> list[list[bytes]]:
    """Requests of tenant a: chains of blocks, by popularity, out of a set of `share` of the disk tier."""
    rng = random.Random(seed)
    distinct = int(share * DISK) // (BLOCK * PER_PROMPT)
    picks = [min(int(rng.paretovariate(0.3)) - 1, distinct - 1) for _ in range(count)]
    return [[key(i, f"a{seed}/{pick}") for i in range(PER_PROMPT)] for pick in picks]


def ask(kv: KVStoreClient, prompts: list[list[bytes]], source: Any, buffers: list[Any]) -> tuple[int, int]:
    """Ask for each prompt, store what is missing; blocks that were found, and asked for."""
    hits = asked = 0
    for keys in prompts:
        found = kv.get_into(keys, buffers, wait_s=30, namespace=A)
        asked += len(keys)
        hits += sum(isinstance(each, Hit) for each in found)
        missing = [i for i, each in enumerate(found) if not isinstance(each, Hit)]
        items = [(keys[i], source, BlockHeader(parent=keys[i - 1] if i else b"")) for i in missing]
        if items:
            kv.put_many(items, wait_s=30, namespace=A)
    return hits, asked


def flood(address: str, stop: threading.Event, stored: list[int], rng: random.Random | None) -> None:
    """Store new blocks of tenant b until told to stop; with `rng` at a rate that changes."""
    source = touched(BLOCK)
    pause_s, until = 0.0, math.inf if rng is None else 0.0
    with KVStoreClient(address, namespace=B, timeout_s=60) as kv:
        number = 0
        while not stop.wait(pause_s):
            if rng is not None and time.monotonic() > until:
                pause_s, until = rng.choice(PAUSES_S), time.monotonic() + rng.uniform(0.1, 1.0)
            outcomes = kv.put_many([(key(number + i, "b"), source, BlockHeader()) for i in range(16)], wait_s=1)
            number += 16
            stored[0] += sum(isinstance(each, Stored) for each in outcomes)


def run(seed: int, count: int, share: float, *, flooded: bool, ruled: bool, changing: bool = False) -> dict[str, Any]:
    """One run against a fresh daemon."""
    requests = prompts_of(seed, count, share)
    source = touched(BLOCK)
    buffers = [touched(BLOCK) for _ in range(PER_PROMPT)]
    with tempfile.TemporaryDirectory(prefix="kvb-") as place:
        settings = {"host.bytes": str(HOST), "disk.bytes": str(DISK), "host.slab_bytes": str(8 * MIB)}
        with running_daemon(settings, Path(place)) as address:
            stop, stored = threading.Event(), [0]
            with KVStoreClient(address, timeout_s=60) as kv:
                if ruled:
                    kv.quota(RULE)
                ask(kv, requests[: count // 4], source, buffers)  # warm
                rng = random.Random(seed) if changing else None
                other = threading.Thread(target=flood, args=(address, stop, stored, rng))
                if flooded:
                    other.start()
                hits, asked = ask(kv, requests[count // 4 :], source, buffers)
                stop.set()
                if flooded:
                    other.join()
    return {"hit_percent": 100 * hits / asked, "asked": asked, "flood_blocks": stored[0]}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1200, help="prompts of tenant a (default 1200)")
    parser.add_argument("--share", type=float, default=0.4, help="a's prompts, as a share of the disk (default 0.4)")
    parser.add_argument("--changing", action="store_true", help="a flood by turns fast, slow and silent")
    args = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    results: dict[str, Any] = {"flood_of_disk": [], "lost_points": [], "lost_points_without_rule": []}
    for seed in range(args.rounds):
        alone = run(seed, args.requests, args.share, flooded=False, ruled=True)
        beside = run(seed, args.requests, args.share, flooded=True, ruled=True, changing=args.changing)
        bare = run(seed, args.requests, args.share, flooded=True, ruled=False, changing=args.changing)
        results["flood_of_disk"].append(beside["flood_blocks"] * BLOCK / DISK)
        results["lost_points"].append(alone["hit_percent"] - beside["hit_percent"])
        results["lost_points_without_rule"].append(alone["hit_percent"] - bare["hit_percent"])
        rows.append((seed, *(f"{each['hit_percent']:.2f}" for each in (alone, beside, bare)),
                     f"{results['flood_of_disk'][-1]:.1f}"))  # fmt: skip
    results["worst"] = max(results["lost_points"])
    finish(args, "tenants", results, ("seed", "alone %", "beside a flood %", "without a rule %", "flood / disk"), rows)


if __name__ == "__main__":
    main()
