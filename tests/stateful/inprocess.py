"""A whole daemon in this process: its loop in a thread, its sockets real, its insides at hand for invariants."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from kvstore import config
from kvstore.daemon import Daemon

T = TypeVar("T")
_ports = itertools.cycle(range(20_000 + os.getpid() % 1000 * 10, 30_000))
TOKEN = "a token of the tests, long enough"


class InProcessDaemon:
    """A daemon that may be stopped, made to crash, and started again over what it left on disk.

    Parameters
    ----------
    root : Path
        Its own directory, with a short name.
    settings : dict
        By dotted key.
    """

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        self._root = root
        self._settings = settings
        self._life = 0
        self.disk = root / "disk"
        self.daemon: Daemon
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread

    def start(self) -> None:
        """Start it; it answers when this returns."""
        self._life += 1
        self.socket = str(self._root / f"s{self._life}")
        self.tcp = f"127.0.0.1:{_free_port()}"
        flags = {
            "listen.socket": self.socket,
            "listen.tcp": self.tcp,
            "listen.token": TOKEN,
            "disk.path": str(self.disk),
            "http.address": "",
            "host.slab_bytes": "1MiB",
            "disk.threads": "2",
            "log.level": "error",
            **self._settings,
        }
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="daemon", daemon=True)
        self._thread.start()

        async def begin() -> None:
            self.daemon = Daemon(config.load(flags, env={}))
            await self.daemon.start()

        self.run(begin())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def ask(self, function: Callable[[], T]) -> T:
        """Call something on the daemon's loop, where its state stands still."""

        async def call() -> T:
            return function()

        return self.run(call())

    def stop(self) -> int:
        """End it as an operator does; how many blocks were not written."""
        try:
            return self.run(self.daemon.close())
        finally:
            self._end_loop()

    def crash(self) -> None:
        """End it as kill -9 does: what is on disk at this instant is all that is left, half-written files included."""
        image = self._root / f"image{self._life}"
        _copy(self.disk, image)
        self.daemon._settings = _without_drain(self.daemon._settings)
        self.stop()
        shutil.rmtree(self.disk)
        image.rename(self.disk)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def files(self) -> list[Path]:
        """Stored blocks. Directories may vanish while it looks."""
        found = [Path(place, name) for place, _, names in os.walk(self.disk / "blocks") for name in names]
        return sorted(file for file in found if file.suffix == ".kv")

    def bytes_on_disk(self) -> int:
        """What its files take, as the kernel counts it."""
        total = 0
        for place, _, names in os.walk(self.disk):
            for name in names:
                try:
                    total += os.lstat(os.path.join(place, name)).st_size
                except FileNotFoundError:
                    continue
        return total


def _without_drain(settings: Any) -> Any:
    return msgspec.structs.replace(settings, drain_s=0.0)


def _copy(source: Path, target: Path) -> None:
    """Copy a directory that is being written to."""
    for place, _, names in os.walk(source):
        there = target / Path(place).relative_to(source)
        there.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            try:
                shutil.copy2(os.path.join(place, name), there / name)
            except FileNotFoundError:
                continue


def _free_port() -> int:
    """A port that is free now, and that the kernel gives to nobody who merely asks for any."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable: the ports never end")
