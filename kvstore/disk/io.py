"""The only door to the disk: every system call on the tier's files is one method of `Files`.

Names are always relative to the descriptor of a directory, and no call follows a symbolic link. Tests and tools
subclass `Files` to fail, count, record or kill at the n-th call; nothing in here knows of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.disk.format import ALIGN

IOV_MAX = 1024
"""Buffers that one system call takes."""

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


class Listing(NamedTuple):
    """Names in a directory, by kind. `others` are links, pipes, sockets and devices."""

    files: list[str]
    dirs: list[str]
    others: list[str]


class Files:
    """The system calls of the disk tier. Each raises `OSError` as the kernel says."""

    def open_dir(self, name: str, at: int | None = None) -> int:
        """Open a directory that is not a symbolic link."""
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=at)

    def make_dir(self, name: str, at: int | None = None) -> None:
        """Make a directory that only we can enter."""
        os.mkdir(name, 0o700, dir_fd=at)

    def remove_dir(self, name: str, at: int) -> None:
        """Remove a directory if it is empty."""
        os.rmdir(name, dir_fd=at)

    def list_names(self, at: int) -> list[str]:
        """Names in an open directory, whatever they stand for."""
        return os.listdir(at)

    def list_dir(self, at: int) -> Listing:
        """Names in an open directory by kind. Slower by half than the names alone."""
        found = Listing([], [], [])
        with os.scandir(at) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    found.files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    found.dirs.append(entry.name)
                else:
                    found.others.append(entry.name)
        return found

    def open_lock(self, name: str, at: int) -> int:
        """Open or make the lock file."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _SAFE, 0o600, dir_fd=at)

    def lock(self, fd: int) -> None:
        """Take the lock for the life of `fd`; `BlockingIOError` if another process has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def create_tmp(self, name: str, at: int, direct: bool) -> int:
        """Make a new file for writing."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE | (os.O_DIRECT if direct else 0)
        return os.open(name, flags, 0o600, dir_fd=at)

    def open_taken(self, name: str, at: int, direct: bool) -> int:
        """Open a file that is there for overwriting."""
        return os.open(name, os.O_WRONLY | os.O_NONBLOCK | _SAFE | (os.O_DIRECT if direct else 0), dir_fd=at)

    def open_block(self, name: str, at: int, direct: bool) -> int:
        """Open a file for reading. A pipe does not block here; the caller looks at what it is."""
        return os.open(name, os.O_RDONLY | os.O_NONBLOCK | _SAFE | (os.O_DIRECT if direct else 0), dir_fd=at)

    def write(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """Write some of the buffers at a position; bytes written."""
        return os.pwritev(fd, buffers, position)

    def read(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """Read from a position into the buffers; bytes read."""
        return os.preadv(fd, buffers, position)

    def stat(self, fd: int) -> os.stat_result:
        """What an open file is."""
        return os.fstat(fd)

    def stat_name(self, name: str, at: int) -> os.stat_result:
        """What a name stands for, a link being a link."""
        return os.stat(name, dir_fd=at, follow_symlinks=False)

    def used_at(self, name: str, at: int) -> tuple[int, bool]:
        """When a file was last written or touched, in nanoseconds, and whether it is plain (`is_plain`)."""
        info = os.stat(name, dir_fd=at, follow_symlinks=False)
        return info.st_mtime_ns, is_plain(info)

    def touch(self, fd: int) -> None:
        """Set a file's times to now: recency that outlives a restart."""
        os.utime(fd)

    def sync(self, fd: int) -> None:
        """Wait until a file's bytes would survive a loss of power."""
        os.fdatasync(fd)

    def sync_dir(self, fd: int) -> None:
        """Wait until the names in a directory would survive a loss of power."""
        os.fsync(fd)

    def publish(self, source: str, source_at: int, name: str, at: int) -> None:
        """Give a finished file its name, at once or not at all."""
        os.rename(source, name, src_dir_fd=source_at, dst_dir_fd=at)

    def unlink(self, name: str, at: int) -> None:
        """Remove a file."""
        os.unlink(name, dir_fd=at)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)


def is_plain(info: os.stat_result) -> bool:
    """Whether this is a regular file with no other name."""
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 1


def let_go(files: Files, fd: int) -> None:
    """Close a descriptor that nothing was written through. The kernel frees it whatever it says."""
    with contextlib.suppress(OSError):
        files.close(fd)


def move(step: Callable[[int, Sequence[memoryview], int], int], fd: int, buffers: Sequence[memoryview]) -> None:
    """Call `step` (`Files.read` or `Files.write`) from position 0 until every byte of `buffers` is moved.

    All buffers but the last are multiples of `ALIGN` long. A step that moves less is continued at the last multiple of
    `ALIGN`, where direct I/O can go on.

    Raises
    ------
    OSError
        From the step, or EIO if it makes no progress.
    """
    total = sum(map(len, buffers))
    rest, position = list(buffers), 0
    while True:
        moved = step(fd, rest[:IOV_MAX], position)
        if position + moved >= total:
            return
        ahead = moved // ALIGN * ALIGN
        if ahead <= 0:
            raise OSError(errno.EIO, f"I/O stopped at byte {position + max(moved, 0)} of {total}")
        rest = _after(rest, ahead)
        position += ahead


def up_to(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of some buffers."""
    out: list[memoryview] = []
    for view in buffers:
        if nbytes <= 0:
            break
        out.append(view[:nbytes])
        nbytes -= len(view)
    return out


def _after(buffers: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of some buffers after their first `nbytes`."""
    for index, view in enumerate(buffers):
        if nbytes < len(view):
            return [view[nbytes:], *buffers[index + 1 :]]
        nbytes -= len(view)
    return []
