"""Stores at four times what the disk takes, for minutes: budgets hold at every sample, drops listed, loads unharmed.

A writer in a process of its own offers new blocks at a fixed rate and never waits. Beside it two kinds of load run at a
fixed pace, first with the writer silent (idle), then under it: *hot* blocks that stay in host memory, and *cold* ones
that come from disk each time (a set larger than host memory, pinned on disk so that the flood does not evict it).
Last they run beside a process that copies as many bytes a second within its own memory as the writer had handed over:
what that costs is the machine's, not the daemon's.
Memory is sampled as what the kernel charges the daemon for shared pages, disk as the blocks its directory occupies,
both against the budget.

    python bench/overload.py --seconds 600 --out bench/results/overload.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, finish, key, percentile, pid_of, running_daemon, touched

from kvstore import BlockHeader, Dropped, KVStoreClient, Namespace
from kvstore.types import Hit, Stored

MIB = 1 << 20
BLOCK = 2 * MIB
PER_LOAD = 4
PACE_S = 0.05
NAMESPACE = Namespace(model="bench")
TARGET = 4.0
"""Stores offered, as a multiple of what the disk took when it was asked alone."""
SITUATIONS = ("idle", "beside_copies", "loaded")


def fill(kv: KVStoreClient, keys: list[bytes], wait_s: float) -> int:
    """Store a block under each key; how many were stored."""
    source = touched(BLOCK)
    stored = 0
    for k in keys:
        source[:32] = np.frombuffer(k, dtype=np.uint8)
        stored += isinstance(kv.put(k, source, BlockHeader(), wait_s=wait_s), Stored)
    return stored


def drained(kv: KVStoreClient) -> None:
    """Wait until nothing is on its way to the disk."""
    while kv.stats()["queue"]["blocks"]:
        time.sleep(0.02)


def disk_rate(kv: KVStoreClient, seconds: float) -> float:
    """Bytes a second that the disk tier takes when stores wait for it and nothing else runs."""
    asked, stored, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        stored += fill(kv, [key(asked + i, "rate") for i in range(16)], wait_s=30)
        asked += 16
    drained(kv)
    return stored * BLOCK / (time.perf_counter() - began)


def write_for(address: str, rate: float, seconds: float) -> dict[str, Any]:
    """Offer blocks at a rate and never wait; what became of them. Runs in a process of its own."""
    outcomes: Counter[str] = Counter()
    source, per_call = touched(8 * BLOCK), 8
    with KVStoreClient(address, namespace=NAMESPACE, timeout_s=60) as kv:
        began, offered = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            if offered * BLOCK > rate * now:
                time.sleep(offered * BLOCK / rate - now)
                continue
            keys = [key(offered + i, "flood") for i in range(per_call)]
            items = [(k, source[i * BLOCK : (i + 1) * BLOCK], BlockHeader()) for i, k in enumerate(keys)]
            for outcome in kv.put_many(items, wait_s=0.0):
                outcomes[outcome.reason.value if isinstance(outcome, Dropped) else type(outcome).__name__.lower()] += 1
            offered += per_call
        took = time.perf_counter() - began
    return {"offered": offered, "outcomes": dict(outcomes), "offered_mib_s": offered * BLOCK / MIB / took}


def copy_for(rate: float, seconds: float) -> dict[str, Any]:
    """Copy blocks within own memory at a rate. Runs in a process of its own."""
    source, target = touched(8 * BLOCK), touched(8 * BLOCK)
    began, copied = time.perf_counter(), 0
    while (now := time.perf_counter() - began) < seconds:
        if copied > rate * now:
            time.sleep(copied / rate - now)
            continue
        target[:] = source
        copied += target.nbytes
    return {"copied_mib_s": copied / MIB / seconds}


class Sampler(threading.Thread):
    """Watch the daemon's memory and disk against their budgets."""

    def __init__(self, address: str, disk: Path, budgets: dict[str, int]) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid_of(address)}/status")
        self._disk, self._budgets, self._over = disk, budgets, threading.Event()
        self.peak: dict[str, int] = {"host": 0, "disk": 0, "private": 0}
        self.samples = 0
        self.over_budget = 0

    def run(self) -> None:
        while not self._over.wait(1.0):
            self.sample()

    def sample(self) -> None:
        """One look from outside: the kernel's word, not the daemon's."""
        lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
        seen = {
            "host": int(lines["RssShmem"].split()[0]) * 1024,
            "private": int(lines["RssAnon"].split()[0]) * 1024,
            "disk": occupied(self._disk),
        }
        self.samples += 1
        self.peak = {name: max(self.peak[name], n) for name, n in seen.items()}
        self.over_budget += any(seen[name] > budget for name, budget in self._budgets.items())

    def stop(self) -> None:
        """End it."""
        self._over.set()
        self.join()


def occupied(directory: Path) -> int:
    """Bytes that a directory takes on its filesystem. Files may vanish while it looks."""
    out = subprocess.run(["du", "-s", "-B1", str(directory)], capture_output=True, text=True, check=False)
    return int(out.stdout.split()[0])


def loads(kv: KVStoreClient, hot: list[bytes], cold: list[bytes], seconds: float) -> dict[str, Any]:
    """Load hot and cold blocks in turn at a fixed pace; latencies in ms, and every byte compared."""
    target = touched(PER_LOAD * BLOCK)
    buffers = [target[i * BLOCK : (i + 1) * BLOCK] for i in range(PER_LOAD)]
    took: dict[str, list[float]] = {"hot": [], "cold": []}
    missed: Counter[str] = Counter()
    wrong = turn = 0
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        for name, pool in (("hot", hot), ("cold", cold)):
            at = turn * PER_LOAD % len(pool)
            keys = pool[at : at + PER_LOAD]
            start = time.perf_counter()
            found = kv.get_into(keys, buffers, wait_s=30)
            took[name].append((time.perf_counter() - start) * 1e3)
            for k, hit, buffer in zip(keys, found, buffers, strict=True):
                if not isinstance(hit, Hit):
                    missed[f"{name}: {hit.reason.value}"] += 1
                elif bytes(buffer[:32]) != k or not (buffer[32:] == 1).all():
                    wrong += 1
        turn += 1
        time.sleep(max(0.0, turn * PACE_S - now))
    return {
        "loads": {name: len(v) for name, v in took.items()},
        "p50_ms": {name: percentile(v, 0.50) for name, v in took.items()},
        "p99_ms": {name: percentile(v, 0.99) for name, v in took.items()},
        "missed": dict(missed),
        "wrong_blocks": wrong,
    }


def beside(role: list[str], seconds: float, work: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Run `work` beside a process of this file in some role; what that says of itself, and what `work` returned."""
    command = [sys.executable, __file__, *role, "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        time.sleep(0.5)
        result = work()
        out, _ = other.communicate(timeout=seconds + 120)
    return json.loads(out), result


def ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How much longer the slowest percent takes."""
    return {name: one["p99_ms"][name] / other["p99_ms"][name] for name in ("hot", "cold")}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long the overload lasts (default 600)")
    parser.add_argument("--idle-seconds", type=float, default=60, help="how long loads are measured idle (default 60)")
    parser.add_argument("--host-mib", type=int, default=1024, help="budget of the host tier (default 1024)")
    parser.add_argument("--writer", nargs=2, metavar=("ADDRESS", "RATE"), help="be the writer (used by the bench)")
    parser.add_argument("--copier", type=float, metavar="RATE", help="be the copier (used by the bench)")
    args = parser.parse_args()
    if args.writer:
        print(json.dumps(write_for(args.writer[0], float(args.writer[1]), args.seconds)))
        return
    if args.copier:
        print(json.dumps(copy_for(args.copier, args.seconds)))
        return
    host, disk = args.host_mib * MIB, 6 * args.host_mib * MIB
    with tempfile.TemporaryDirectory(prefix="kvb-") as place:
        settings = {"host.bytes": str(host), "disk.bytes": str(disk), "host.ahead_bytes": str(host)}
        with (
            running_daemon(settings, Path(place)) as address,
            KVStoreClient(address, namespace=NAMESPACE, timeout_s=60) as kv,
        ):
            results = measure(kv, address, Path(place) / "disk", {"host": host, "disk": disk}, args)
    rows: list[tuple[object, ...]] = []
    for name in ("hot", "cold"):
        ms = [f"{results[s]['p50_ms'][name]:.2f} / {results[s]['p99_ms'][name]:.2f}" for s in SITUATIONS]
        ratios = f"{results['p99_ratio'][name]:.2f}, {results['p99_ratio_to_copies'][name]:.2f}"
        rows.append((f"{name} loads, p50 / p99 ms", *ms, ratios))
    missed = [sum(results[s]["missed"].values()) for s in SITUATIONS]
    rows.append(("blocks missed", *missed, ""))
    rows.append(("host, peak of budget", "", "", f"{results['peak_share']['host']:.3f}", ""))
    rows.append(("disk, peak of budget", "", "", f"{results['peak_share']['disk']:.3f}", ""))
    rows.append(("samples over budget", "", "", f"{results['over_budget']} of {results['samples']}", ""))
    finish(args, "overload", results, ("", "idle", "beside copies", "overload", "p99 to idle, to copies"), rows)


def measure(kv: KVStoreClient, address: str, disk: Path, budgets: dict[str, int], args: Any) -> dict[str, Any]:
    """The whole run against one daemon."""
    sampler = Sampler(address, disk, budgets)
    sampler.start()
    cold = [key(i, "cold") for i in range(int(1.25 * budgets["host"]) // BLOCK // PER_LOAD * PER_LOAD)]
    hot = [key(i, "hot") for i in range(8 * PER_LOAD)]
    fill(kv, cold, wait_s=30)
    # Enough behind them that they have left host memory: a pin would keep them in it, too.
    fill(kv, [key(i, "cover") for i in range(budgets["host"] // BLOCK)], wait_s=30)
    drained(kv)
    kv.pin(cold, ttl_s=4 * args.seconds + 600)
    rate = disk_rate(kv, 10)
    fill(kv, hot, wait_s=30)
    drained(kv)
    loads(kv, hot, cold, 5)
    idle = loads(kv, hot, cold, args.idle_seconds)
    writer = ["--writer", address, str(TARGET * rate)]
    flood, loaded = beside(writer, args.seconds, lambda: loads(kv, hot, cold, max(1.0, args.seconds - 5)))
    handed = flood["outcomes"].get("stored", 0) * BLOCK / args.seconds
    drained(kv)
    fill(kv, hot, wait_s=30)  # the flood outlasted the loads, and what nobody asks for meanwhile may leave
    drained(kv)
    loads(kv, hot, cold, 2)  # from the disk, if it had left memory only
    short = args.idle_seconds
    copier, copying = beside(["--copier", str(handed)], short, lambda: loads(kv, hot, cold, max(1.0, short - 5)))
    stats = kv.stats()
    sampler.stop()
    return {
        "block_bytes": BLOCK,
        "budget": budgets,
        "disk_takes_mib_s": rate / MIB,
        "flood": flood,
        "dropped_as_counted_by_the_daemon": stats["not_stored"],
        "seconds": args.seconds,
        "idle": idle,
        "copier": copier,
        "beside_copies": copying,
        "loaded": loaded,
        "p99_ratio": ratio(loaded, idle),
        "p99_ratio_to_copies": ratio(loaded, copying),
        "samples": sampler.samples,
        "over_budget": sampler.over_budget,
        "peak": sampler.peak,
        "peak_share": {name: sampler.peak[name] / budget for name, budget in budgets.items()},
    }


if __name__ == "__main__":
    main()
