"""Sockets that nobody else can connect to at any moment, and what a dead daemon left behind."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.sockets import SocketDir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_directory_and_sockets_are_private(workdir: Path):
    path = workdir / "run" / "kv.sock"
    place = SocketDir(path)
    sock = place.bind()
    assert mode(path.parent) == 0o700
    assert mode(path) == 0o600
    assert connects(path)
    sock.close()
    place.close()
    assert not path.exists()


def test_a_socket_is_never_there_with_wider_permissions(workdir: Path):
    path = workdir / "run" / "kv.sock"
    place = SocketDir(path)
    seen: set[int] = set()
    ending = threading.Event()

    def look() -> None:
        while not ending.is_set():
            for found in (path, Path(f"{path}.new")):
                try:
                    seen.add(mode(found))
                except FileNotFoundError:
                    pass

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(300):
        place.bind().close()
    ending.set()
    watcher.join()
    place.close()
    assert seen <= {0o600}
    assert seen


def test_a_second_daemon_is_refused_and_the_first_goes_on(workdir: Path):
    path = workdir / "run" / "kv.sock"
    first = SocketDir(path)
    sock = first.bind()
    with pytest.raises(ConfigError, match="already listening"):
        SocketDir(path)
    assert connects(path)
    sock.close()
    first.close()
    SocketDir(path).close()


def test_what_a_dead_daemon_left_is_taken_over(workdir: Path):
    path = workdir / "run" / "kv.sock"
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert not connects(path)
    place = SocketDir(path)
    sock = place.bind()
    assert connects(path)
    sock.close()
    place.close()


def test_what_is_not_a_socket_is_left_alone(workdir: Path):
    path = workdir / "run" / "kv.sock"
    path.parent.mkdir(mode=0o700)
    path.write_text("somebody's file")
    place = SocketDir(path)
    with pytest.raises(ConfigError, match="is not a socket"):
        place.bind()
    place.close()
    assert path.read_text() == "somebody's file"


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777])
def test_a_directory_that_others_may_write_to_is_refused(workdir: Path, bits: int):
    path = workdir / "run" / "kv.sock"
    path.parent.mkdir()
    os.chmod(path.parent, bits)
    with pytest.raises(ConfigError, match="others may write"):
        SocketDir(path)


def test_a_sticky_directory_is_fine(workdir: Path):
    path = workdir / "run" / "kv.sock"
    path.parent.mkdir()
    os.chmod(path.parent, 0o1777)
    SocketDir(path).close()
