"""The daemon's memory, mapped into this process."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConnectionLost, ForeignHandle
from kvstore.memory import populate
from kvstore.wire.frame import FD_REPLY, FD_REQUEST

Bytes = NDArray[np.uint8]


class SlabMap:
    """Slabs of one session, mapped when first needed and kept until the session ends.

    Parameters
    ----------
    path : str
        The daemon's descriptor socket.
    token : bytes
        Session token from `hello`.
    timeout_s : float
        Time the daemon has for an answer.
    """

    def __init__(self, path: str, token: bytes, timeout_s: float) -> None:
        self._path = path
        self._token = token
        self._timeout_s = timeout_s
        self._slabs: dict[int, Bytes] = {}
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def missing(self, extents: Iterable[tuple[int, int, int]]) -> bool:
        """Whether a slab of these extents is not mapped yet."""
        return any(slab not in self._slabs for slab, _, _ in extents)

    def parts(self, extents: Iterable[tuple[int, int, int]]) -> list[Bytes]:
        """The memory of some extents, as views. Maps slabs that are not mapped yet, which asks the daemon.

        Raises
        ------
        ForeignHandle
            If the daemon does not hand out a slab, or an extent lies outside of one.
        ConnectionLost
            If the daemon is gone.
        """
        out: list[Bytes] = []
        for slab_id, offset, nbytes in extents:
            slab = self._slabs.get(slab_id)
            if slab is None:
                slab = self._map(slab_id)
            if offset < 0 or nbytes < 0 or offset + nbytes > len(slab):
                raise ForeignHandle(f"an extent of {nbytes} bytes at {offset} lies outside slab {slab_id}.")
            out.append(slab[offset : offset + nbytes])
        return out

    def _map(self, slab_id: int) -> Bytes:
        with self._lock:
            if slab_id in self._slabs:
                return self._slabs[slab_id]
            fd, nbytes = self._request(slab_id)
            try:
                mapping = mmap.mmap(fd, nbytes)
            finally:
                os.close(fd)
            # The daemon has touched the memory already; this only fills our page tables, without holding the GIL.
            threading.Thread(target=populate, args=(mapping,), name="kvstore-populate", daemon=True).start()
            self._slabs[slab_id] = slab = np.frombuffer(mapping, dtype=np.uint8)
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
