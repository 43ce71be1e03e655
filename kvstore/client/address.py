"""Where a client looks for the daemon, and whether it is still there."""

from __future__ import annotations

import os
import select
import socket

from kvstore import machine
from kvstore.errors import InvalidParams

Address = tuple[str, int] | str
"""(host, port), or the path of a Unix socket."""

CONNECT_AGAIN_S = 0.01
"""How long to wait before trying again to connect."""


def parse_address(address: str | None) -> Address:
    """A Unix socket's path, or (host, port) for ``tcp://host:port``.

    Default: KVSTORE_CLIENT_ADDRESS, else KVSTORE_SOCKET as for the daemon, else the socket of the user's own daemon.

    Raises
    ------
    InvalidParams
        If it is neither.
    """
    named = address or os.environ.get("KVSTORE_CLIENT_ADDRESS") or os.environ.get("KVSTORE_SOCKET")
    text = named or str(machine.default_socket(os.environ))
    if not text.startswith("tcp://"):
        return text.removeprefix("unix:")
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidParams(f"address: {text!r} is not tcp://host:port.", "")
    return host.strip("[]"), int(port)


def connect_unix(path: str) -> socket.socket | None:
    """A non-blocking socket connected to `path`, or None if the daemon has too many waiting: then try again.

    Raises
    ------
    OSError
        If nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BlockingIOError:
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def at_end(sock: socket.socket) -> bool:
    """Whether the daemon has closed its end. Costs a few microseconds, never waits."""
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN | select.POLLRDHUP)
        return any(event & ~select.POLLIN for _, event in poll.poll(0))
    except (OSError, ValueError):
        return True
