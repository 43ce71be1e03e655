"""`kvstore bench`: what this machine gives. A daemon of its own is started, measured beside a limit, and ended.

Nothing of a running daemon is touched. Each figure stands beside what the same bytes take without kvstore, measured in
turns: a copy in memory, or reads and writes of one plain file around the page cache.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from kvstore.cli import out
from kvstore.cli.flags import Json
from kvstore.errors import ConfigError, Unavailable
from kvstore.rules import show_size
from kvstore.units import format_duration, format_size, parse_size

BATCH = 64 << 20
"""Bytes moved in one turn."""
TURNS = 5
CALLS = 400
PROMPT = 8192


class Figure(NamedTuple):
    """One line of the table: what was measured, kvstore's figure, and the limit beside it."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_name: str = ""


def bench(
    *,
    block: Annotated[str, Parameter(help="Size of a block.")] = "4MiB",
    place: Annotated[
        Path | None, Parameter(help="Directory for the disk tier. Default: that of temporary files.")
    ] = None,
    skip_disk: Annotated[bool, Parameter(negative=(), help="Measure memory only.")] = False,
    json: Json = False,
) -> None:
    """Measure host tier, disk tier, lookups and loads on this machine, each beside its limit. Takes some seconds."""
    try:
        nbytes = parse_size(block)
    except ValueError as error:
        raise ConfigError(f"--block: {block!r} {error}.", "Write for example 4MiB.") from None
    if not 4096 <= nbytes <= BATCH:
        raise ConfigError(f"--block: {block!r} is not between 4KiB and {show_size(BATCH)}.", "")
    from rich.console import Console

    figures: list[Figure] = []
    steps: list[tuple[str, Callable[[str, int], Iterator[Figure]]]] = [("calls", _calls), ("memory", _memory)]
    console = Console(stderr=True, quiet=json)
    with tempfile.TemporaryDirectory(prefix="kvb-") as run:
        with _daemon(Path(run), {"host.bytes": show_size(8 * BATCH), "disk.bytes": "0"}) as address:
            for name, step in steps:
                with console.status(f"Measuring {name}"):
                    figures += step(address, nbytes)
        if not skip_disk:
            with tempfile.TemporaryDirectory(prefix="kvb-", dir=place) as disk, console.status("Measuring the disk"):
                figures += _disk(Path(run), Path(disk), nbytes)
    if json:
        out.print_json({"block_bytes": nbytes, "figures": [figure._asdict() for figure in figures]})
    else:
        _print(figures, nbytes)


def _print(figures: list[Figure], nbytes: int) -> None:
    from rich.table import Column, Table

    table = Table(
        Column("What", no_wrap=True), "kvstore", "Limit", "Share", "", box=None, pad_edge=False, header_style="bold"
    )
    for each in figures:
        limit = _shown(each.limit, each.unit) if each.limit is not None else ""
        share = f"{100 * each.value / each.limit:.0f} %" if each.limit else ""
        table.add_row(each.name, _shown(each.value, each.unit), limit, share, each.limit_name)
    out.console().print(table)
    out.console().print(
        f"Blocks of {format_size(nbytes)}; medians of {TURNS} turns. On a busy machine look at the shares."
    )


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return format_duration(value)
    return f"{format_size(value)}/s" if unit == "bytes/s" else f"{value:,.0f}/s"


# -- a daemon of our own -----------------------------------------------------------------------------------------------

_RUN = "import json, sys; from kvstore import config as c, process as p; p.run(c.load(json.loads(sys.argv[1]), env={}))"


@contextmanager
def _daemon(run: Path, settings: dict[str, str]) -> Iterator[str]:
    import json

    socket = str(run / "s")
    flags = {
        "listen.socket": socket,
        "http.address": "",
        "log.level": "error",
        "disk.path": str(run / "disk"),
    } | settings
    # -P: a folder named kvstore where we were called is not us.
    process = subprocess.Popen([sys.executable, "-P", "-c", _RUN, json.dumps(flags)], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or "ready" not in process.stdout.readline():
            raise Unavailable("the daemon of the bench did not start.", "`kvstore doctor` may tell why.")
        yield socket
    finally:
        process.terminate()
        process.communicate(timeout=60)


def _key(number: int) -> bytes:
    return hashlib.sha256(f"bench/{number}".encode()).digest()


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -- what is measured --------------------------------------------------------------------------------------------------


def _calls(address: str, nbytes: int) -> Iterator[Figure]:
    """Lookups and leases of a prompt of `PROMPT` tokens that is all there."""
    import numpy as np

    from kvstore import BlockHeader, KVStoreClient, Namespace
    from kvstore.keys import prefix_keys

    namespace = Namespace(model="bench")
    tokens = np.arange(PROMPT, dtype=np.int32)
    with KVStoreClient(address, namespace=namespace) as kv:
        keys = prefix_keys(namespace, tokens)
        kv.put_many([(key, bytes(4096), BlockHeader()) for key in keys])
        looks = [_timed(lambda: kv.lookup(prefix_keys(namespace, tokens))) for _ in range(CALLS)]
        leases = [_timed(lambda: kv.lease(keys).release()) for _ in range(CALLS)]
        kv.drop()
    for name, times in ((f"lookup of {PROMPT:,} tokens", looks), (f"lease of {len(keys)} blocks", leases)):
        ordered = sorted(times)
        yield Figure(f"{name}, half below", median(ordered), "s")
        yield Figure(f"{name}, 99 of 100 below", ordered[int(0.99 * len(ordered))], "s")


def _memory(address: str, nbytes: int) -> Iterator[Figure]:
    """Store and load through shared memory, beside a copy between buffers of as many bytes."""
    import numpy as np

    from kvstore import BlockHeader, KVStoreClient, Namespace

    number = BATCH // nbytes
    buffers = [np.full(nbytes, 1, np.uint8) for _ in range(number)]
    shared = np.frombuffer(mmap.mmap(-1, number * nbytes, flags=mmap.MAP_SHARED), np.uint8).reshape(number, nbytes)
    shared[:] = 1
    keys = [_key(i) for i in range(number)]
    store: list[float] = []
    load: list[float] = []
    to_shared: list[float] = []
    from_shared: list[float] = []
    with KVStoreClient(address, namespace=Namespace(model="bench")) as kv:
        items = [(key, buffer, BlockHeader()) for key, buffer in zip(keys, buffers, strict=True)]
        for _ in range(TURNS + 1):
            store.append(_timed(lambda: kv.put_many(items)))
            to_shared.append(_timed(lambda: np.copyto(shared, np.asarray(buffers))))
            load.append(_timed(lambda: kv.get_into(keys, buffers)))
            from_shared.append(_timed(lambda: [np.copyto(b, s) for b, s in zip(buffers, shared, strict=True)]))
            kv.drop(keys)
    speed = [number * nbytes / median(times[1:]) for times in (store, load, from_shared)]
    yield Figure("store into memory", speed[0], "bytes/s", speed[2], "a copy in memory")
    yield Figure("load from memory", speed[1], "bytes/s", speed[2], "a copy in memory")


def _disk(run: Path, place: Path, nbytes: int) -> Iterator[Figure]:
    """Blocks that only the disk has, beside plain reads and writes of one file."""
    import numpy as np

    from kvstore import BlockHeader, KVStoreClient, Namespace

    number, total = max(2, 2 * BATCH // nbytes), max(2, 2 * BATCH // nbytes) * nbytes
    budgets = {"disk.bytes": show_size(16 * BATCH), "host.bytes": show_size(8 * BATCH)}
    settings = {"disk.path": str(place / "tier")} | budgets
    named = Namespace(model="bench")
    data = np.random.default_rng(1).integers(0, 255, nbytes, np.uint8)
    buffers = [np.full(nbytes, 1, np.uint8) for _ in range(number)]
    keys = [_key(i) for i in range(number)]
    with _daemon(run, settings) as address, KVStoreClient(address, namespace=named, timeout_s=120) as kv:
        written = _timed(lambda: kv.put_many([(key, data, BlockHeader()) for key in keys], wait_s=60, durable=True))
    # A daemon that was started anew has nothing in memory.
    with _daemon(run, settings) as address, KVStoreClient(address, namespace=named, timeout_s=120) as kv:
        read = _timed(lambda: kv.get_into(keys, buffers))
    plain_write, plain_read = _plain(place / "plain", data, number)
    yield Figure(
        "store to disk, durable", total / written, "bytes/s", total / plain_write, "one file, O_DIRECT, synced"
    )
    yield Figure("load from disk", total / read, "bytes/s", total / plain_read, "a file, O_DIRECT")


def _plain(file: Path, data: Any, number: int) -> tuple[float, float]:
    """Seconds to write and to read one file block by block, around the page cache where the filesystem allows it."""
    size = (len(data) + 4095) // 4096 * 4096
    with mmap.mmap(-1, size) as page:
        page[: len(data)] = data.tobytes()
        flags = os.O_RDWR | os.O_CREAT
        try:
            fd = os.open(file, flags | os.O_DIRECT, 0o600)
        except OSError:
            fd = os.open(file, flags, 0o600)
        try:
            began = time.perf_counter()
            for i in range(number):
                os.pwrite(fd, page, i * size)
            os.fdatasync(fd)
            middle = time.perf_counter()
            for i in range(number):
                os.preadv(fd, [page], i * size)
            return middle - began, time.perf_counter() - middle
        finally:
            os.close(fd)
            file.unlink()
