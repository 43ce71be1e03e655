"""Meeting a Redis server for `kvstore doctor`: one connection, three commands, nothing written."""

from __future__ import annotations

import re
import socket
import ssl
from urllib.parse import unquote, urlsplit

OLDEST = (6, 2)
"""Oldest server that the Redis tier was tried with."""


def server_version(url: str, timeout_s: float) -> tuple[str, tuple[int, ...]]:
    """Name and version of the server behind a URL.

    Raises
    ------
    OSError
        With what is wrong, in words: it is not there, does not speak Redis, or refuses the user.
    """
    parts = urlsplit(url)
    with _connect(parts.scheme, parts.hostname or "localhost", parts.port or 6379, parts.path, timeout_s) as sock:
        if parts.password is not None:
            user = [unquote(parts.username)] if parts.username else []
            _ask(sock, "AUTH", *user, unquote(parts.password))
        _ask(sock, "PING")
        info = _ask(sock, "INFO", "server")
    for name in ("valkey_version", "redis_version"):
        found = re.search(rf"^{name}:([0-9.]+)", info, re.M)
        if found:
            return name.partition("_")[0], tuple(int(part) for part in found[1].split(".") if part)
    raise OSError("it does not say which version it is")


def _connect(scheme: str, host: str, port: int, path: str, timeout_s: float) -> socket.socket:
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        sock.connect(unquote(path))
        return sock
    sock = socket.create_connection((host, port), timeout_s)
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host) if scheme == "rediss" else sock


def _ask(sock: socket.socket, *words: str) -> str:
    """One command, and its answer as text."""
    encoded = [word.encode() for word in words]
    sock.sendall(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
    with sock.makefile("rb") as answer:
        head = answer.readline(4096).decode("utf-8", "replace").rstrip()
        if head.startswith("-"):
            raise OSError(f"{words[0]}: {head[1:]}")
        if head.startswith("+"):
            return head[1:]
        if not re.fullmatch(r"\$\d{1,6}", head):
            raise OSError("what answers is not Redis")
        return answer.read(int(head[1:])).decode("utf-8", "replace")
