"""What the status page costs: of a core for one viewer, of the time of a lookup for 32, and until it is painted.

Processor time of the daemon is that of its main thread, which does everything but file I/O: what it takes with a viewer
less what it takes without one, while nothing else asks. Lookups of 8,192 tokens are timed in turns with 32 viewers and
with none. Wanted are 1 % of a core, and a p99 within 10 %. The time of the page is that of one GET, bytes included.

    python bench/viewers.py --out bench/results/viewers.json
"""

from __future__ import annotations

import contextlib
import multiprocessing
import selectors
import socket
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from statistics import median

import numpy as np
from common import arguments, cpu_seconds, finish, percentile, pid_of, running_daemon

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.keys import prefix_keys

VIEWERS = 32
IDLE_S = 4.0
LOOKUPS = 400


def watch(port: int, number: int, opened: Event, ending: Event) -> None:
    """So many browsers that read the stream, in a process of their own as browsers are."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for _ in range(number):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            one.setblocking(False)
            waiting.register(one, selectors.EVENT_READ)
        opened.set()
        while not ending.is_set():
            for key, _ in waiting.select(0.1):
                with contextlib.suppress(BlockingIOError):
                    key.fileobj.recv(1 << 20)  # type: ignore[union-attr]


@contextlib.contextmanager
def viewers(port: int, number: int) -> Iterator[None]:
    """The time while so many watch."""
    context = multiprocessing.get_context("spawn")
    opened, ending = context.Event(), context.Event()
    process = context.Process(target=watch, args=(port, number, opened, ending))
    process.start()
    try:
        if not opened.wait(20):
            raise RuntimeError("the viewers did not connect")
        time.sleep(1.2)
        yield
    finally:
        ending.set()
        process.join()
        time.sleep(0.3)


def idle_share(pid: int) -> float:
    """Share of a core that the daemon takes while nobody asks for blocks."""
    began, used = time.perf_counter(), cpu_seconds(pid)
    time.sleep(IDLE_S)
    return (cpu_seconds(pid) - used) / (time.perf_counter() - began)


def lookups(kv: KVStoreClient, namespace: Namespace, tokens: np.ndarray) -> list[float]:
    """Seconds of some lookups, hashing included."""
    seen: list[float] = []
    for _ in range(LOOKUPS):
        began = time.perf_counter()
        kv.lookup(prefix_keys(namespace, tokens))
        seen.append(time.perf_counter() - began)
        time.sleep(0.002)
    return seen


def page_seconds(port: int) -> float:
    """Seconds until the whole page is there."""
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        answer.read()
    return time.perf_counter() - began


def main() -> None:
    args = arguments(__doc__).parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    namespace = Namespace(model="bench")
    tokens = np.arange(8192, dtype=np.int32)
    alone: list[float] = []
    watched: list[float] = []
    crowded: list[float] = []
    with_none: list[float] = []
    with_many: list[float] = []
    with (
        running_daemon({"http.address": f"127.0.0.1:{port}"}) as address,
        KVStoreClient(address, namespace=namespace) as kv,
    ):
        pid = pid_of(address)
        kv.put_many([(key, bytes(4096), BlockHeader()) for key in prefix_keys(namespace, tokens)])
        time.sleep(2)
        for _ in range(max(1, args.rounds // 3)):
            alone.append(idle_share(pid))
            with viewers(port, 1):
                watched.append(idle_share(pid))
            with viewers(port, VIEWERS):
                crowded.append(idle_share(pid))
        ratios: list[float] = []
        for _ in range(args.rounds):
            none = lookups(kv, namespace, tokens)
            with viewers(port, VIEWERS):
                many = lookups(kv, namespace, tokens)
            with_none += none
            with_many += many
            ratios.append(percentile(many, 0.99) / percentile(none, 0.99))
        pages = [page_seconds(port) for _ in range(20)]
    results = {
        "idle_share_of_a_core": median(alone),
        "one_viewer_adds": median(watched) - median(alone),
        "each_of_32_viewers_adds": (median(crowded) - median(alone)) / VIEWERS,
        "lookup_p50_s": {"none": percentile(with_none, 0.5), "32_viewers": percentile(with_many, 0.5)},
        "lookup_p99_s": {"none": percentile(with_none, 0.99), "32_viewers": percentile(with_many, 0.99)},
        "lookup_p99_ratio_median": median(ratios),
        "page_s": median(pages),
    }
    rows = [
        ("a core, idle", f"{100 * results['idle_share_of_a_core']:.2f} %", ""),
        ("a core, one viewer adds", f"{100 * results['one_viewer_adds']:.2f} %", "<= 1 %"),
        ("a core, each of 32 viewers adds", f"{100 * results['each_of_32_viewers_adds']:.2f} %", ""),
        ("lookup p99, 32 viewers over none", f"{results['lookup_p99_ratio_median']:.2f}", "<= 1.10"),
        ("page, ms", f"{1e3 * results['page_s']:.1f}", ""),
    ]
    finish(args, "viewers", results, ("what", "seen", "wanted"), rows)


if __name__ == "__main__":
    main()
