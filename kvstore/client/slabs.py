"""The daemon's memory, mapped into this process."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import weakref
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConnectionLost, ForeignHandle
from kvstore.memory import populate
from kvstore.wire.frame import FD_REPLY, FD_REQUEST

Bytes = NDArray[np.uint8]
Extents = Iterable[tuple[int, int, int]]
"""(slab, offset, bytes) of the parts of a block."""


class SlabNotMapped(Exception):
    """A slab was met for the first time. Never leaves the client."""


_mapped: weakref.WeakValueDictionary[tuple[bytes, int], Bytes] = weakref.WeakValueDictionary()
"""Slabs mapped in this process, by the daemon's life and their ids: its clients share them, and what pins them."""
_mapping = threading.Lock()


class SlabMap:
    """Slabs of one session, mapped when first needed and kept until the session ends.

    Parameters
    ----------
    path : str
        The daemon's descriptor socket.
    token : bytes
        Session token from `hello`.
    boot : bytes
        Which life of the daemon this is, from `hello`: ids of slabs are not used twice in one.
    timeout_s : float
        Time the daemon has for an answer.
    """

    def __init__(self, path: str, token: bytes, boot: bytes, timeout_s: float) -> None:
        self._path = path
        self._token = token
        self._boot = boot
        self._timeout_s = timeout_s
        self._slabs: dict[int, Bytes] = {}
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def parts(self, extents: Extents, nbytes: int) -> list[Bytes]:
        """The memory of a block of `nbytes`, as views of its extents.

        Raises
        ------
        SlabNotMapped
            If `map` has to be called first.
        ForeignHandle
            If an extent lies outside its slab, or they do not hold that many bytes.
        """
        out: list[Bytes] = []
        left = nbytes
        for slab_id, offset, length in extents:
            slab = self._slabs.get(slab_id)
            if slab is None:
                raise SlabNotMapped
            part = slab[offset : offset + length]
            if len(part) != length or offset < 0:
                raise ForeignHandle(f"an extent of {length} bytes at {offset} lies outside slab {slab_id}.")
            out.append(part)
            left -= length
        if left:
            raise ForeignHandle(f"the extents of a block of {nbytes} bytes hold {nbytes - left}.")
        return out

    def whole(self, slab_ids: Iterable[int]) -> list[Bytes]:
        """Slabs that are mapped."""
        return [self._slabs[slab_id] for slab_id in slab_ids if slab_id in self._slabs]

    def map(self, extents: Extents) -> None:
        """Map the slabs of some extents, which asks the daemon for those that are not mapped yet.

        Raises
        ------
        ForeignHandle
            If the daemon does not hand out a slab.
        ConnectionLost
            If the daemon is gone.
        """
        for slab_id in {slab_id for slab_id, _, _ in extents}:
            if slab_id not in self._slabs:
                self._map(slab_id)

    def _map(self, slab_id: int) -> None:
        with self._lock:
            if slab_id in self._slabs:
                return
            fd, nbytes = self._request(slab_id)  # also says whether this session may have it
            try:
                self._slabs[slab_id] = self._share(slab_id, fd, nbytes)
            finally:
                os.close(fd)

    def _share(self, slab_id: int, fd: int, nbytes: int) -> Bytes:
        """The mapping of a slab, a new one only if no client of this process has it."""
        with _mapping:
            slab = _mapped.get((self._boot, slab_id))
            if slab is None or len(slab) != nbytes:
                mapping = mmap.mmap(fd, nbytes)
                slab = np.frombuffer(mapping, dtype=np.uint8)
                _mapped[self._boot, slab_id] = slab
                # The daemon has touched the memory already; this only fills our page tables, without holding the GIL.
                threading.Thread(target=populate, args=(mapping,), name="kvstore-populate", daemon=True).start()
            return slab

    def _request(self, slab_id: int) -> tuple[int, int]:
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(self._timeout_s)
                self._socket.connect(self._path)
            self._socket.sendall(FD_REQUEST.pack(self._token, slab_id))
            data, fds, _, _ = socket.recv_fds(self._socket, FD_REPLY.size, 1)
        except OSError as error:
            self.close()
            raise ConnectionLost(f"the daemon's descriptor socket {self._path} does not answer ({error}).") from None
        if len(data) != FD_REPLY.size or not fds:
            for fd in fds:
                os.close(fd)
            raise ForeignHandle(f"the daemon does not hand out slab {slab_id} to this connection.")
        return fds[0], FD_REPLY.unpack(data)[0]

    def close(self) -> None:
        """Close the socket. Mappings go when the last view of them goes."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
