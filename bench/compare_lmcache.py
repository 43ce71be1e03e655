"""The same store, load and lookup work on kvstore and on LMCache's own server, in turns.

LMCache is driven by its own bench client (`lmcache bench server`, shared memory, the fastest of its CPU paths),
kvstore by the same work: a request of 1,024 tokens of an 8B-shaped model (128 MiB in 4 chunks) is looked up, stored out
of a paged KV cache of 32 layers, looked up again and loaded back into the pages. Then prompts of 8,192 and 131,072
tokens with a toy KV, of which only the lookup counts, hashing included; and 16 requests back to back into 512 MiB, of
which every one that was acknowledged must be readable at once.

LMCache needs an environment of its own:

    python -m venv lmcache && lmcache/bin/pip install torch==2.13.0 && lmcache/bin/pip install lmcache==0.5.6
    python bench/compare_lmcache.py --lmcache-python lmcache/bin/python --out bench/results/compare_lmcache.json
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import arguments, finish, running_daemon, timed

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.types import Stored, TierCode

MIB = 1 << 20
LAYERS, PAGES, PAGE_TOKENS, HEADS, DIM = 32, 256, 16, 8, 128
CHUNK_TOKENS = 256
TOKENS = 1024
MODEL = f"(2,{PAGES},{PAGE_TOKENS},{HEADS},{DIM}):float16:{LAYERS}"
BLOCK_BYTES = LAYERS * 2 * CHUNK_TOKENS * HEADS * DIM * 2
TOY = "(2,{pages},16,1,8):float16:1"
LOOKUPS = (8192, 131_072)
NAMESPACE = Namespace(model="bench", block_tokens=CHUNK_TOKENS)
TOY_BYTES = 2 * CHUNK_TOKENS * 8 * 2

INSTALL = """LMCache is not installed in {python}. An environment of its own (1.9 GB, some minutes):
    python -m venv lmcache && lmcache/bin/pip install torch==2.13.0 && lmcache/bin/pip install lmcache==0.5.6
    python bench/compare_lmcache.py --lmcache-python lmcache/bin/python"""


# -- LMCache -----------------------------------------------------------------------------------------------------------


class LMCache:
    """Its server, and its own bench client."""

    def __init__(self, python: Path, gb: float) -> None:
        self._tool = str(python.parent / "lmcache")
        self._env = {
            **os.environ,
            "LMCACHE_TRACK_USAGE": "false",
            "LMCACHE_DISABLE_BANNER": "1",
            "LMCACHE_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": "1",  # its copies are many times slower on a shared machine otherwise
        }
        self._rpc, self._http = _free_port(), _free_port()
        name = f"kvstore-bench-{os.getpid()}-{self._rpc}"
        command = [
            *(self._tool, "server", "--host", "127.0.0.1", "--port", str(self._rpc)),
            *("--http-host", "127.0.0.1", "--http-port", str(self._http), "--l1-size-gb", str(gb), "--no-l1-use-lazy"),
            *(
                "--eviction-policy",
                "LRU",
                "--supported-transfer-mode",
                "auto",
                "--shm-name",
                name,
            ),
        ]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=self._env, stdout=quiet, stderr=quiet)
        self._next = 0
        until = time.monotonic() + 120
        while not self._healthy():
            if time.monotonic() > until or self._process.poll() is not None:
                self.close()
                raise SystemExit("LMCache's server did not start.")
            time.sleep(0.5)

    def _healthy(self) -> bool:
        try:
            return b"healthy" in self._get("/healthcheck")
        except OSError:
            return False

    def _get(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self._http}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def bench(self, shape: str, tokens: int, requests: int) -> dict[str, Any]:
        """Milliseconds at the median by operation, and how many requests came back right."""
        self._get("/cache/clear", "POST")
        with tempfile.TemporaryDirectory() as place:
            out = Path(place, "r.json")
            command = [
                *(self._tool, "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{self._rpc}", "--mode", "cpu"),
                *("--url", f"http://127.0.0.1:{self._http}", "--transfer-mode", "engine_driven"),
                *("--num-tokens", str(tokens), "--kvcache-shape-spec", shape, "--interval", "0"),
                *("--start", str(self._next), "--end", str(self._next + requests)),
                *("--format", "json", "--output", str(out), "--quiet"),
            ]
            done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=600)
            if not out.exists():
                raise SystemExit(f"LMCache's bench failed:\n{done.stderr[-2000:]}")
            seen = json.loads(out.read_text())["metrics"]
        self._next += requests
        figures = {name: seen[name][f"{name}_p50"] for name in seen if name.startswith(("cold_", "warm_"))}
        return {**figures, "requests": requests, "right": seen["results"]["checksum_ok"]}

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# -- kvstore -----------------------------------------------------------------------------------------------------------


class Engine:
    """An engine's paged KV cache, and what a connector does with it."""

    def __init__(self, kv: KVStoreClient) -> None:
        self._kv = kv
        rng = np.random.default_rng(0)
        shape = (LAYERS, 2, PAGES, PAGE_TOKENS, HEADS, DIM)
        self.cache = rng.integers(0, 1 << 15, shape, dtype=np.uint16)
        self._rng = rng

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody has seen."""
        return self._rng.integers(0, 128_000, tokens).tolist()

    def pages(self) -> np.ndarray:
        """Where a request's tokens lie: some pages, in any order."""
        return self._rng.permutation(PAGES)[: TOKENS // PAGE_TOKENS]

    def lookup(self, prompt: list[int]) -> list[TierCode]:
        """From the token ids on."""
        return self._kv.lookup(self._kv.keys(prompt))

    def store(self, keys: list[bytes], pages: np.ndarray) -> bool:
        """Gather the pages of every chunk into its room; whether all were acknowledged."""
        offers = [(key, BLOCK_BYTES, BlockHeader()) for key in keys]
        with self._kv.reserve(offers, wait_s=1.0) as reservation:
            for room, mine in zip(reservation.blocks, np.split(pages, len(keys)), strict=True):
                whole = room.array.view(np.uint16).reshape(LAYERS, 2, len(mine), PAGE_TOKENS, HEADS, DIM)  # type: ignore[union-attr]
                for layer in range(LAYERS):
                    np.take(self.cache[layer], mine, axis=1, out=whole[layer], mode="clip")
            return all(isinstance(outcome, Stored) for outcome in reservation.commit())

    def load(self, keys: list[bytes], pages: np.ndarray) -> bool:
        """Scatter every chunk into its pages; whether all were there."""
        with self._kv.lease(keys) as lease:
            for block, mine in zip(lease.blocks, np.split(pages, len(keys)), strict=True):
                if not block:
                    return False
                whole = block.array.view(np.uint16).reshape(LAYERS, 2, len(mine), PAGE_TOKENS, HEADS, DIM)  # type: ignore[union-attr]
                for layer in range(LAYERS):
                    self.cache[layer][:, mine] = whole[layer]
            return lease.valid()

    def request(self) -> dict[str, float]:
        """One request as LMCache's bench makes it, in milliseconds."""
        prompt, pages = self.prompt(TOKENS), self.pages()
        keys = self._kv.keys(prompt)
        cold = timed(self.lookup, prompt)
        before = self.cache[:, :, pages].copy()
        store = timed(self.store, keys, pages)
        warm = timed(self.lookup, prompt)
        self.cache[:, :, pages] = 0
        load = timed(self.load, keys, pages)
        right = np.array_equal(before, self.cache[:, :, pages])
        times = {"cold_lookup": cold, "cold_store": store, "warm_lookup": warm, "warm_retrieve": load}
        return {name: 1e3 * seconds for name, seconds in times.items()} | {"right": right}

    def look(self, tokens: int) -> dict[str, float]:
        """Lookups of a prompt before and after it is there."""
        prompt = self.prompt(tokens)
        cold = timed(self.lookup, prompt)
        items = [(key, bytes(TOY_BYTES), BlockHeader()) for key in self._kv.keys(prompt)]
        self._kv.put_many(items)
        warm = timed(self.lookup, prompt)
        right = len(self.lookup(prompt)) == tokens // CHUNK_TOKENS
        return {"cold_lookup": 1e3 * cold, "warm_lookup": 1e3 * warm, "right": right}


def medians(made: Callable[[], dict[str, float]], requests: int) -> dict[str, Any]:
    """The same figures as `LMCache.bench`."""
    seen = [made() for _ in range(requests)]
    figures = {name: median(one[name] for one in seen) for name in seen[0] if name != "right"}
    return {**figures, "requests": requests, "right": sum(bool(one["right"]) for one in seen)}


# -- the race ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def both(python: Path, gb: float) -> Iterator[tuple[LMCache, Engine, KVStoreClient]]:
    """The two servers with as much memory each; the one that is not asked is idle."""
    settings = {"host.bytes": f"{int(gb * 1024)}MiB", "host.ahead_bytes": f"{int(gb * 1024)}MiB"}
    with contextlib.ExitStack() as stack:
        lmcache = LMCache(python, gb)
        stack.callback(lmcache.close)
        address = stack.enter_context(running_daemon(settings))
        kv = stack.enter_context(KVStoreClient(address, namespace=NAMESPACE, timeout_s=30))
        yield lmcache, Engine(kv), kv


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lmcache-python", type=Path, default=Path("lmcache/bin/python"), help="of its environment")
    parser.add_argument("--requests", type=int, default=6, help="requests of a round (default 6)")
    parser.set_defaults(rounds=7)
    args = parser.parse_args()
    python = args.lmcache_python
    probe = [str(python), "-c", "import importlib.metadata as m; print(m.version('lmcache'))"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode:
        raise SystemExit(INSTALL.format(python=python))
    version = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()

    work: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    with both(python, 2) as (lmcache, engine, kv):
        for _ in range(args.rounds):
            theirs, ours = work.setdefault("128 MiB in 4 chunks", ([], []))
            theirs.append(lmcache.bench(MODEL, TOKENS, args.requests))
            ours.append(medians(engine.request, args.requests))
            kv.drop()
        for _ in range(args.rounds):
            for tokens in LOOKUPS:
                theirs, ours = work.setdefault(f"prompt of {tokens:,} tokens", ([], []))
                theirs.append(lmcache.bench(TOY.format(pages=tokens // 16), tokens, args.requests))
                ours.append(medians(lambda n=tokens: engine.look(n), args.requests))
                kv.drop()
    with both(python, 0.5) as (lmcache, engine, kv):
        theirs, ours = work.setdefault("burst of 16 x 128 MiB into 512 MiB", ([], []))
        theirs.append(lmcache.bench(MODEL, TOKENS, 16))
        ours.append(medians(engine.request, 16))

    results: dict[str, Any] = {"lmcache": version}
    rows: list[tuple[object, ...]] = []
    for name, (theirs, ours) in work.items():
        results[name] = {"lmcache": theirs, "kvstore": ours}
        for figure in ours[0]:
            if figure in ("requests", "right") or ("prompt" in name and "lookup" not in figure):
                continue
            them, us = (median(one[figure] for one in seen) for seen in (theirs, ours))
            rows.append((name, figure, f"{us:.2f} ms", f"{them:.2f} ms", f"{them / us:.1f}x"))
        right = [f"{sum(o['right'] for o in seen)} of {sum(o['requests'] for o in seen)}" for seen in (ours, theirs)]
        rows.append((name, "read back right", *right, ""))
    finish(args, "compare_lmcache", results, ("work", "what", "kvstore", f"LMCache {version}", "faster"), rows)


if __name__ == "__main__":
    main()
