"""Where a client looks for the daemon."""

from __future__ import annotations

import os

from kvstore import machine
from kvstore.errors import InvalidParams

Address = tuple[str, int] | str
"""(host, port), or the path of a Unix socket."""


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
