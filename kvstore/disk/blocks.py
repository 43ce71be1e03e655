"""Blocks as files: write one, read one, verify one, move one away. Runs in the tier's I/O threads; knows no index.

The way of a write: checksums, header, temporary file, one vectored write, rename. The way of a read: one vectored read
of header and payload straight into the caller's buffers, then header, identity and every checksum.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import stat
import time
from collections.abc import Iterable, Iterator, Sequence

from kvstore.disk.buffers import Scratch, as_bytes, image_of
from kvstore.disk.directory import Directory
from kvstore.disk.format import (
    PART_BYTES,
    Shape,
    block_name,
    check_payload,
    decode_header,
    encode_header,
    file_cost,
    part_sums,
    round_up,
)
from kvstore.disk.io import Files, is_plain, let_go, move, up_to
from kvstore.errors import CorruptBlock
from kvstore.types import BlockHeader, BlockId, Scope
from kvstore.under_way import UnderWay

PIECE_BYTES, SMALLEST_PIECE, PIECE_S = 2 << 20, 256 << 10, 0.01
"""What is read at once: as much as the last pieces came in that time, at most so much, by which a disk is as fast as in
one, and at least so much. Each that has come tells how fast the disk is now."""

DESCRIPTION = "namespace.json"
MAX_DESCRIPTION = 64 * 1024

_NOT_A_FILE = {errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENOTDIR, errno.EISDIR}


class ForeignFile(Exception):
    """A block's name stands for a link, a pipe, a directory or a file with a second name: nothing that we wrote."""


class WrongSize(CorruptBlock):
    """A block's file has another length than its name says."""


class TmpLeft(Exception):
    """A write failed and so did removing what it had written: the bytes are still on the disk, under `name`."""

    def __init__(self, name: str, cause: BaseException) -> None:
        self.name = name
        self.cause = cause if isinstance(cause, OSError) else OSError(repr(cause))
        super().__init__(f"tmp/{name} could not be removed")


class BlockFiles:
    """The files of a tier's blocks.

    Parameters
    ----------
    directory : Directory
        The open, locked directory.
    files : Files
        The system calls.
    """

    def __init__(self, directory: Directory, files: Files) -> None:
        self.directory = directory
        self.direct = directory.direct_io
        self._files = files
        self._scratch = Scratch()
        self._numbers = itertools.count(1)
        self.under_way = UnderWay(0)
        self._piece = PIECE_BYTES
        self.live_tmp: set[str] = set()

    # -- write ---------------------------------------------------------------------------------------------------------

    def write(
        self,
        block: BlockId,
        header: BlockHeader,
        shape: Shape,
        payload: Sequence[memoryview],
        durable: bool,
        taken: str = "",
    ) -> None:
        """Store a block under its name, at once or not at all.

        Parameters
        ----------
        taken : str
            What `take` answered: the block is written over that file instead of into a new one.

        Raises
        ------
        OSError
            From the kernel; nothing of the block is left.
        TmpLeft
            The same, but a temporary file is left.
        """
        image = image_of(as_bytes(payload), shape.nbytes, self._scratch)
        for theirs, ours in image.bounced:
            ours[:] = theirs
        image.padding[:] = bytes(len(image.padding))
        first = self._scratch.get("header", shape.offset)
        first[:] = encode_header(block, header, shape, part_sums(image.payload))
        name = block_name(block.key, shape)
        self._create(block.scope, name, [first, *image.buffers], self.direct, durable, taken)

    def _create(
        self, scope: Scope, name: str, buffers: list[memoryview], direct: bool, sync: bool, taken: str = ""
    ) -> None:
        """Write a file under a temporary name and then give it its own."""
        tmp_name = taken or self._new_tmp()
        made = bool(taken)
        try:
            fd = (self._files.open_taken if taken else self._files.create_tmp)(tmp_name, self.directory.tmp, direct)
            made = True
            try:
                move(self._files.write, fd, buffers)
                if sync:
                    self._files.sync(fd)
            finally:
                self._files.close(fd)
            self._publish(tmp_name, scope, name)
        except BaseException as error:
            if made:
                self._discard(tmp_name, scope, name, error)
            raise
        finally:
            self.live_tmp.discard(tmp_name)

    def _new_tmp(self) -> str:
        """A new name in ``tmp/``, known to be in use."""
        name = f"{next(self._numbers):x}"
        self.live_tmp.add(name)
        return name

    def take(self, block: BlockId, shape: Shape) -> str:
        """Move the file of a block that leaves into ``tmp/``, for `write` to put one of the same length over it.

        That spares the file system freeing and allocating. If the power fails before all of it is on the disk, the old
        name may come back with bytes of the new block: its header or a checksum will not fit.

        Returns
        -------
        str
            Its name there, or an empty text if there is no file that can be used so.
        """
        files, tmp, name = self._files, self.directory.tmp, block_name(block.key, shape)
        taken = ""
        try:
            with self._namespace(block.scope) as ns:
                info = files.stat_name(name, ns)
                if not is_plain(info) or info.st_size != shape.file_bytes:
                    return ""
                taken = self._new_tmp()
                files.publish(name, ns, taken, tmp)
                return taken
        except OSError:
            with contextlib.suppress(OSError):  # it may have been moved all the same
                self.give_up(taken)
            return ""

    def give_up(self, taken: str) -> None:
        """Remove a file that was taken and not written over."""
        if taken:
            self.live_tmp.discard(taken)
            self.forget_tmp(taken)

    def _publish(self, tmp_name: str, scope: Scope, name: str) -> None:
        for last_try in (False, True):
            try:
                with self._namespace(scope, make=True) as ns:
                    return self._files.publish(tmp_name, self.directory.tmp, name, ns)
            except FileNotFoundError:  # the directory was empty and was removed after we had opened it
                if last_try:
                    raise

    def _discard(self, tmp_name: str, scope: Scope, name: str, cause: BaseException) -> None:
        """Remove what a failed write left. The failed call may have been the rename, and it may have worked."""
        try:
            self._files.unlink(tmp_name, self.directory.tmp)
        except FileNotFoundError:
            try:
                self._unlink(scope, name)
            except OSError:
                raise TmpLeft(tmp_name, cause) from cause
        except OSError:
            raise TmpLeft(tmp_name, cause) from cause

    # -- read ----------------------------------------------------------------------------------------------------------

    def read(self, block: BlockId, shape: Shape, into: Sequence[memoryview], touch: bool) -> BlockHeader:
        """Read a block into the caller's buffers and verify it.

        Parameters
        ----------
        into : sequence of memoryview
            Together `shape.nbytes` long.
        touch : bool
            Whether to note the use in the file's times.

        Raises
        ------
        CorruptBlock
            If one byte of the file is not what was stored.
        FileNotFoundError, ForeignFile
            If there is no such file, or it is not one of ours.
        OSError
            From the kernel; says nothing about the block.
        """
        image = image_of(as_bytes(into), shape.nbytes, self._scratch)
        first = self._scratch.get("header", shape.offset)
        with self._open_checked(block, shape) as fd:
            move(self._read_piece, fd, [first, *image.buffers])
            header, sums = decode_header(first, block, shape)
            check_payload(image.payload, image.padding, sums)
            if touch:
                with contextlib.suppress(OSError):  # recency is a hint
                    self._files.touch(fd)
        for theirs, ours in image.bounced:
            theirs[:] = ours
        return header

    def _read_piece(self, fd: int, buffers: Sequence[memoryview], position: int) -> int:
        """As `Files.read`, a piece at most, and tell of it."""
        usual, left, began = self._piece, sum(map(len, buffers)), time.perf_counter()
        piece = usual if left > usual + SMALLEST_PIECE else left  # the header makes no piece of its own at the end
        with self.under_way.asking(piece):
            moved = self._files.read(fd, up_to(buffers, piece), position)
        if moved >= usual:  # less is no measure
            fits = moved * PIECE_S / max(time.perf_counter() - began, 1e-6)
            self._piece = round_up(int(min(max((usual + fits) / 2, SMALLEST_PIECE), PIECE_BYTES)))
        return moved

    def header(self, block: BlockId, shape: Shape) -> BlockHeader:
        """Read and verify a block's header alone. Raises like `read`."""
        first = self._scratch.get("header", shape.offset)
        with self._open_checked(block, shape) as fd:
            move(self._files.read, fd, [first])
            header, _ = decode_header(first, block, shape)
        return header

    def verify(self, block: BlockId, shape: Shape) -> None:
        """Read a block part by part and compare every byte, without room for the whole block. Raises like `read`."""
        first = self._scratch.get("header", shape.offset)
        part = self._scratch.get("part", PART_BYTES)
        with self._open_checked(block, shape) as fd:
            move(self._files.read, fd, [first])
            _, sums = decode_header(first, block, shape)
            for number, start in enumerate(range(0, shape.nbytes, PART_BYTES)):
                have = min(PART_BYTES, shape.nbytes - start)
                offset = shape.offset + start

                def step(fd: int, buffers: Sequence[memoryview], position: int, offset: int = offset) -> int:
                    return self._files.read(fd, buffers, offset + position)

                move(step, fd, [part[: round_up(have)]])
                check_payload([part[:have]], part[have : round_up(have)], sums[8 * number : 8 * number + 8])

    @contextlib.contextmanager
    def _open_checked(self, block: BlockId, shape: Shape) -> Iterator[int]:
        with self._namespace(block.scope) as ns:
            try:
                fd = self._files.open_block(block_name(block.key, shape), ns, self.direct)
            except OSError as error:
                if error.errno in _NOT_A_FILE:
                    raise ForeignFile(str(error)) from None
                raise
        try:
            info = self._files.stat(fd)
            if not is_plain(info):
                raise ForeignFile("not a regular file, or one with a second name")
            if info.st_size != shape.file_bytes:
                raise WrongSize(f"the file has {info.st_size} bytes, its name says {shape.file_bytes}.")
            yield fd
        finally:
            let_go(self._files, fd)

    # -- directories ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _namespace(self, scope: Scope, make: bool = False) -> Iterator[int]:
        """The open directory of a namespace."""
        files = self._files
        domain = self._open_dir(scope.domain, self.directory.blocks, make)
        try:
            ns = self._open_dir(scope.ns.hex(), domain, make)
        finally:
            let_go(files, domain)
        try:
            yield ns
        finally:
            let_go(files, ns)

    def _open_dir(self, name: str, at: int, make: bool) -> int:
        try:
            return self._files.open_dir(name, at)
        except FileNotFoundError:
            if not make:
                raise
        with contextlib.suppress(FileExistsError):
            self._files.make_dir(name, at)
        return self._files.open_dir(name, at)

    def sync_names(self, scopes: Iterable[Scope], new: Iterable[Scope]) -> None:
        """Wait until the names of these namespaces' files, and of the namespaces in `new`, survive a loss of power."""
        files = self._files
        for scope in scopes:
            with contextlib.suppress(FileNotFoundError), self._namespace(scope) as ns:  # dropped as a whole meanwhile
                files.sync_dir(ns)
        domains = {scope.domain for scope in new}
        for name in domains:
            domain = files.open_dir(name, self.directory.blocks)
            try:
                files.sync_dir(domain)
            finally:
                let_go(files, domain)
        if domains:
            files.sync_dir(self.directory.blocks)

    def harden(self, block: BlockId, shape: Shape) -> None:
        """Wait until the bytes of a stored block would survive a loss of power."""
        with self._open_checked(block, shape) as fd:
            self._files.sync(fd)

    # -- away ----------------------------------------------------------------------------------------------------------

    def remove(self, block: BlockId, shape: Shape) -> None:
        """Remove a block's file; fine if it is gone."""
        self._unlink(block.scope, block_name(block.key, shape))

    def _unlink(self, scope: Scope, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._namespace(scope) as ns:
            self._files.unlink(name, ns)

    def remove_namespace(self, scope: Scope) -> None:
        """Remove a namespace's directory and description, if there is nothing else in it."""
        files = self._files
        with contextlib.suppress(OSError):
            with self._namespace(scope) as ns, contextlib.suppress(FileNotFoundError):
                files.unlink(DESCRIPTION, ns)
            domain = files.open_dir(scope.domain, self.directory.blocks)
            try:
                files.remove_dir(scope.ns.hex(), domain)
            finally:
                let_go(files, domain)

    def set_aside(self, block: BlockId, shape: Shape) -> str:
        """Move a damaged file into quarantine; its name there."""
        name = f"{time.time_ns():016x}-{block.scope.domain}-{block.scope.ns.hex()}-{block_name(block.key, shape)}"
        with self._namespace(block.scope) as ns:
            self._files.publish(block_name(block.key, shape), ns, name, self.directory.quarantine)
        return name

    def forget_aside(self, name: str) -> None:
        """Remove a file from quarantine; fine if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(name, self.directory.quarantine)

    def forget_tmp(self, name: str) -> None:
        """Remove a temporary file; fine if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(name, self.directory.tmp)

    # -- descriptions --------------------------------------------------------------------------------------------------

    def describe(self, scope: Scope, text: bytes) -> None:
        """Write the description of a namespace, at once or not at all. Raises like `write`."""
        self._create(scope, DESCRIPTION, [memoryview(text)], direct=False, sync=True)

    def description(self, scope: Scope) -> bytes | None:
        """The description of a namespace, or None if there is none that we could have written."""
        try:
            with self._namespace(scope) as ns:
                fd = self._files.open_block(DESCRIPTION, ns, direct=False)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(self._files.stat(fd).st_mode):
                return None
            text = memoryview(bytearray(MAX_DESCRIPTION + 1))
            length = self._files.read(fd, [text], 0)
            return bytes(text[:length]) if 0 < length <= MAX_DESCRIPTION else None
        except OSError:
            return None
        finally:
            let_go(self._files, fd)


def description_cost(nbytes: int) -> int:
    """What a description takes of the budget."""
    return file_cost(nbytes)
