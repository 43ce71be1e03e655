"""Taking possession of the tier's directory: is it ours, is it free, is it a format we know.

<root>/LOCK          held while a daemon (or `kvstore check`) uses the directory
<root>/FORMAT        one line: the format's version; a directory with other things in it and no FORMAT is not ours
<root>/blocks/       see `kvstore.disk.format`
<root>/tmp/          files being written; emptied at start
<root>/quarantine/   damaged files, a bounded number, for whoever wants to know what happened
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kvstore.disk.buffers import aligned
from kvstore.disk.format import ALIGN, ENTRY_COST, FORMAT_VERSION
from kvstore.disk.io import Files, let_go, move
from kvstore.errors import DirectoryUnusable

FIXED_COST = 6 * (ALIGN + ENTRY_COST)
"""What an empty tier takes: root, blocks, tmp, quarantine, FORMAT, LOCK."""

_FORMAT_TEXT = f"kvstore disk tier, format {FORMAT_VERSION}\n".encode()
_OURS = {"LOCK", "FORMAT", "FORMAT.tmp", "blocks", "tmp", "quarantine", "lost+found"}


class Directory:
    """An open, locked directory of a disk tier.

    Attributes
    ----------
    blocks, tmp, quarantine : int
        Descriptors of the three directories.
    direct_io : bool
        Whether files are read and written around the page cache.
    direct_io_reason : str
        Why not, or an empty text.

    Raises
    ------
    DirectoryUnusable
        If the directory cannot be ours: a link, somebody else's, writable by others, of another format, in use.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self._files = files
        self._open: list[int] = []
        try:
            with self._explained():
                self._take(path)
        except BaseException:
            self.close()
            raise

    def _take(self, path: Path) -> None:
        files = self._files
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.make_dir(str(path))
        self.root = self._keep(files.open_dir(str(path)))
        self._check_owner(files.stat(self.root))
        lock = self._keep(files.open_lock("LOCK", self.root))
        if not stat.S_ISREG(files.stat(lock).st_mode):
            raise DirectoryUnusable(f"disk.path: {path}/LOCK is not a regular file.")
        try:
            files.lock(lock)
        except BlockingIOError:
            raise DirectoryUnusable(
                f"disk.path: {path} is in use by another kvstore process.", "Stop it, or choose another directory."
            ) from None
        self._check_format()
        self.blocks, self.tmp, self.quarantine = map(self._open_or_make, ("blocks", "tmp", "quarantine"))
        self._wipe_tmp()
        self.direct_io_reason = self._probe_direct()
        self.direct_io = not self.direct_io_reason

    def _keep(self, fd: int) -> int:
        self._open.append(fd)
        return fd

    def _check_owner(self, info: os.stat_result) -> None:
        if info.st_uid != os.geteuid():
            raise DirectoryUnusable(
                f"disk.path: {self.path} belongs to uid {info.st_uid}, the daemon runs as uid {os.geteuid()}."
            )
        if info.st_mode & 0o022:
            raise DirectoryUnusable(
                f"disk.path: {self.path} can be written by others (mode {stat.S_IMODE(info.st_mode):04o}).",
                f"Run `chmod 700 {self.path}` if it is meant for kvstore alone.",
            )

    def _check_format(self) -> None:
        """Read FORMAT, or write it into a directory that holds nothing of anybody else's."""
        files = self._files
        try:
            fd = files.open_block("FORMAT", self.root, direct=False)
        except FileNotFoundError:
            found = files.list_dir(self.root)
            foreign = sorted({*found.files, *found.dirs, *found.others} - _OURS)
            if foreign or "blocks" in found.dirs:
                what = ", ".join(foreign[:5] or ["blocks"])
                raise DirectoryUnusable(
                    f"disk.path: {self.path} has no FORMAT file but holds other things ({what})."
                ) from None
            self._write_format()
            return
        try:
            if not stat.S_ISREG(files.stat(fd).st_mode):
                raise DirectoryUnusable(f"disk.path: {self.path}/FORMAT is not a regular file.")
            text = memoryview(bytearray(256))
            length = files.read(fd, [text], 0)
        finally:
            let_go(files, fd)
        if bytes(text[:length]) != _FORMAT_TEXT:
            raise DirectoryUnusable(
                f"disk.path: {self.path}/FORMAT says {bytes(text[:length])!r}, this build knows {_FORMAT_TEXT!r}.",
                "Use the kvstore release that wrote it, or choose another directory.",
            )

    def _write_format(self) -> None:
        files = self._files
        with contextlib.suppress(FileNotFoundError):
            files.unlink("FORMAT.tmp", self.root)
        fd = files.create_tmp("FORMAT.tmp", self.root, direct=False)
        try:
            move(files.write, fd, [memoryview(_FORMAT_TEXT)])
            files.sync(fd)
        finally:
            files.close(fd)
        files.publish("FORMAT.tmp", self.root, "FORMAT", self.root)
        files.sync_dir(self.root)

    def _open_or_make(self, name: str) -> int:
        with contextlib.suppress(FileExistsError):
            self._files.make_dir(name, self.root)
        return self._keep(self._files.open_dir(name, self.root))

    def _wipe_tmp(self) -> None:
        """What was being written when the last daemon ended is of no use to anybody."""
        for name in self._files.list_dir(self.tmp).files:
            self._files.unlink(name, self.tmp)

    def _probe_direct(self) -> str:
        """Why direct I/O does not work here; empty if it does."""
        files, page, name = self._files, aligned(ALIGN), "probe"
        try:
            fd = files.create_tmp(name, self.tmp, direct=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # some file systems make the file and then refuse
                files.unlink(name, self.tmp)
            return "the file system refuses O_DIRECT"
        try:
            files.write(fd, [page], 0)
        except OSError as error:
            return f"a direct write failed ({error.strerror})"
        finally:
            files.close(fd)
            files.unlink(name, self.tmp)
        return ""

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the kernel says into what the operator can do."""
        try:
            yield
        except NotADirectoryError:
            raise DirectoryUnusable(f"disk.path: {self.path} is not a directory, or a symbolic link.") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DirectoryUnusable(f"disk.path: {self.path} holds a symbolic link.") from None
            raise DirectoryUnusable(f"disk.path: {self.path} cannot be used: {error.strerror or error}.") from error

    def close(self) -> None:
        """Let go of the descriptors, and with them of the lock."""
        while self._open:
            let_go(self._files, self._open.pop())
