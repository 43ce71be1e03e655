"""Slabs are capabilities: descriptors go to sessions of their trust domain, and no client changes size or seals."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct

import pytest
from daemons import NS, TOKEN, DaemonProcess, Raw, key, payload, store, until

F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8


class Fds:
    """A connection to the descriptor socket, by hand."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(f"{daemon.socket}.fd")

    def ask(self, token: bytes, slab: int) -> tuple[int, list[int]]:
        self.sock.sendall(struct.pack("<16sQ", token, slab))
        return self.answer()

    def answer(self) -> tuple[int, list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 8, 4)
        return struct.unpack("<Q", data)[0], list(fds)

    def __enter__(self) -> Fds:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


@pytest.fixture
def slab(shared_daemon: DaemonProcess, raw: Raw) -> int:
    """A slab of the shared daemon."""
    own = key(1, "slab")
    store(shared_daemon.client(), [own])
    lease, _, granted, _, _ = raw.call("lease", [NS, own])
    raw.call("release", [[lease]])
    return granted[0][3][0][0]


def test_a_session_is_handed_its_slab(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        for _ in range(3):
            nbytes, (fd,) = fds.ask(raw.session, slab)
            assert os.fstat(fd).st_size == nbytes == 1 << 20
            os.close(fd)


@pytest.mark.parametrize("wrong", ["token", "slab", "both"])
def test_others_are_handed_nothing(shared_daemon: DaemonProcess, raw: Raw, slab: int, wrong: str) -> None:
    token = raw.session if wrong == "slab" else b"not such a token"
    with Fds(shared_daemon) as fds:
        for number in (slab,) if wrong == "token" else (0, 999_999, (1 << 64) - 1):
            assert fds.ask(token, number) == (0, [])
        nbytes, held = fds.ask(raw.session, slab)  # the connection is still good
        assert nbytes
        os.close(held[0])


def test_a_closed_session_is_handed_nothing(shared_daemon: DaemonProcess, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        with Raw(shared_daemon.socket) as gone:
            nbytes, held = fds.ask(gone.session, slab)
            assert nbytes
            os.close(held[0])
        until(lambda: fds.ask(gone.session, slab) == (0, []), "the session to end")


def test_a_remote_session_is_handed_nothing(shared_daemon: DaemonProcess, tcp_port: int, slab: int) -> None:
    with Fds(shared_daemon) as fds, Raw(("127.0.0.1", tcp_port), token=TOKEN) as far:
        assert fds.ask(far.session, slab) == (0, [])


def test_requests_in_pieces(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    request = struct.pack("<16sQ", raw.session, slab)
    with Fds(shared_daemon) as fds:
        for n in range(len(request)):
            fds.sock.sendall(request[n : n + 1])
        nbytes, (fd,) = fds.answer()
        os.close(fd)
        fds.sock.sendall(request * 3 + request[:10])
        for _ in range(3):
            nbytes, (fd,) = fds.answer()
            assert nbytes == 1 << 20
            os.close(fd)


def test_a_slab_cannot_be_resized_or_sealed_by_a_client(shared_daemon: DaemonProcess, raw: Raw, slab: int) -> None:
    with Fds(shared_daemon) as fds:
        nbytes, (fd,) = fds.ask(raw.session, slab)
    try:
        for size in (0, nbytes - 4096, nbytes + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_WRITE)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
        with pytest.raises(PermissionError):
            os.posix_fallocate(fd, nbytes, 4096)  # growing by another way
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # and through another door
        with pytest.raises(PermissionError):
            os.ftruncate(again, 0)
        os.close(again)
    finally:
        os.close(fd)


def test_a_mapping_shows_what_was_stored(shared_daemon: DaemonProcess, raw: Raw) -> None:
    own = key(2, "mapped")
    store(shared_daemon.client(), [own])
    _, _, granted, _, _ = raw.call("lease", [NS, own])
    ((number, offset, nbytes),) = granted[0][3]
    with Fds(shared_daemon) as fds:
        size, (fd,) = fds.ask(raw.session, number)
    with mmap.mmap(fd, size) as mapping:
        assert mapping[offset : offset + nbytes] == payload(own)
    os.close(fd)
