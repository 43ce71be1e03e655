"""Connections that say what they like to the daemon of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from daemons import DaemonProcess, Raw, until


@pytest.fixture
def raw(shared_daemon: DaemonProcess) -> Iterator[Raw]:
    with Raw(shared_daemon.socket) as raw:
        yield raw
    until(shared_daemon.nothing_lent, "everything to be given back")


@pytest.fixture
def other(shared_daemon: DaemonProcess) -> Iterator[Raw]:
    with Raw(shared_daemon.socket) as other:
        yield other
