"""Half an hour of everything at once: what the daemon holds afterwards is what it held before.

Worker processes do what clients do, badly behaved ones too: store, load and compare every byte, look up, prefetch, pin,
drop, reserve without commit, lease without release, leave in the middle; over the Unix socket and over TCP. One of them
is killed and replaced every few seconds. The daemon's private memory, descriptors, threads, leases, reservations and
sessions are read when everybody has left after a warm-up, and again at the end.

    python bench/soak.py --seconds 1800 --out bench/results/soak.json
    python bench/soak.py --small --warm-up 270 --seconds 270 --out bench/results/soak_small.json
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, finish, key, pid_of, running_daemon

from kvstore import BlockHeader, KVStoreClient, KVStoreError, Namespace
from kvstore.types import Miss

MIB = 1 << 20
LARGEST = 3 * MIB
BLOCKS = 4000
"""Different blocks that the workers use; more than host memory holds, about as much as the disk does."""
SMALLER = 16
"""With `--small` blocks are so much smaller, and there are as many times more: what the daemon remembers of blocks and
questions, which is bounded, fills within minutes instead of half an hour."""
TOKEN = "soak-token-of-this-bench"


def payload_of(number: int, nbytes: int) -> np.ndarray:
    """Bytes of a block: they tell at their beginning which block it is."""
    data = np.full(nbytes, number % 251, dtype=np.uint8)
    mark = np.frombuffer(key(number, "soak"), dtype=np.uint8)[: data.size]
    data[: mark.size] = mark
    return data


class Worker:
    """One client's work until it is told to stop; counts what it saw."""

    def __init__(self, address: str, seed: int, smaller: int) -> None:
        self.blocks, self.largest = BLOCKS * smaller, LARGEST // smaller
        self.rng = random.Random(seed)
        token = TOKEN if ":" in address else None
        namespaces = [Namespace(model="soak", tenant=f"t{i}") for i in range(4)]
        self.kv = KVStoreClient(address, namespace=namespaces[seed % 4], timeout_s=30, token=token)
        self.shared = ":" not in address
        self.seen: Counter[str] = Counter()
        self.abandoned: list[object] = []

    def size_of(self, number: int) -> int:
        """Payload bytes of a block; always the same for one block."""
        return 1 + number * 7919 % self.largest

    def step(self) -> None:
        """One action, chosen by chance."""
        first = (
            self.rng.randrange(self.blocks)
            if self.rng.random() < 0.3
            else int(self.rng.paretovariate(0.6)) % self.blocks
        )
        numbers = [(first + i) % self.blocks for i in range(self.rng.randrange(1, 9))]
        actions = [self.load] * 8 + [self.store] * 5 + [self.look] * 3 + [self.keep, self.forget, self.abandon]
        self.rng.choice(actions)(numbers)

    def load(self, numbers: list[int]) -> None:
        """Load some blocks and compare every byte."""
        keys = [key(n, "soak") for n in numbers]
        for number, found in zip(numbers, self.kv.get_many(keys, wait_s=5), strict=True):
            if isinstance(found, Miss):
                self.seen[f"missed {found.reason.value}"] += 1
                continue
            self.seen["loaded"] += 1
            right = np.array_equal(np.frombuffer(found.data, dtype=np.uint8), payload_of(number, self.size_of(number)))
            self.seen["wrong"] += not right

    def store(self, numbers: list[int]) -> None:
        """Store some blocks; now and then durably."""
        items = [(key(n, "soak"), payload_of(n, self.size_of(n)), BlockHeader(position=n)) for n in numbers]
        wait_s = self.rng.choice((0.0, 2.0))
        for outcome in self.kv.put_many(items, wait_s=wait_s, durable=self.rng.random() < 0.05):
            self.seen[type(outcome).__name__.lower()] += 1

    def look(self, numbers: list[int]) -> None:
        """Look up and prefetch."""
        keys = [key(n, "soak") for n in numbers]
        self.kv.lookup(keys)
        self.kv.prefetch(keys[-1:])

    def keep(self, numbers: list[int]) -> None:
        """Pin for a second."""
        self.kv.pin([key(n, "soak") for n in numbers], ttl_s=1.0)

    def forget(self, numbers: list[int]) -> None:
        """Drop a block, rarely all."""
        self.kv.drop(None if self.rng.random() < 0.02 else [key(numbers[0], "soak")])

    def abandon(self, numbers: list[int]) -> None:
        """Take a lease or a reservation and never end it; sometimes leave with it."""
        if self.rng.random() < 0.5:
            left = self.kv.lease([key(n, "soak") for n in numbers], wait_s=0.0)
        else:
            left = self.kv.reserve([(key(self.blocks + n, "soak"), self.size_of(n), BlockHeader()) for n in numbers])
        self.abandoned.append(left)  # or it would be ended with the object
        if self.rng.random() < 0.5:
            self.abandoned.clear()
            self.kv.close()  # the next call connects again


def work(address: str, seed: int, seconds: float, smaller: int) -> None:
    """Be a worker process; prints its counts at the end."""
    worker = Worker(address, seed, smaller)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            worker.step()
        except KVStoreError as error:
            worker.seen[f"error {error.code}"] += 1
        time.sleep(0.002)
    worker.kv.close()
    print(json.dumps(worker.seen))


def held(kv: KVStoreClient, pid: int) -> dict[str, float]:
    """What the daemon holds while nobody else is connected, after it has settled."""
    time.sleep(3)
    while kv.stats()["queue"]["blocks"]:
        time.sleep(0.1)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    stats = kv.stats()
    return {
        "private_mib": int(status["RssAnon"].split()[0]) / 1024,
        "shared_mib": int(status["RssShmem"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "leases": stats["leases"],
        "reservations": stats["reservations"],
        "sessions": stats["sessions"],
        "leased_bytes": stats["tiers"]["host"]["leased_bytes"],
        "writing_bytes": stats["tiers"]["host"]["writing_bytes"],
    }


def everything(
    addresses: list[str], http: str, pid: int, seconds: float, seed: int, options: list[str]
) -> dict[str, Any]:
    """Run workers for some time, killing one of them every few seconds, and scrape as a monitor would."""

    def start(number: int, left: float) -> subprocess.Popen[str]:
        where = addresses[number % len(addresses)]
        command = [sys.executable, __file__, "--worker", where, str(number), "--seconds", str(left), *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    rng, seen, deadline = random.Random(seed), Counter[str](), time.monotonic() + seconds
    running = [start(seed * 1000 + i, seconds) for i in range(4)]
    killed, scrapes, started, private = 0, 0, len(running), list[float]()
    while (left := deadline - time.monotonic()) > 8:
        time.sleep(min(5.0, left))
        for page in ("/metrics", "/"):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{http}{page}", timeout=5) as reply:
                scrapes += reply.status == 200 and bool(reply.read())
        victim = rng.randrange(len(running))
        running[victim].kill()
        running[victim].wait()
        killed += 1
        running[victim] = start(seed * 1000 + started, max(1.0, deadline - time.monotonic()))
        started += 1
        line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("RssAnon"))
        private.append(int(line.split()[1]) / 1024)
    for process in running:
        out, _ = process.communicate(timeout=120)
        seen.update(json.loads(out or "{}"))
    minutes = [round(value, 1) for value in private[::12]]
    return {"killed": killed, "scrapes": scrapes, "seen_by_survivors": dict(seen), "private_mib_by_minute": minutes}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=1800, help="how long it lasts (default 1800)")
    parser.add_argument("--warm-up", type=float, default=120, help="seconds before the baseline (default 120)")
    parser.add_argument("--seed", type=int, default=1, help="what the workers do, and when they are killed (default 1)")
    parser.add_argument("--worker", nargs=2, metavar=("ADDRESS", "SEED"), help="be a worker (used by the bench)")
    parser.add_argument("--small", action="store_true", help=f"blocks {SMALLER} times smaller, and as many times more")
    args = parser.parse_args()
    smaller = SMALLER if args.small else 1
    if args.worker:
        work(args.worker[0], int(args.worker[1]), args.seconds, smaller)
        return
    options = ["--small"] if args.small else []
    tcp, http = free_address(), free_address()
    settings = {
        "host.bytes": str((128 if args.small else 512) * MIB),
        "disk.bytes": str((2048 if args.small else 4096) * MIB),
        "listen.tcp": tcp,
        "listen.token": TOKEN,
        "http.address": http,
        "limits.lease_ttl_s": "20s",
        "events.ring": "4096",  # filled within the warm-up: its 65,536 entries would fill, slowly, all through the run
    }
    with tempfile.TemporaryDirectory(prefix="kvb-") as place, running_daemon(settings, Path(place)) as address:
        pid, addresses = pid_of(address), [address, address, address, f"tcp://{tcp}"]
        with KVStoreClient(address, namespace=Namespace(model="watch"), timeout_s=60) as kv:
            everything(addresses, http, pid, args.warm_up, 2 * args.seed - 1, options)
            before = held(kv, pid)
            during = everything(addresses, http, pid, args.seconds, 2 * args.seed, options)
            after = held(kv, pid)
    results = {"seconds": args.seconds, "before": before, "after": after, **during}
    rows = [(name, f"{before[name]:.10g}", f"{after[name]:.10g}") for name in before]
    finish(args, "soak", results, ("held by the daemon", "before", "after"), rows)


def free_address() -> str:
    """An address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


if __name__ == "__main__":
    main()
