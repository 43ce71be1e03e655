"""Control plane: round trips, cycles and whole prompts, against a bare echo of the same frames.

The limit is a Unix-socket echo on uvloop that reads a frame of the request's size and answers with one of the reply's
size, and a blocking client that does nothing but send and receive. Targets are those of the design, section 15.

    python bench/control.py --out bench/results/control.json
    python bench/control.py --one-core --out bench/results/control_one_core.json

Where a virtual machine is otherwise idle, waking a sleeping core costs more than a whole round trip: each side then
sleeps while the other works, and the echo, whose work is too short for that, does not show it. `--one-core` leaves that
out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
from common import arguments, cpu_seconds, finish, key, percentile, pid_of, running_daemon, spread, timed

from kvstore import KVStoreClient, Namespace
from kvstore.keys import PrefixChain, namespace_digest
from kvstore.types import BlockHeader
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m

NAMESPACE = Namespace(model="bench")
NS = namespace_digest(NAMESPACE)
PAYLOAD = b"x" * 16384

_ECHO = '''
import asyncio, struct, sys, uvloop

class Echo(asyncio.BufferedProtocol):
    """Frames of u32 request bytes, u32 reply bytes, and the rest of the request."""
    def connection_made(self, transport):
        self.transport, self.buffer, self.have = transport, bytearray(1 << 20), 0
    def get_buffer(self, hint):
        return memoryview(self.buffer)[self.have:]
    def buffer_updated(self, n):
        self.have += n
        if self.have >= 8:
            want, reply = struct.unpack_from("<II", self.buffer)
            if self.have >= want:
                self.have = 0
                self.transport.write(bytes(reply))

async def main():
    server = await asyncio.get_running_loop().create_unix_server(Echo, sys.argv[1])
    print("ready", flush=True)
    await server.serve_forever()

uvloop.run(main())
'''


class Echo:
    """A blocking client of the echo."""

    def __init__(self, path: str, pid: int) -> None:
        self.pid = pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._buffer = bytearray(1 << 20)

    def call(self, request: int, reply: int) -> Callable[[], None]:
        """One round trip of these sizes, made ready."""
        data = struct.pack("<II", request, reply) + bytes(request - 8)
        sock, view = self._socket, memoryview(self._buffer)

        def trip() -> None:
            sock.sendall(data)
            left = reply
            while left:
                left -= sock.recv_into(view)

        return trip


@contextlib.contextmanager
def running_echo() -> Iterator[Echo]:
    """The limit."""
    with tempfile.TemporaryDirectory(prefix="kvb-") as root:
        path = str(Path(root, "e"))
        process = subprocess.Popen([sys.executable, "-c", _ECHO, path], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield Echo(path, process.pid)
        finally:
            process.kill()
            process.wait()


def lookup_sizes(keys: int) -> tuple[int, int]:
    """Bytes of the frames of a lookup and its answer."""
    asked = frame.pack(envelope.encode_request(1, "lookup", m.Lookup(NS, bytes(32 * keys), True)))
    answer = frame.pack(envelope.encode_reply(1, m.LookupReply(bytes(keys))))
    return len(asked), len(answer)


def lease_sizes(keys: int) -> tuple[int, int]:
    """Bytes of the frames of a lease, with its release, and its answer."""
    asked = frame.pack(envelope.encode_request(1, "lease", m.Lease(NS, bytes(32 * keys), 30.0, False)))
    release = frame.pack(envelope.encode_notice("release", m.Release([1000])))
    grants = [m.Grant(i, 16384, 1, [(1, i * 16384, 16384)], b"") for i in range(keys)]
    answer = frame.pack(envelope.encode_reply(1, m.LeaseReply(1000, 30.0, grants, [], 0)))
    return len(asked) + len(release), len(answer)


def many(function: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of many calls."""
    clock, out = time.perf_counter, []
    for _ in range(count):
        began = clock()
        function()
        out.append(clock() - began)
    return out


def alternate(contestants: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, dict[str, float]]:
    """p50 and p99 of each contestant: the median over rounds in which all took their turn."""
    seen: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for function in contestants.values():
        many(function, max(1, count // 5))
    for _ in range(rounds):
        for name, function in contestants.items():
            seen[name].append(many(function, count))
    return {
        name: {
            "p50_us": 1e6 * median(percentile(times, 0.5) for times in turns),
            "p99_us": 1e6 * median(percentile(times, 0.99) for times in turns),
            "best_p50_us": 1e6 * min(percentile(times, 0.5) for times in turns),
            "rounds": rounds,
            "calls_per_round": count,
        }
        for name, turns in seen.items()
    }


def throughput(
    contestants: dict[str, Callable[[], object]], rounds: int, count: int, servers: list[int]
) -> dict[str, dict[str, float]]:
    """Calls a second of each contestant, and the processor time of one, of client and server: what is left of the wall
    time went to waking each other, and to others on the machine."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    everyone = [os.getpid(), *servers]
    for _ in range(rounds + 1):
        for name, function in contestants.items():
            busy, began = sum(map(cpu_seconds, everyone)), time.perf_counter()
            for _ in range(count):
                function()
            wall = time.perf_counter() - began
            seen[name].append((count / wall, 1e6 * (sum(map(cpu_seconds, everyone)) - busy) / count))
    return {
        name: spread([rate for rate, _ in turns[1:]]) | {"cpu_us": median(cpu for _, cpu in turns[1:])}
        for name, turns in seen.items()
    }


def prompts(kv: KVStoreClient, echo: Echo, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds from a prompt's tokens to the answer that all of it is there."""
    array = np.random.default_rng(tokens).integers(0, 128_000, tokens, dtype=np.int32)
    as_list = array.tolist()
    keys = kv.keys(array)
    kv.put_many([(k, PAYLOAD, BlockHeader()) for k in keys])
    grown = PrefixChain(NAMESPACE)
    grown.extend(array[:-256])
    trip = echo.call(*lookup_sizes(len(keys)))
    raw = memoryview(array).cast("B")

    def whole(source: object) -> None:
        found = kv.lookup(kv.keys(source))  # type: ignore[arg-type]
        assert len(found) == len(keys), (len(found), len(keys))

    def grew() -> None:
        chain = PrefixChain(NAMESPACE)
        chain.keys, chain._tail = list(grown.keys), grown._tail
        began = time.perf_counter()
        chain.extend(array[-256:])
        assert len(kv.lookup(chain.keys)) == len(keys)
        turns["grew by 256"].append(time.perf_counter() - began)

    def hash_only() -> None:
        for start in range(0, len(raw), 1024):
            hashlib.sha256(raw[start : start + 1024]).digest()

    turns: dict[str, list[float]] = {
        name: [] for name in ("int32 array", "list", "grew by 256", "sha256 alone", "echo")
    }
    for _ in range(5):
        whole(array)
        whole(as_list)
    for _ in range(rounds):
        for _ in range(5):
            turns["int32 array"].append(timed(whole, array))
            turns["list"].append(timed(whole, as_list))
            grew()
            turns["sha256 alone"].append(timed(hash_only))
            turns["echo"].append(timed(trip))
    return {name: spread(values) for name, values in turns.items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--one-core", action="store_true", help="client, daemon and echo share one core")
    args = parser.parse_args()
    if args.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results: dict[str, object] = {}
    rows: list[tuple[object, ...]] = []
    settings = {"host.bytes": "128MiB", "host.slab_bytes": "16MiB"}
    with running_daemon(settings) as address, running_echo() as echo, KVStoreClient(address, namespace=NAMESPACE) as kv:
        keys = [key(i) for i in range(64)]
        kv.put_many([(k, PAYLOAD, BlockHeader()) for k in keys])
        trips = alternate({"kvstore": lambda: kv.lookup(keys), "echo": echo.call(*lookup_sizes(64))}, args.rounds, 1000)
        results["lookup_64_keys"] = trips
        ratio = trips["kvstore"]["p50_us"] / trips["echo"]["p50_us"]
        for name, seen in trips.items():
            figure = f"p50 {seen['p50_us']:.1f} µs, p99 {seen['p99_us']:.0f} µs"
            rows.append(("lookup of 64 keys", name, figure, f"{ratio:.2f}x echo" if name == "kvstore" else "", ""))

        prompt = keys[:32]

        def lease_cycle() -> None:
            kv.lease(prompt).release()

        def full_cycle() -> None:
            kv.lookup(prompt)
            kv.lease(prompt).release()

        lease_trip, lookup_trip = echo.call(*lease_sizes(32)), echo.call(*lookup_sizes(32))

        def echo_cycle() -> None:
            lookup_trip()
            lease_trip()

        contestants = {
            "lease + release": lease_cycle,
            "lookup + lease + release": full_cycle,
            "echo of lookup + lease + release": echo_cycle,
        }
        rates = throughput(contestants, args.rounds, 1000, [pid_of(address), echo.pid])
        results["cycles_8k_tokens"] = rates
        for name, rate in rates.items():
            verdict = "" if "echo" in name else "ok" if rate["median"] >= 5000 else "short"
            share = rate["median"] / rates["echo of lookup + lease + release"]["median"]
            rows.append(
                (
                    "cycles at 8k tokens",
                    name,
                    f"{rate['median']:,.0f}/s, cpu {rate['cpu_us']:.0f} µs",
                    f"{share:.2f} of echo",
                    verdict,
                )
            )

        for tokens, array_ms, list_ms in ((8192, 0.17, 0.35), (131_072, 1.0, 3.5)):
            seen = prompts(kv, echo, tokens, args.rounds)
            results[f"prompt_{tokens}"] = seen
            limits = {"int32 array": array_ms, "list": list_ms}
            for name, value in seen.items():
                limit = limits.get(name)
                target = f"<= {limit} ms" if limit else ""
                verdict = "" if limit is None else "ok" if 1e3 * value["median"] <= limit else "short"
                figure = f"{1e3 * value['median']:.3f} ms (best {1e3 * value['min']:.3f})"
                rows.append((f"prompt of {tokens:,} tokens", name, figure, target, verdict))
    finish(args, "control", results, ("what", "who", "figure", "against", "target"), rows)


if __name__ == "__main__":
    main()
