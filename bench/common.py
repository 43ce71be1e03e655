"""What the benches share: a daemon of their own, facts of the machine, tables and JSON.

Every bench prints a table and, with ``--out``, writes what it saw as JSON together with the machine, the commit and the
command. A figure never stands alone: it stands beside a limit or a peer that was measured in the same run, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
_RUN = "import json, sys; from kvstore import config as c, process as p; p.run(c.load(json.loads(sys.argv[1]), env={}))"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every bench understands."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--rounds", type=int, default=9, help="alternations of the contestants (default 9)")
    return parser


@contextlib.contextmanager
def running_daemon(settings: Mapping[str, str] | None = None, root: Path | None = None) -> Iterator[str]:
    """A daemon in a process of its own, disk off unless asked for; the address of its socket."""
    with contextlib.ExitStack() as stack:
        place = root or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvb-")))
        flags = {
            "listen.socket": str(place / "s"),
            "disk.bytes": "0",
            "disk.path": str(place / "disk"),
            "http.address": "",
            "log.level": "warning",
            **(settings or {}),
        }
        command = [sys.executable, "-P", "-c", _RUN, json.dumps(flags)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert process.stdout is not None
            if "ready" not in process.stdout.readline():
                raise SystemExit("the daemon did not start")
            yield flags["listen.socket"]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def pid_of(address: str) -> int:
    """Process that listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(address)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[0]


def cpu_seconds(pid: int) -> float:
    """Processor time that the main thread of a process has used, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def key(number: int, kind: str = "") -> bytes:
    """A key."""
    return hashlib.sha256(f"bench/{kind}/{number}".encode()).digest()


def touched(nbytes: int) -> np.ndarray:
    """Memory whose every page has been written."""
    return np.full(nbytes, 1, dtype=np.uint8)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, best and worst of some rounds."""
    return {"median": median(values), "min": min(values), "max": max(values), "rounds": len(values)}


CODE = ("kvstore", "gpu", "connectors", "bench/*.py")
"""What figures depend on: a commit with changes to it is not what was measured."""


def facts() -> dict[str, Any]:
    """The machine, the code and the command."""
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    options = [a if not a.startswith("/") else Path(a).name for a in sys.argv[1:]]
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_at_end": round(os.getloadavg()[0], 2),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", *CODE) else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *options]),
    }


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def finish(args: argparse.Namespace, name: str, results: Mapping[str, Any], header: Sequence[str], rows: Any) -> None:
    """Print the table or the JSON, and write the JSON where it was asked for."""
    report = {"bench": name, "machine": facts(), "results": results}
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
        return
    table = [list(header), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    machine = report["machine"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, load {machine['load_at_end']}")


def timed(function: Any, *args: Any) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began
