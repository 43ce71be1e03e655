"""Disk tier: put and get of blocks against raw direct I/O of the same sizes, and the time to ready with 100,000 blocks.

Two limits, measured in turns with the tier in the same run, with the same number of threads and page-aligned memory:
*fresh* writes each block to a new file, as the tier must, and reads each from its own file; *one file* overwrites and
reads one file that is there already, which spares the file system all its work. The tier's share of *fresh* is what its
own code costs; what *fresh* lacks to *one file* is the price of one file a block on this file system.

    python bench/disk.py --out bench/results/disk.json
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop
from common import arguments, finish, spread

from kvstore.disk.format import Shape, block_name
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockHeader, BlockId, Hit, Scope, Stored

MIB, GIB = 1 << 20, 1 << 30
SCOPE = Scope("bench", hashlib.sha256(b"bench").digest())
HEADER = BlockHeader(parent=bytes(32), tokens=bytes(1024))
AT_ONCE = 2
"""Calls in flight for each I/O thread, as the tier chain has."""


def block(number: int) -> BlockId:
    return BlockId(SCOPE, hashlib.sha256(b"%d" % number).digest())


class Memory:
    """Page-aligned buffers that are used in turn, as an arena's extents are."""

    def __init__(self, nbytes: int, count: int) -> None:
        self._map = mmap.mmap(-1, nbytes * count)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(self._map)
        whole[:] = np.random.default_rng(1).bytes(nbytes * count)
        self.views = [whole[i * nbytes : (i + 1) * nbytes] for i in range(count)]


class Raw:
    """The least that must be done: the same system calls on the same memory, nothing else."""

    def __init__(self, place: Path, nbytes: int, count: int, threads: int, memory: Memory) -> None:
        self.place, self.nbytes, self.count, self.memory = place, nbytes, count, memory
        self.pool = ThreadPoolExecutor(threads)
        place.mkdir()
        self.one = os.open(place / "one", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        for number in range(count):
            os.pwritev(self.one, [self._view(number)], number * nbytes)

    def _view(self, number: int) -> memoryview:
        return self.memory.views[number % len(self.memory.views)]

    def _all(self, function: Callable[[int], None]) -> float:
        began = time.perf_counter()
        list(self.pool.map(function, range(self.count)))
        return time.perf_counter() - began

    def _write(self, number: int) -> None:
        fd = os.open(self.place / f"{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        os.pwritev(fd, [self._view(number)], 0)
        os.close(fd)

    def _write_durable(self, number: int) -> None:
        fd = os.open(self.place / f"{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        os.pwritev(fd, [self._view(number)], 0)
        os.fdatasync(fd)
        os.close(fd)

    def _read(self, number: int) -> None:
        fd = os.open(self.place / f"{number}", os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [self._view(number)], 0)
        os.close(fd)

    def _replace(self, number: int) -> None:
        os.unlink(self.place / f"{number}")
        self._write(number)

    def write_fresh(self) -> float:
        return self._all(self._write)

    def replace_fresh(self) -> float:
        return self._all(self._replace)

    def read_fresh(self) -> float:
        return self._all(self._read)

    def write_durable(self) -> float:
        return self._all(self._write_durable)

    def unlink(self) -> None:
        for number in range(self.count):
            os.unlink(self.place / f"{number}")

    def write_one(self) -> float:
        return self._all(lambda i: os.pwritev(self.one, [self._view(i)], i * self.nbytes) and None)

    def read_one(self) -> float:
        return self._all(lambda i: os.preadv(self.one, [self._view(i)], i * self.nbytes) and None)

    def close(self) -> None:
        os.close(self.one)
        self.pool.shutdown()
        shutil.rmtree(self.place)


class Ours:
    """The same through the tier."""

    def __init__(self, place: Path, nbytes: int, count: int, threads: int, memory: Memory) -> None:
        self.nbytes, self.count, self.threads, self.memory = nbytes, count, threads, memory
        file = Shape(8192, nbytes).cost
        self.tier = DiskTier(place, 64 * 1024 + count * file, threads=threads)
        self.next = 0

    async def _all(self, call: Any, first: int) -> float:
        numbers = iter(range(first, first + self.count))

        async def worker(lane: int) -> None:
            for number in numbers:
                await call(number, self.memory.views[number % len(self.memory.views)])

        began = time.perf_counter()
        await asyncio.gather(*(worker(lane) for lane in range(AT_ONCE * self.threads)))
        return time.perf_counter() - began

    async def _put(self, number: int, view: memoryview) -> None:
        if await self.tier.put(block(number), HEADER, [view], self.nbytes) != Stored():
            raise SystemExit("a put was refused")

    async def _put_durable(self, number: int, view: memoryview) -> None:
        if await self.tier.put(block(number), HEADER, [view], self.nbytes, durable=True) != Stored():
            raise SystemExit("a put was refused")

    async def _get(self, number: int, view: memoryview) -> None:
        if not isinstance(await self.tier.get(block(number), [view]), Hit):
            raise SystemExit("a get missed")

    async def put(self, durable: bool = False) -> float:
        return await self._all(self._put_durable if durable else self._put, self.next)

    async def get(self) -> float:
        return await self._all(self._get, self.next)

    async def replace(self) -> float:
        """Put as many new blocks into the full tier: one leaves for each that comes."""
        self.next += self.count
        return await self.put()

    async def clear(self) -> None:
        await self.tier.clear(SCOPE)


async def throughput(root: Path, nbytes: int, rounds: int, threads: int, total: int) -> dict[str, Any]:
    """GiB/s of all contestants, one round of each after the other."""
    count = total // nbytes
    memory = Memory(nbytes, AT_ONCE * threads)
    raw, ours = Raw(root / "raw", nbytes, count, threads, memory), Ours(root / "ours", nbytes, count, threads, memory)
    await ours.tier.start()
    seen: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        seen.setdefault(name, []).append(count * nbytes / GIB / seconds)

    for _ in range(rounds):
        note("write: fresh", raw.write_fresh())
        note("write: tier", await ours.put())
        note("write: one file", raw.write_one())
        note("read: fresh", raw.read_fresh())
        note("read: tier", await ours.get())
        note("read: one file", raw.read_one())
        note("replace: fresh", raw.replace_fresh())
        note("replace: tier", await ours.replace())
        raw.unlink()
        await ours.clear()
        note("durable: fresh", raw.write_durable())
        note("durable: tier", await ours.put(durable=True))
        raw.unlink()
        await ours.clear()
    findings = await ours.tier.check()
    await ours.tier.close()
    raw.close()
    shutil.rmtree(root / "ours")
    if findings:
        raise SystemExit(f"the tier is not sound: {findings[:3]}")
    shares = {}
    for verb in ("write", "read", "replace", "durable"):
        for limit in ("fresh", "one file"):
            against = f"write: {limit}" if verb == "replace" and limit == "one file" else f"{verb}: {limit}"
            if against in seen:
                pairs = zip(seen[f"{verb}: tier"], seen[against], strict=True)
                shares[f"{verb} / {limit}"] = round(median(a / b for a, b in pairs), 3)
    return {"gib_s": {name: spread(values) for name, values in seen.items()}, "share": shares}


async def restart(root: Path, blocks: int, rounds: int) -> dict[str, Any]:
    """Seconds until a tier with many small blocks is ready. Files have their lengths, and holes for content."""
    ns = root / "many" / "blocks" / SCOPE.domain / SCOPE.ns.hex()
    tier = DiskTier(root / "many", GIB * 64)
    await tier.start()
    await tier.put(block(0), BlockHeader(), [memoryview(bytes(1000))], 1000)
    await tier.close()
    shape = Shape(4096, 1000)
    for number in range(1, blocks):
        fd = os.open(ns / block_name(block(number).key, shape), os.O_WRONLY | os.O_CREAT)
        os.ftruncate(fd, shape.file_bytes)
        os.close(fd)
    ready, ordered, listing = [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        names = os.listdir(ns)
        listing.append(time.perf_counter() - began)
        del names
        tier = DiskTier(root / "many", GIB * 64)
        began = time.perf_counter()
        await tier.start()
        ready.append(time.perf_counter() - began)
        if tier.usage().blocks != blocks:
            raise SystemExit(f"{tier.usage().blocks} of {blocks} blocks came back")
        await tier.close()  # waits for the order of use, found out in the background
        ordered.append(time.perf_counter() - began)
    shutil.rmtree(root / "many")
    return {
        "blocks": blocks,
        "ready_s": spread(ready),
        "os_listdir_alone_s": spread(listing),
        "order_of_use_known_s": spread(ordered),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, help="where to measure (default: the temporary directory)")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--total", type=int, default=256, help="MiB a round (default 256)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 16, 32], help="MiB a block")
    parser.add_argument("--blocks", type=int, default=100_000, help="blocks of the restart; 0 for none")
    args = parser.parse_args()
    results: dict[str, Any] = {"threads": args.threads, "mib_a_round": args.total}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="kvb-", dir=args.dir) as place:
        for size in args.sizes:
            run = throughput(Path(place), size * MIB, args.rounds, args.threads, args.total * MIB)
            found = results[f"{size} MiB"] = uvloop.run(run)
            for verb in ("write", "read", "replace", "durable"):
                speeds = [
                    found["gib_s"].get(f"{verb}: {who}", {}).get("median") for who in ("tier", "fresh", "one file")
                ]
                shares = [found["share"].get(f"{verb} / {limit}") for limit in ("fresh", "one file")]
                cells = ["" if speed is None else f"{speed:.2f}" for speed in speeds]
                rows.append(
                    [f"{size} MiB", verb, *cells, *("" if share is None else f"{share:.0%}" for share in shares)]
                )
        if args.blocks:
            found = results["restart"] = uvloop.run(restart(Path(place), args.blocks, args.rounds))
            ready, limit = found["ready_s"]["median"], found["os_listdir_alone_s"]["median"]
            rows.append([f"{args.blocks:,} blocks", "ready, s", f"{ready:.3f}", f"(listdir {limit:.3f})", "", "", ""])
    finish(args, "disk", results, ("block", "what", "tier GiB/s", "fresh", "one file", "of fresh", "of one file"), rows)


if __name__ == "__main__":
    main()
