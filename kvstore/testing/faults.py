"""A disk that fails, counts, stalls or kills: subclasses of `kvstore.disk.io.Files` for tests and tools.

Every system call of the disk tier is a method of `Files`, so nothing in the tier has to know of any of this.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.disk.io import Files

OPERATIONS = tuple(name for name in vars(Files) if not name.startswith("_"))
"""Names of all system calls, in the order in which `Files` declares them."""


class WatchedFiles(Files):
    """Files that report each call, and change nothing.

    Attributes
    ----------
    calls : list of str
        Names of the calls so far, in the order in which they began.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def before(self, number: int, name: str) -> None:
        """Called before the `number`-th call (from 1) is made. May raise, sleep or kill."""

    def _note(self, name: str) -> int:
        with self._lock:
            self.calls.append(name)
            return len(self.calls)


def _watched(name: str) -> Callable[..., Any]:
    real = getattr(Files, name)

    def call(self: WatchedFiles, *args: Any, **kwargs: Any) -> Any:
        try:
            self.before(self._note(name), name)
        except OSError:
            if name == "close":  # the kernel frees the descriptor whatever it answers
                real(self, *args, **kwargs)
            raise
        return real(self, *args, **kwargs)

    call.__name__ = name
    return call


for _name in OPERATIONS:
    setattr(WatchedFiles, _name, _watched(_name))


class FaultyFiles(WatchedFiles):
    """Files of which the n-th call fails.

    Parameters
    ----------
    fail_at : int
        Number of the call that fails, from 1, counted from the last `arm`; 0 for none.
    error : int
        The errno it fails with.
    only : sequence of str
        Count only calls of these names; empty for all.
    lasting : bool
        Whether all later counted calls fail too.
    """

    def __init__(
        self, fail_at: int = 0, error: int = errno.EIO, only: Sequence[str] = (), lasting: bool = False
    ) -> None:
        super().__init__()
        self.failed: list[str] = []
        self.arm(fail_at, error, only, lasting)

    def arm(self, fail_at: int = 0, error: int = errno.EIO, only: Sequence[str] = (), lasting: bool = False) -> None:
        """Start counting anew, with another fault; without arguments nothing fails any more."""
        self._countdown = fail_at
        self._error = error
        self._only = frozenset(only)
        self._lasting = lasting

    def before(self, number: int, name: str) -> None:
        """Fail if it is this call's turn."""
        if self._only and name not in self._only:
            return
        with self._lock:
            if self._countdown > 1:
                self._countdown -= 1
                return
            if self._countdown == 0:
                return
            if not self._lasting:
                self._countdown = 0
            self.failed.append(name)
        raise OSError(self._error, f"injected: {os.strerror(self._error)}", name)


class ShortFiles(Files):
    """Files of which every read and write moves at most `most` bytes, as the kernel may.

    Parameters
    ----------
    most : int
        Bytes; a multiple of 4096 keeps direct I/O going.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def write(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """Write only the first bytes."""
        return super().write(fd, _first(buffers, self.most), position)

    def read(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """Read only the first bytes."""
        return super().read(fd, _first(buffers, self.most), position)


class KillingFiles(WatchedFiles):
    """Files that end the process, as SIGKILL does, before the n-th call, or before the n-th call of one name.

    Parameters
    ----------
    kill_at : int
        Number of the call, from 1.
    only : sequence of str
        Count only calls of these names; empty for all.
    """

    def __init__(self, kill_at: int, only: Sequence[str] = ()) -> None:
        super().__init__()
        self._countdown = kill_at
        self._only = frozenset(only)

    def before(self, number: int, name: str) -> None:
        """Die if it is this call's turn."""
        if self._only and name not in self._only:
            return
        self._countdown -= 1
        if self._countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class GatedFiles(WatchedFiles):
    """Files of which chosen calls wait at a gate: to hold a read or a write where a test wants it, or to hang a disk.

    Attributes
    ----------
    arrived : threading.Event
        Set when a call waits.
    gate : threading.Event
        Calls go on once it is set.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = frozenset(names)
        self.arrived = threading.Event()
        self.gate = threading.Event()

    def before(self, number: int, name: str) -> None:
        """Wait at the gate."""
        if name in self._names:
            self.arrived.set()
            self.gate.wait(30)


def _first(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of some buffers."""
    out: list[memoryview] = []
    for view in buffers:
        if nbytes <= 0:
            break
        out.append(view[:nbytes])
        nbytes -= len(out[-1])
    return out
