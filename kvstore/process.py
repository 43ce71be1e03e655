"""The daemon as a process: logging, limits, signals, a word to a supervisor, and what is printed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import socket
import sys

import uvloop

from kvstore.banner import banner
from kvstore.collector import QuietCollector
from kvstore.config import Loaded
from kvstore.daemon import Daemon
from kvstore.errors import KVStoreError

_PR_SET_DUMPABLE = 4


async def _main(loaded: Loaded) -> int:
    daemon = Daemon(loaded)
    loop = asyncio.get_running_loop()
    try:
        await daemon.start()
    except BaseException:
        await daemon.close()
        raise
    signals = 0

    def interrupted() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(130)  # asked twice: now, with whatever is left unwritten
        daemon.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    _say(banner(daemon))
    _notify_systemd("READY=1")
    collecting = asyncio.create_task(QuietCollector(daemon.traffic.calls).run())
    await daemon.wait()
    collecting.cancel()
    _notify_systemd("STOPPING=1")
    queued = daemon.chain.dirty_blocks
    _say(f"\nStopping: writing {queued} blocks to disk." if queued else "\nStopping.")
    left = await daemon.close()
    _say(f"{left} blocks were not written in time." if left else "Bye.")
    return 0


def _say(text: str) -> None:
    """Print for whoever looks on; what is not on disk yet must not be lost because nobody does any longer."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a pipe without a reader, a full disk; a letter that the terminal does not have
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


def run(loaded: Loaded) -> int:
    """Run a daemon until it is told to end; its exit status."""
    _set_up_logging(loaded)
    # What is in memory are people's prompts: no core dumps of them.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # Each slab and each connection takes descriptors; the usual soft limit is for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(_main(loaded))
    return 130


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(error, KVStoreError):
            entry["code"] = error.code
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _set_up_logging(loaded: Loaded) -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if loaded.settings.log.json else plain)
    root = logging.getLogger("kvstore")
    root.handlers[:] = [handler]
    root.setLevel(loaded.settings.log.level.upper())
    root.propagate = False


def _notify_systemd(state: str) -> None:
    """Tell a supervisor of type ``notify`` what we are doing, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(state.encode())
