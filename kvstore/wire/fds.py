"""Hand slab descriptors to clients.

Event loops cannot receive or send descriptors, so this is a socket of its own beside the main one: the client sends its
session token (16 bytes, from `hello`) and a slab id (u64 LE); the answer is the slab's size (u64 LE) with its
descriptor attached, or size 0 and none if the slab is not of the session's trust domain. Needed once a slab and
client. A connection that has not been handed anything by the end of the handshake time is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvstore.wire.frame import FD_REPLY, FD_REQUEST
from kvstore.wire.server import HANDSHAKE_S, peer_uid

if TYPE_CHECKING:
    from kvstore.arena import Arena
    from kvstore.leases import Session

ACCEPT_AGAIN_S = 0.2
"""How long to leave new connections waiting when there are no descriptors left for them."""

_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class FdServer:
    """Serves descriptors on a listening Unix socket.

    Parameters
    ----------
    sock : socket.socket
        Bound, listening and non-blocking.
    arena : Arena
        Owner of the slabs.
    find_session : callable
        Session of a token, or None.
    allow_uids : set of int
        Who may connect.
    max_connections : int
        Further ones are closed at once.
    """

    def __init__(
        self,
        sock: socket.socket,
        arena: Arena,
        find_session: Callable[[bytes], Session | None],
        allow_uids: set[int],
        max_connections: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._arena = arena
        self._find_session = find_session
        self._allow_uids = allow_uids
        self._max = max_connections
        self._peers: dict[socket.socket, bytearray] = {}
        self._silent: set[socket.socket] = set()
        self._listen()

    def _listen(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            peer, _ = self._sock.accept()
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:  # whoever waits keeps the socket readable: do not turn in circles
                self._loop.remove_reader(self._sock.fileno())
                self._loop.call_later(ACCEPT_AGAIN_S, self._listen)
            return
        if len(self._peers) >= self._max or peer_uid(peer) not in self._allow_uids:
            peer.close()
            return
        peer.setblocking(False)
        self._peers[peer] = bytearray()
        self._silent.add(peer)
        self._loop.call_later(HANDSHAKE_S, self._check_silent, peer)
        self._loop.add_reader(peer.fileno(), self._read, peer)

    def _check_silent(self, peer: socket.socket) -> None:
        if peer in self._silent:
            self._end(peer)

    def _read(self, peer: socket.socket) -> None:
        received = self._peers[peer]
        try:
            data = peer.recv(FD_REQUEST.size - len(received))
            if not data:
                self._end(peer)
                return
            received += data
            if len(received) == FD_REQUEST.size:
                token, slab_id = FD_REQUEST.unpack(received)
                received.clear()
                self._answer(peer, token, slab_id)
        except BlockingIOError:
            return
        except OSError:
            self._end(peer)

    def _answer(self, peer: socket.socket, token: bytes, slab_id: int) -> None:
        session = self._find_session(token)
        slab = self._arena.slab(slab_id)
        if session is None or session.remote or slab is None or slab.domain != session.domain:
            peer.send(FD_REPLY.pack(0))
            return
        self._silent.discard(peer)
        socket.send_fds(peer, [FD_REPLY.pack(slab.nbytes)], [slab.fd])
        self._arena.hold(slab_id, session.id)

    def _end(self, peer: socket.socket) -> None:
        self._loop.remove_reader(peer.fileno())
        del self._peers[peer]
        self._silent.discard(peer)
        peer.close()

    def close(self) -> None:
        """Stop serving."""
        with contextlib.suppress(ValueError, OSError):
            self._loop.remove_reader(self._sock.fileno())
        for peer in list(self._peers):
            self._end(peer)
        self._sock.close()
