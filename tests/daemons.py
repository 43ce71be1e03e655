"""What fault tests need: real daemons to kill, stop and restart, raw connections, and payloads that show any error.

A daemon runs in a process of its own with a socket, memory and a directory of its own. `DaemonProcess.start` returns
when it answers; nothing here waits by sleeping where there is something to poll.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack

from kvstore import KVStoreClient, Namespace
from kvstore.errors import KVStoreError
from kvstore.keys import namespace_digest
from kvstore.testing import kill
from kvstore.types import BlockHeader, Dropped, Exists, Miss, MissReason, Stored
from kvstore.wire.messages import PROTOCOL_VERSION

TOKEN = "a token of the tests, long enough"
NAMESPACE = Namespace(model="faults", dtype="uint8")
NS = namespace_digest(NAMESPACE)
SMALL = 16 * 1024
"""Bytes of a block that takes one page of the arena."""

_processes = multiprocessing.get_context("forkserver")
# What a daemon imports is imported once, in the process that all of them are forked from.
_processes.set_forkserver_preload(
    ["pytest", "kvstore.process", "kvstore.config", "kvstore.tiers.disk", "kvstore.client"]
)


# -- payloads ----------------------------------------------------------------------------------------------------------


def key(number: int, kind: str = "") -> bytes:
    """A key."""
    return hashlib.sha256(f"{kind}/{number}".encode()).digest()


def payload(of: bytes, nbytes: int = SMALL) -> bytes:
    """The only right content of a block: a function of its key, so that any wrong byte shows."""
    return hashlib.shake_128(of).digest(nbytes)


def header(of: bytes) -> BlockHeader:
    """The only right header of a block."""
    return BlockHeader(parent=of, tokens=of * 2, position=of[0])


def is_right(of: bytes, loaded: Any) -> bool:
    """Whether what was read of a block is what was stored: bytes and header. A miss is not."""
    if isinstance(loaded, Miss):
        return False
    return bytes(loaded.data) == payload(of, len(loaded.data)) and loaded.header == header(of)


def store(client: KVStoreClient, keys: Sequence[bytes], nbytes: int = SMALL, **how: Any) -> list[Any]:
    """Put blocks; what became of each."""
    return client.put_many([(k, payload(k, nbytes), header(k)) for k in keys], **how)


# -- daemons -----------------------------------------------------------------------------------------------------------


class DaemonProcess:
    """A daemon that may be killed and started again over the same directory.

    Parameters
    ----------
    root : Path
        Its own directory; short, since a socket's path is.
    settings : dict
        By dotted key, over the small ones used here.
    constants : dict
        Constants of modules that are other values in this daemon: ``module:NAME``.
    """

    def __init__(
        self, root: Path, settings: dict[str, str] | None = None, constants: dict[str, Any] | None = None
    ) -> None:
        self.root = root
        self.constants = constants or {}
        self.socket = str(root / "s")
        self.disk = root / "disk"
        self.log = root / "log"
        self.settings = {
            "listen.socket": self.socket,
            "host.bytes": "8MiB",
            "host.slab_bytes": "1MiB",
            "host.ahead_bytes": "0",
            "disk.bytes": "0",
            "disk.path": str(self.disk),
            "http.address": "",
            "drain_s": "2s",
            **(settings or {}),
        }
        self._process: Any = None
        self._clients: list[KVStoreClient] = []

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def start(self, *, die_at: str = "", nth: int = 1, until_ready: bool = True) -> DaemonProcess:
        """Start it, to be killed at the n-th passing of a point of `kvstore.testing.kill` if one is named."""
        self._process = _processes.Process(
            target=_run, args=(self.settings, self.constants, str(self.log), die_at, nth), daemon=True
        )
        self._process.start()
        if until_ready:
            until(lambda: not self.alive or self._answers(), "the daemon to answer", 20)
            assert self.alive, self.log.read_text()
        return self

    def _answers(self) -> bool:
        try:
            return self.stats()["ready"]
        except KVStoreError:
            return False

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def wait(self, timeout_s: float = 20) -> int | None:
        """Wait until it has ended; its exit status, negative for a signal."""
        self._process.join(timeout_s)
        assert not self._process.is_alive(), "the daemon did not end"
        return self._process.exitcode

    def stop(self) -> int | None:
        """Ask it to end, and wait."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Stop it from doing anything for a while."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """SIGSTOP, and wait until it is stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: _status(self.pid, "State").startswith("T"), "the daemon to stop")

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def client(self, **how: Any) -> KVStoreClient:
        """A client of it, closed at the end of the test."""
        client = KVStoreClient(how.pop("address", self.socket), **{"namespace": NAMESPACE, "timeout_s": 20, **how})
        self._clients.append(client)
        return client

    def stats(self) -> dict[str, Any]:
        """A snapshot, asked over a connection of its own."""
        with KVStoreClient(self.socket, timeout_s=20) as client:
            return client.stats()

    def check(self) -> None:
        """Fail unless every byte of host memory is accounted for."""
        assert self.stats()["accounts"] == "in order"

    def nothing_lent(self) -> bool:
        """Whether there is neither lease nor reservation, and the accounts are in order."""
        now = self.stats()
        assert now["accounts"] == "in order", now["accounts"]
        return now["leases"] == now["reservations"] == now["tiers"]["host"]["leased_bytes"] == 0

    def own_memory(self) -> int:
        """Bytes of memory that is the daemon's alone: without the arena."""
        return int(_status(self.pid, "RssAnon").split()[0]) * 1024

    def tmp_files(self) -> list[str]:
        """What is in the disk tier's directory of unfinished files."""
        return os.listdir(self.disk / "tmp")

    def close(self) -> None:
        """End it and every client made here, whatever state they are in."""
        for client in self._clients:
            client.close()
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()


MakeDaemon = Callable[..., DaemonProcess]
"""Makes a daemon that is not started yet; parameters as of `DaemonProcess`."""


def _run(settings: dict[str, str], constants: dict[str, Any], log: str, die_at: str, nth: int) -> None:
    """In the new process: be a daemon."""
    from kvstore import config, daemon, process

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no daemon outlives the tests
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for name, value in constants.items():
        module, _, constant = name.partition(":")
        vars(importlib.import_module(module))[constant] = value
    _account(daemon.Daemon)
    if die_at:
        if die_at.startswith("recover."):
            kill.arm(die_at, nth)
        else:
            _when_ready(daemon.Daemon, lambda: kill.arm(die_at, nth))
    sys.exit(process.run(config.load(settings, env={})))


def _account(daemon: Any) -> None:
    """Let `stats` tell whether host memory is accounted for."""
    take = daemon.snapshot

    def snapshot(self: Any) -> dict[str, Any]:
        try:
            self.chain.host.check()
            accounts = "in order"
        except KVStoreError as error:
            accounts = str(error)
        return take(self) | {"accounts": accounts, "in_flight": len(self.service.ledger.in_flight)}

    daemon.snapshot = snapshot


def _when_ready(daemon: Any, do: Callable[[], None]) -> None:
    begin = daemon.start

    async def start(self: Any) -> None:
        await begin(self)
        do()

    daemon.start = start


def process(target: Callable[..., None], *args: Any) -> Any:
    """A process that runs a function of a test module, started."""
    made = _processes.Process(target=target, args=args, daemon=True)
    made.start()
    return made


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name + ":")), "")


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 10) -> Any:
    """Wait until a condition holds; its value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)


# -- raw connections ---------------------------------------------------------------------------------------------------


class Closed(Exception):
    """The daemon closed the connection."""


class Raw:
    """A connection that sends any bytes and reads frames with nothing of ours: sockets, struct and msgpack."""

    def __init__(
        self, address: str | tuple[str, int], timeout_s: float = 10, hello: bool = True, token: str = ""
    ) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(timeout_s)
        self.sock.connect(address)
        self._ids = itertools.count(1)
        self.session = b""
        if hello:
            reply = self.call("hello", [PROTOCOL_VERSION, "raw", [_as_map(NAMESPACE)], token])
            self.session = reply[3]

    def send(self, data: bytes) -> None:
        """Send bytes as they are; raises `Closed` if nobody takes them."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def frame(self, message: Any, payload_bytes: int = 0) -> bytes:
        """A frame around anything msgpack can encode."""
        head: Any = message if isinstance(message, bytes) else msgpack.packb(message)
        return struct.pack("<II", len(head), payload_bytes) + head

    def ask(self, method: Any, params: Any) -> int:
        """Send a call; its id."""
        number = next(self._ids)
        self.send(self.frame([0, number, method, params]))
        return number

    def answer(self) -> list[Any]:
        """The next frame, decoded."""
        head_bytes, payload_bytes = struct.unpack("<II", self._exactly(8))
        head = msgpack.unpackb(self._exactly(head_bytes))
        if payload_bytes:
            head.append(self._exactly(payload_bytes))
        return head

    def call(self, method: Any, params: Any) -> Any:
        """Result of a call; raises the typed error that came instead."""
        number = self.ask(method, params)
        while True:
            kind, *rest = self.answer()
            if kind == 1 and rest[0] in (number, 0):
                if rest[1] is not None:
                    raise Refused(*rest[1])
                return rest[2]

    def refusal(self, method: Any, params: Any) -> str:
        """Code of the error that a call is answered with."""
        try:
            result = self.call(method, params)
        except Refused as refused:
            return refused.code
        raise AssertionError(f"{method} was answered with {result!r}")

    def last_words(self) -> list[str]:
        """Read to the end of the connection; the codes of the errors that came on the way."""
        codes: list[str] = []
        try:
            while True:
                message = self.answer()
                if message[0] == 1 and message[2] is not None:
                    codes.append(message[2][0])
        except Closed:
            return codes

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            try:
                part = self.sock.recv(nbytes - len(data))
            except ConnectionResetError:
                raise Closed from None
            if not part:
                raise Closed
            data += part
        return bytes(data)

    def close(self) -> None:
        """End it."""
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Refused(Exception):
    """A call was answered with an error."""

    def __init__(self, code: str, cause: str, remedy: str) -> None:
        super().__init__(code, cause, remedy)
        self.code = code


def _as_map(namespace: Namespace) -> dict[str, Any]:
    return {name: getattr(namespace, name) for name in namespace.__struct_fields__}


# -- somebody else -----------------------------------------------------------------------------------------------------


class Bystander:
    """A client that stores and reads all the while that something bad happens, and must not notice."""

    def __init__(self, address: str) -> None:
        self.rounds = 0
        self.error: BaseException | None = None
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            with KVStoreClient(self._address, namespace=NAMESPACE, timeout_s=20) as client:
                while not self._stop.is_set():
                    own = key(self.rounds % 8, "bystander")
                    outcome = client.put(own, payload(own), header(own))
                    assert isinstance(outcome, Stored | Exists), outcome
                    assert is_right(own, client.get(own))
                    self.rounds += 1
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Bystander:
        self._thread.start()
        self.next_round()
        return self

    def next_round(self) -> None:
        """Wait until a whole round that began after now is over."""
        begun = self.rounds
        until(lambda: self.rounds >= begun + 2 or self.error is not None, "another client to get on with its work", 30)
        self.unharmed()

    def unharmed(self) -> None:
        """Fail if it noticed anything."""
        if self.error is not None:
            raise AssertionError("another client was harmed") from self.error

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.next_round()
        self._stop.set()
        self._thread.join(30)


def is_refused(outcome: object) -> bool:
    """Whether a store was refused with a reason."""
    return isinstance(outcome, Dropped) and bool(outcome.reason)


def is_miss(outcome: object, *reasons: MissReason) -> bool:
    """Whether a load missed, for one of these reasons if any are given."""
    return isinstance(outcome, Miss) and (not reasons or outcome.reason in reasons)
