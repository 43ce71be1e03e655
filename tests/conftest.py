"""Fixtures: directories with short names, and daemons that never outlive the test that asked for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import TOKEN, Bystander, DaemonProcess, MakeDaemon, free_port
from hypothesis import settings

# The same examples every time, and no time limit on one of them: the machine may be busy.
settings.register_profile("kvstore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("kvstore")


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A directory of this test alone, with a name short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="kv-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def make_daemon(workdir: Path) -> Iterator[MakeDaemon]:
    """Makes daemons that are not started yet; parameters as of `DaemonProcess`."""
    made: list[DaemonProcess] = []

    def make(settings: dict[str, str] | None = None, constants: dict[str, Any] | None = None) -> DaemonProcess:
        root = workdir / str(len(made))
        root.mkdir()
        made.append(DaemonProcess(root, settings, constants))
        return made[-1]

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture(scope="module")
def tcp_port() -> int:
    """The port on which the shared daemon listens."""
    return free_port()


@pytest.fixture(scope="module")
def shared_daemon(tcp_port: int) -> Iterator[DaemonProcess]:
    """One daemon for the tests of a file that do it no harm; on a Unix socket and on TCP, without a disk tier."""
    root = Path(tempfile.mkdtemp(prefix="kv-"))
    daemon = DaemonProcess(root, {"listen.tcp": f"127.0.0.1:{tcp_port}", "listen.token": TOKEN})
    try:
        yield daemon.start()
    finally:
        daemon.close()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def bystander(shared_daemon: DaemonProcess) -> Iterator[Bystander]:
    """Another client of the shared daemon, at work all through the test, which fails if it notices anything."""
    with Bystander(shared_daemon.socket) as other:
        yield other
