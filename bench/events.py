"""What events cost and bring: an event with nobody listening and with somebody, a store with and without subscribers,
the time from a store to the event, catching up by snapshot, and a plan of a large batch.

    python bench/events.py --out bench/results/events.json
"""

from __future__ import annotations

import random
import threading
import time
from statistics import median
from typing import Any

from common import arguments, finish, key, percentile, running_daemon

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.client import Mirror
from kvstore.events import EventLog
from kvstore.plan import plan
from kvstore.types import BlockId, Scope, TierCode

NAMESPACE = Namespace(model="bench")
NBYTES = 4096


def emission(rounds: int) -> dict[str, Any]:
    """Nanoseconds of one event in the daemon, nobody listening and somebody."""
    block = BlockId(Scope("uid-0", key(0)), key(1))
    log = EventLog(65_536)
    seen: dict[str, list[float]] = {"silent_ns": [], "listening_ns": []}
    for name in ("silent_ns", "listening_ns"):
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(100_000):
                log.stored(TierCode.HOST, block, NBYTES, b"")
            seen[name].append((time.perf_counter() - began) * 1e4)
        log.of("uid-0")
    return {name: median(values) for name, values in seen.items()}


def stores(kv: KVStoreClient, kind: str, count: int) -> float:
    """Blocks a second, 64 a call."""
    data = bytes(NBYTES)
    began = time.perf_counter()
    for first in range(0, count, 64):
        kv.put_many([(key(n, kind), data, BlockHeader()) for n in range(first, first + 64)])
    return count / (time.perf_counter() - began)


def subscribed(address: str, kv: KVStoreClient, rounds: int) -> dict[str, Any]:
    """Stores a second without and with one subscriber, in turns; what he sees is right at the end."""
    alone: list[float] = []
    watched: list[float] = []
    for number in range(rounds):
        alone.append(stores(kv, f"alone{number}", 6400))
        mirror, stop = Mirror(), threading.Event()

        def follow(mirror: Mirror = mirror, stop: threading.Event = stop) -> None:
            with KVStoreClient(address).events() as stream:
                while not stop.is_set():
                    for event in stream.poll(0.2):
                        mirror.apply(event)
                while events := stream.poll():
                    for event in events:
                        mirror.apply(event)

        thread = threading.Thread(target=follow)
        thread.start()
        watched.append(stores(kv, f"watched{number}", 6400))
        stop.set()
        thread.join()
        held = kv.stats()["tiers"]["host"]["blocks"]
        if mirror.blocks != held:
            raise SystemExit(f"the mirror has {mirror.blocks} blocks, the daemon {held}")
        kv.drop(None)
    return {"stores_s": median(alone), "stores_s_with_subscriber": median(watched)}


def delay(kv: KVStoreClient, times: int) -> dict[str, float]:
    """Milliseconds from before a store of one block to the moment when a waiting subscriber has its event."""
    arrived: list[float] = []
    with kv.events() as stream:
        while stream.poll():
            pass
        for number in range(times):
            came: list[float] = []
            waiting = threading.Thread(target=lambda came=came: (stream.poll(5), came.append(time.perf_counter())))
            waiting.start()
            time.sleep(0.005)
            began = time.perf_counter()
            kv.put(key(number, "delay"), bytes(NBYTES))
            waiting.join()
            arrived.append(1e3 * (came[0] - began))
    return {"delay_ms_median": median(arrived), "delay_ms_p99": percentile(arrived, 0.99)}


def catching_up(kv: KVStoreClient, count: int) -> dict[str, float]:
    """Seconds for a snapshot of `count` blocks into a mirror."""
    stores(kv, "many", count)
    mirror = Mirror()
    began = time.perf_counter()
    with kv.events() as stream:
        while events := stream.poll():
            for event in events:
                mirror.apply(event)
    return {"snapshot_blocks": mirror.blocks, "snapshot_s": time.perf_counter() - began}


def planning(rounds: int) -> dict[str, float]:
    """Seconds to plan 10,000 prompts of 100 blocks, of which two thirds or so are shared."""
    chance = random.Random(7)
    batch: list[list[bytes]] = []
    for _ in range(10_000):
        system, document = chance.randrange(20), chance.randrange(200)
        batch.append([key(i, f"{system}") for i in range(25)])
        batch[-1] += [key(i, f"{system}/{document}") for i in range(25, 75)] + [chance.randbytes(32) for _ in range(25)]
    taken: list[float] = []
    made = plan(batch)
    for _ in range(rounds):
        began = time.perf_counter()
        made = plan(batch)
        taken.append(time.perf_counter() - began)
    return {"plan_s": median(taken), "plan_blocks": made.blocks, "plan_distinct": made.distinct, "plan_peak": made.peak}


def main() -> None:
    """Run all of it."""
    args = arguments(__doc__).parse_args()
    results: dict[str, Any] = emission(args.rounds)
    with (
        running_daemon({"host.bytes": "4GiB"}) as address,
        KVStoreClient(address, namespace=NAMESPACE, timeout_s=60) as kv,
    ):
        results |= subscribed(address, kv, args.rounds)
        results |= delay(kv, 200)
        results |= catching_up(kv, 100_000)
    results |= planning(min(3, args.rounds))
    rows = [(name, f"{value:,.4g}") for name, value in results.items()]
    finish(args, "events", results, ("figure", "value"), rows)


if __name__ == "__main__":
    main()
