"""Connections that do nothing, too little or too much: bounded in number, time and memory, and nobody else notices."""

from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from daemons import (
    NAMESPACE,
    NS,
    SMALL,
    TOKEN,
    Bystander,
    Closed,
    DaemonProcess,
    MakeDaemon,
    Raw,
    Refused,
    free_port,
    is_right,
    key,
    payload,
    store,
    until,
)

from kvstore import KVStoreClient, Namespace
from kvstore.errors import ConnectionLost, KVStoreError, Unavailable

MIB = 1 << 20
SHORT_HANDSHAKE = {"kvstore.wire.server:HANDSHAKE_S": 0.4, "kvstore.wire.fds:HANDSHAKE_S": 0.4}
CROWD = 10_000


@contextmanager
def crowd(address: str, count: int, send: bytes = b"") -> Iterator[list[socket.socket]]:
    """Many connections that say no more than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX)
            socks.append(sock)
            sock.connect(address)
            if send:
                sock.send(send)
        yield socks
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def is_closed(sock: socket.socket) -> bool:
    """Whether the daemon has closed its end."""
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# -- many --------------------------------------------------------------------------------------------------------------


def test_ten_thousand_half_open_connections(make_daemon: MakeDaemon) -> None:
    """Each has sent a part of a frame. They cost little, are ended when their time is over, and others go on."""
    daemon = make_daemon({"listen.max_connections": "20000"}, {"kvstore.wire.server:HANDSHAKE_S": 10.0}).start()
    limit = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0]
    count = min(CROWD, limit - 500, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
    with Bystander(daemon.socket) as other:
        before = daemon.own_memory()
        with crowd(daemon.socket, count, b"\x10\x00\x00") as socks:
            other.next_round()
            assert daemon.stats()["sessions"] > count
            assert daemon.own_memory() - before < count * 16 * 1024
            until(lambda: daemon.stats()["sessions"] <= 2, "half-open connections to be ended", 60)
            assert all(is_closed(sock) for sock in socks[:: count // 100])
            other.next_round()


def test_more_connections_than_allowed_are_turned_away(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"listen.max_connections": "20"}).start()
    with Bystander(daemon.socket) as other:
        with crowd(daemon.socket, 60) as socks:
            until(lambda: sum(map(is_closed, socks)) == 41, "the surplus to be turned away")
            with pytest.raises(ConnectionLost), KVStoreClient(daemon.socket, timeout_s=20) as late:
                late.stats()
            other.next_round()
        until(lambda: _answers(daemon), "room for new connections")
        assert daemon.stats()["refused_connections"] >= 41


def _answers(daemon: DaemonProcess) -> bool:
    try:
        daemon.stats()
    except Unavailable:
        return False
    return True


@pytest.mark.parametrize("suffix", ["", ".fd"])
def test_a_daemon_without_descriptors_left(make_daemon: MakeDaemon, suffix: str) -> None:
    """New connections wait, others go on, and no processor is burnt meanwhile."""
    daemon = make_daemon({"listen.max_connections": "5000"}).start()
    own = key(1)
    client = daemon.client()
    store(client, [own])
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (100, 20_000))
    with crowd(daemon.socket + suffix, 150):
        until(lambda: _descriptors_left(daemon) < 3, "the daemon to run out of descriptors")
        burnt = _processor_time(daemon)
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            assert is_right(own, client.get(own))
            time.sleep(0.02)
        assert _processor_time(daemon) - burnt < 0.25
    until(lambda: _answers(daemon), "new connections to be taken")
    assert is_right(own, daemon.client().get(own))


def _descriptors_left(daemon: DaemonProcess) -> int:
    return resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0] - len(os.listdir(f"/proc/{daemon.pid}/fd"))


def _processor_time(daemon: DaemonProcess) -> float:
    with open(f"/proc/{daemon.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_burst_of_connections_is_not_a_daemon_that_is_gone(make_daemon: MakeDaemon) -> None:
    """The kernel's queue is full for a moment: a client waits its turn instead of giving up."""
    daemon = make_daemon({"listen.max_connections": "5000"}).start()
    with daemon.hung(), crowd_until_full(daemon.socket):
        with KVStoreClient(daemon.socket, timeout_s=0.2) as client, pytest.raises(Unavailable) as caught:
            client.stats()
        assert caught.value.code == "KV502"
    assert _answers(daemon)


@contextmanager
def crowd_until_full(address: str) -> Iterator[None]:
    """Connect until the kernel takes no more."""
    socks: list[socket.socket] = []
    try:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            socks.append(sock)
            sock.setblocking(False)
            try:
                sock.connect(address)
            except BlockingIOError:
                break
        yield
    finally:
        for sock in socks:
            sock.close()


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drip", [b"", b"\x01"])
@pytest.mark.parametrize("where", ["socket", "fd", "tcp"])
def test_who_does_not_introduce_itself_in_time_is_ended(make_daemon: MakeDaemon, where: str, drip: bytes) -> None:
    port = free_port()
    daemon = make_daemon({"listen.tcp": f"127.0.0.1:{port}", "listen.token": TOKEN}, SHORT_HANDSHAKE).start()
    if where == "tcp":
        sock = socket.create_connection(("127.0.0.1", port))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(daemon.socket + (".fd" if where == "fd" else ""))
    began = time.monotonic()
    if drip and where != "fd":
        sock.send(struct.pack("<II", MIB, 0))  # the beginning of a frame that the bytes belong to

    def ended() -> bool:
        try:
            if drip and time.monotonic() - began < 0.3:  # a byte now and then does not buy time
                sock.send(drip)
        except (BrokenPipeError, ConnectionResetError):
            return True
        return is_closed(sock)

    until(ended, "the connection to be ended")
    assert time.monotonic() - began > 0.3
    sock.close()


def test_who_has_introduced_itself_may_be_slow(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({}, SHORT_HANDSHAKE).start()
    client = daemon.client()
    own = key(1)
    store(client, [own])
    with Raw(daemon.socket) as raw:
        data = raw.frame([0, 9, "lookup", [NS, own]])
        began = time.monotonic()
        for n in range(len(data)):
            raw.send(data[n : n + 1])
            if n % 8 == 0:
                time.sleep(0.06)
        assert time.monotonic() - began > 0.5
        assert raw.answer() == [1, 9, None, [b"\x01", {}]]
        lease = client.lease([own])  # the descriptor socket was used, so it may rest as well
        assert lease.valid()


@pytest.mark.usefixtures("bystander")
def test_who_does_not_read_is_not_served(shared_daemon: DaemonProcess) -> None:
    """Small calls with large answers, sent and never read: the daemon stops taking them, and goes on when they are."""
    with shared_daemon.client() as client:
        for n in range(200):
            client.lookup([], namespace=Namespace(model=f"{n:03}" * 300))
    before = shared_daemon.own_memory()
    with Raw(shared_daemon.socket, timeout_s=60) as raw:
        calls = b"".join(raw.frame([0, n, "stats", []]) for n in range(1, 4001))
        raw.sock.setblocking(False)
        sent = 0
        began = time.monotonic()
        while sent < len(calls) and time.monotonic() - began < 0.5:
            try:
                sent += raw.sock.send(calls[sent:])
            except BlockingIOError:
                time.sleep(0.01)
        served = shared_daemon.stats()["requests"]["stats"]["count"]
        assert shared_daemon.own_memory() - before < 16 * MIB
        assert served < 100
        # It was only put off: what was taken is answered, in order, once somebody reads.
        raw.sock.setblocking(True)
        raw.sock.settimeout(60)
        for number in range(1, 60):
            assert raw.answer()[:3] == [1, number, None]


@pytest.mark.usefixtures("bystander")
def test_calls_that_wait_are_bounded(make_daemon: MakeDaemon) -> None:
    """Stores that wait for room: so many at a time on one connection, the others are refused at once."""
    daemon = make_daemon({"host.bytes": "2MiB", "disk.bytes": "64MiB"}, {"kvstore.wire.server:MAX_CALLS": 8}).start()
    with Raw(daemon.socket) as raw:
        raw.call("reserve", [NS, [[key(1), MIB]]])  # memory that nobody can be given
        frames = [raw.frame([0, n, "reserve", [NS, [[key(n), MIB]], 30.0, 20.0]]) for n in range(10, 40)]
        raw.send(b"".join(frames))
        codes = [answer[2] and answer[2][0] for answer in (raw.answer() for _ in range(22))]
        assert set(codes) <= {None, "KV402"}
        with daemon.client() as client:
            assert client.lookup([]) == []
    until(daemon.nothing_lent, "everything to be given back")


# -- cut off -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("reset", [False, True])
def test_connections_cut_anywhere_in_a_conversation(shared_daemon: DaemonProcess, reset: bool) -> None:
    """Cut after every byte of a store and a load: nothing stays lent, nothing half-done is visible."""
    store(shared_daemon.client(), [key(0, "cut")])
    before = shared_daemon.stats()["tiers"]["host"]
    with Raw(shared_daemon.socket) as raw:
        stream = raw.frame([0, 1, "lease", [NS, key(0, "cut")]])
        stream += raw.frame([0, 2, "reserve", [NS, [[key(1, "cut"), SMALL]]]])
        stream += raw.frame([2, "lease", [NS, key(0, "cut")]])
    for cut in range(0, len(stream), 3):
        raw = Raw(shared_daemon.socket)
        raw.send(stream[:cut])
        if reset:
            raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
    until(shared_daemon.nothing_lent, "everything to be given back")
    after = shared_daemon.stats()["tiers"]["host"]
    assert after["writing_bytes"] == 0
    assert after["blocks"] - before["blocks"] <= 8  # the bystander's


@pytest.mark.usefixtures("bystander")
def test_half_closed_connections_end(shared_daemon: DaemonProcess) -> None:
    """Who says that it will send nothing more gets what it asked for, and is gone."""
    with Raw(shared_daemon.socket) as raw:
        raw.ask("lookup", [NS, key(9, "half closed")])
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.answer()[3] == [b"", {}]
        with pytest.raises(Closed):
            raw.answer()


def test_a_closing_connection_that_nobody_reads_is_ended(make_daemon: MakeDaemon) -> None:
    """It broke the protocol while its answers pile up: what it was lent does not wait for it to read them."""
    daemon = make_daemon({}, {"kvstore.wire.server:LINGER_S": 0.3}).start()
    store(daemon.client(), [key(0)])
    raw = Raw(daemon.socket)
    raw.ask("lease", [NS, key(0)])
    big = raw.frame([0, 5, "lookup", [NS, bytes(16_000 * 32), False]])
    for _ in range(14):
        raw.send(big)
    raw.send(raw.frame(b"\xc1"))
    until(daemon.nothing_lent, "the lease to end")
    until(lambda: daemon.stats()["sessions"] == 2, "the session to end")
    raw.close()


# -- wrong partners ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("version", [0, 2, -1, 1 << 40])
def test_another_protocol_version(shared_daemon: DaemonProcess, version: int) -> None:
    with Raw(shared_daemon.socket, hello=False) as raw:
        with pytest.raises(Refused) as caught:
            raw.call("hello", [version, "other", []])
        assert caught.value.code == "KV204"
        assert raw.last_words() == []


@pytest.mark.usefixtures("bystander")
def test_a_hello_too_many(shared_daemon: DaemonProcess) -> None:
    """More namespaces may be introduced at any time; with a wrong version or token the connection ends."""
    with Raw(shared_daemon.socket) as raw:
        session = raw.session
        assert raw.call("hello", [1, "again", []])[3] == session
        lease = raw.call("lease", [NS, b""])[0]
        assert lease
        assert raw.refusal("hello", [9, "again", []]) == "KV204"
        assert raw.last_words() == []
    until(shared_daemon.nothing_lent, "everything to be given back")


def test_names_of_clients_are_bounded(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket) as raw:
        assert raw.refusal("hello", [1, "x" * 201, []]) == "KV203"
        raw.call("hello", [1, "x" * 200, []])
        assert "x" * 200 in shared_daemon.stats()["clients"]


def test_many_namespaces_are_bounded(make_daemon: MakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle ones are forgotten, those with blocks are not; whoever comes back introduces itself again."""
    daemon = make_daemon().start()
    client = daemon.client()
    own = key(1)
    client.put(own, payload(own))
    before = daemon.own_memory()
    with Raw(daemon.socket, timeout_s=60) as raw:
        for n in range(40):
            names = [{"model": f"{n}/{i}" + "m" * 1000} for i in range(256)]
            raw.call("hello", [1, "namespaces", names])
    assert daemon.own_memory() - before < 48 * MIB
    assert len(client.lookup([own])) == 1
    assert client.lookup([own], namespace=Namespace(model="0/0" + "m" * 1000)) == []


def test_an_imposters_socket(workdir: Any) -> None:
    """Somebody else listens there: typed errors, no hanging, no memory."""
    path = str(workdir / "imposter")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 64, b"", struct.pack("<II", 5, 0) + b"\xc1" * 5):
        with KVStoreClient(path, namespace=NAMESPACE, timeout_s=0.3) as client:

            def serve(answer: bytes = answer) -> None:
                peer, _ = listening.accept()
                peer.recv(100)
                peer.sendall(answer)
                peer.close()

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(KVStoreError):
                client.lookup([])
            thread.join()
            assert client.boot is None
    listening.close()
