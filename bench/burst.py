"""A burst of stores at twice what the host tier holds, the disk tier on: nothing that was acknowledged may be lost.

Three ways to ask: back to back by an engine that never waits (`wait_s=0`: what finds no room is dropped, and the reply
says so), back to back by a caller that waits, and with every block of a call read at once after the reply. Back to back
only the last block of each call is read at once. All that was acknowledged is read once more at the end. The companion
is the rate at which the same bytes are copied by `np.copyto`.

    python bench/burst.py --out bench/results/burst.json
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
from common import arguments, finish, key, running_daemon, touched

from kvstore import BlockHeader, Dropped, KVStoreClient, Namespace
from kvstore.types import Hit, Stored

MIB = 1 << 20


def burst(kv: KVStoreClient, name: str, block: int, total: int, wait_s: float, read_all: bool) -> dict[str, Any]:
    """Store `total` bytes in blocks of `block`, 8 a call, and read what was acknowledged."""
    count, per_call = total // block, 8
    source, target = touched(per_call * block), touched(per_call * block)
    ends = range(0, per_call * block, block)
    buffers = [target[at : at + block] for at in ends]
    seen: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    acknowledged: list[bytes] = []
    store_s = copy_s = 0.0
    for first in range(0, count, per_call):
        keys = [key(first + i, name) for i in range(per_call)]
        for at, k in zip(ends, keys, strict=True):  # the bytes of a block tell which one it is
            source[at : at + 32] = np.frombuffer(k, dtype=np.uint8)
        items = [(k, source[at : at + block], BlockHeader()) for at, k in zip(ends, keys, strict=True)]
        began = time.perf_counter()
        outcomes = kv.put_many(items, wait_s=wait_s)
        store_s += time.perf_counter() - began
        stored = [k for k, outcome in zip(keys, outcomes, strict=True) if isinstance(outcome, Stored)]
        reasons.update(outcome.reason.value for outcome in outcomes if isinstance(outcome, Dropped))
        acknowledged += stored
        seen["unreadable_at_once"] += unreadable(kv, stored if read_all else stored[-1:], buffers)
        began = time.perf_counter()
        np.copyto(target, source)
        copy_s += time.perf_counter() - began
    for first in range(0, len(acknowledged), per_call):
        seen["lost_at_the_end"] += unreadable(kv, acknowledged[first : first + per_call], buffers)
    return {
        "offered": count,
        "acknowledged": len(acknowledged),
        "dropped": dict(reasons),
        "unreadable_at_once": seen["unreadable_at_once"],
        "lost_at_the_end": seen["lost_at_the_end"],
        "store_gib_s": total / store_s / (1 << 30),
        "memcpy_gib_s": total / copy_s / (1 << 30),
    }


def unreadable(kv: KVStoreClient, keys: list[bytes], buffers: list[np.ndarray]) -> int:
    """How many of the blocks are not there, or are not what was stored."""
    hits = kv.get_into(keys, buffers[: len(keys)], wait_s=20)
    right = [
        isinstance(hit, Hit) and bytes(buffer[:32]) == k and bool((buffer[32:] == 1).all())
        for k, hit, buffer in zip(keys, hits, buffers, strict=False)
    ]
    return len(keys) - sum(right)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--host-mib", type=int, default=256, help="budget of the host tier (default 256)")
    args = parser.parse_args()
    host = args.host_mib * MIB
    results: dict[str, Any] = {"host_bytes": host, "offered_bytes": 2 * host}
    rows: list[tuple[object, ...]] = []
    settings = {
        "host.bytes": str(host),
        "disk.bytes": str(8 * host),
        "host.ahead_bytes": str(host),
        "limits.lease_ttl_s": "60s",
    }
    for mib in (1, 4, 16):
        for way, wait_s, read_all in (("no wait", 0.0, False), ("waits", 10.0, False), ("all read", 0.0, True)):
            with (
                running_daemon(settings) as address,
                KVStoreClient(address, namespace=Namespace(model="bench"), timeout_s=60) as kv,
            ):
                seen = results[f"{mib}_mib_{way.replace(' ', '_')}"] = burst(
                    kv, way, mib * MIB, 2 * host, wait_s, read_all
                )
            drops = ", ".join(f"{n} {reason}" for reason, n in seen["dropped"].items()) or "none"
            rate = f"{seen['store_gib_s']:.2f}, {seen['memcpy_gib_s']:.2f}"
            counts = (seen["offered"], seen["acknowledged"], drops, seen["unreadable_at_once"], seen["lost_at_the_end"])
            rows.append((f"{mib} MiB, {way}", *counts, rate))
    header = ("blocks", "offered", "acknowledged", "dropped", "unreadable at once", "lost", "GiB/s: store, memcpy")
    finish(args, "burst", results, header, rows)


if __name__ == "__main__":
    main()
