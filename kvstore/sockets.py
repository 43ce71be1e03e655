"""Bind the daemon's sockets so that nobody else can connect at any moment, and take over what a dead daemon left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from kvstore.errors import ConfigError


class SocketDir:
    """The directory of the daemon's sockets, locked while it is in use.

    Parameters
    ----------
    path : Path
        The main socket. Beside it stand ``<path>.fd`` (descriptors) and ``<path>.lock``.

    Raises
    ------
    ConfigError
        If the directory is not ours, or another daemon listens there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bound: list[Path] = []
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"listen.socket: {path.parent} cannot be made ({error.strerror}).") from None
        self._check_private(path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock = os.open(f"{path}.lock", flags, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"listen.socket: a daemon is already listening at {path}.",
                "Stop it, or give this one another --socket and --disk-path.",
            ) from None

    @staticmethod
    def _check_private(directory: Path) -> None:
        info = directory.stat()
        if info.st_uid not in (os.getuid(), 0):
            raise ConfigError(f"listen.socket: {directory} belongs to user {info.st_uid}, not to us.")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX:
            raise ConfigError(
                f"listen.socket: others may write into {directory}, so they could put a socket of theirs there.",
                f"chmod 700 {directory}, or choose another --socket.",
            )

    def bind(self, suffix: str = "", mode: int = 0o600) -> socket.socket:
        """A bound, listening, non-blocking Unix socket. It is never reachable with wider permissions than `mode`."""
        path = Path(f"{self.path}{suffix}")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"listen.socket: {path} exists and is not a socket.")
            path.unlink()  # left by a daemon that is gone: we hold the lock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Bound under another name and renamed once it listens: whoever finds the name can connect.
        early = f"{path}.new"
        old = os.umask(0o777 & ~mode)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(early)
            sock.bind(early)
            sock.listen(1024)
            os.rename(early, path)
        except OSError as error:
            sock.close()
            raise ConfigError(f"listen.socket: {path}: {error}.") from None
        finally:
            os.umask(old)
        sock.setblocking(False)
        self._bound.append(path)
        return sock

    def close(self) -> None:
        """Remove the sockets and let go of the lock."""
        for path in self._bound:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._bound.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
