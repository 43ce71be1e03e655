"""Who may read or fill which memory, until when: sessions, leases, reservations.

A session is one connection. Leases and reservations belong to it and end with it. Each has an id, an owner and an
expiry; nothing is counted anonymously, so nothing can be released twice or by somebody else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.errors import ForeignHandle, LeaseExpired
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockHeader, BlockId, Extent, Scope
from kvstore.wire.messages import Message

GRACE_S = 1.0
"""How much longer than promised a lease is honoured: a client's clock started when it sent the request."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """One connection.

    Attributes
    ----------
    id : int
        Never reused in one life of the daemon.
    token : bytes
        Secret that proves the session on the descriptor socket.
    domain : str
        Trust domain it was authenticated for.
    remote : bool
        No shared memory: payloads travel in frames.
    notify : callable
        Sends a notice, unless the connection is gone.
    lent : int
        Blocks in its leases, each as often as it was lent.
    """

    id: int
    domain: str
    remote: bool
    notify: Callable[[str, Message], None]
    name: str = ""
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    greeted: bool = False
    lent: int = 0
    leases: dict[int, Lease] = field(default_factory=dict)
    reservations: dict[int, Reservation] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Lease:
    """The right to read blocks. `blocks` is by index in the request; blocks still on their way up join later.

    `ends` are called when it ends: what else was lent with it goes back.
    """

    id: int
    session: Session
    scope: Scope
    expires: float
    blocks: dict[int, HostBlock] = field(default_factory=dict)
    pending: int = 0
    ended: bool = False
    ends: list[Callable[[], None]] = field(default_factory=list)

    def wanted(self) -> bool:
        """Whether blocks on their way up are still wanted."""
        return not self.ended


@dataclass(slots=True, eq=False)
class Place:
    """Memory lent for one block that is being filled."""

    block: BlockId
    header: BlockHeader
    header_bytes: bytes
    nbytes: int
    extents: tuple[Extent, ...]
    filled: bool = False


@dataclass(slots=True, eq=False)
class Reservation:
    """The right to fill memory. What is in it is invisible until committed.

    When it expires the right ends, but the memory is not given to others while its owner is connected: a copy that is
    still running must not land in somebody else's block.
    """

    id: int
    session: Session
    expires: float
    places: dict[int, Place] = field(default_factory=dict)


class Ledger:
    """All sessions, leases and reservations.

    Parameters
    ----------
    host : HostTier
        Owner of the memory that is lent.
    """

    def __init__(self, host: HostTier) -> None:
        self._host = host
        # Not from 1: what a client was lent by the daemon before this one must not be a handle of this one.
        self._next = secrets.randbits(62)
        self.sessions: dict[int, Session] = {}
        self.by_token: dict[bytes, Session] = {}
        self.leases: dict[int, Lease] = {}
        self.reservations: dict[int, Reservation] = {}
        self.in_flight: dict[BlockId, Reservation] = {}
        self.expired = 0

    def _id(self) -> int:
        self._next += 1
        return self._next

    # -- sessions ------------------------------------------------------------------------------------------------------

    def open(self, domain: str, remote: bool, notify: Callable[[str, Message], None]) -> Session:
        """Begin a session for a new connection."""
        session = Session(self._id(), domain, remote, notify)
        self.sessions[session.id] = session
        self.by_token[session.token] = session
        return session

    def close(self, session: Session) -> None:
        """End a session with everything that belongs to it. May be called twice."""
        if self.sessions.pop(session.id, None) is None:
            return
        del self.by_token[session.token]
        for lease in list(session.leases.values()):
            self.end_lease(lease)
        for reservation in list(session.reservations.values()):
            self.end_reservation(reservation)
        self._host.arena.unhold(session.id)

    # -- leases --------------------------------------------------------------------------------------------------------

    def new_lease(self, session: Session, scope: Scope, ttl_s: float) -> Lease:
        """An empty lease."""
        lease = Lease(self._id(), session, scope, time.monotonic() + ttl_s + GRACE_S)
        self.leases[lease.id] = session.leases[lease.id] = lease
        return lease

    def lend(self, lease: Lease, blocks: dict[int, HostBlock]) -> None:
        """Add blocks to a lease, by index."""
        self._host.acquire(blocks.values())
        lease.blocks |= blocks
        lease.session.lent += len(blocks)

    def lease(self, session: Session, lease_id: int) -> Lease:
        """A lease of this session.

        Raises
        ------
        ForeignHandle, LeaseExpired
        """
        lease = session.leases.get(lease_id)
        if lease is None:
            raise ForeignHandle(f"lease {lease_id} does not belong to this connection, or has ended.")
        if lease.expires < time.monotonic():
            raise LeaseExpired(f"lease {lease_id} has expired.")
        return lease

    def end_lease(self, lease: Lease) -> None:
        """Give back what a lease holds."""
        lease.ended = True
        del self.leases[lease.id], lease.session.leases[lease.id]
        lease.session.lent -= len(lease.blocks)
        self._host.unacquire(lease.blocks.values())
        lease.blocks.clear()
        while lease.ends:
            lease.ends.pop()()

    # -- reservations --------------------------------------------------------------------------------------------------

    def new_reservation(self, session: Session, ttl_s: float) -> Reservation:
        """An empty reservation."""
        reservation = Reservation(self._id(), session, time.monotonic() + ttl_s + GRACE_S)
        self.reservations[reservation.id] = session.reservations[reservation.id] = reservation
        return reservation

    def reserve(self, reservation: Reservation, index: int, place: Place) -> None:
        """Add lent memory to a reservation."""
        reservation.places[index] = place
        self.in_flight[place.block] = reservation

    def reservation(self, session: Session, reservation_id: int) -> Reservation:
        """A reservation of this session, expired or not; raises `ForeignHandle`."""
        reservation = session.reservations.get(reservation_id)
        if reservation is None:
            raise ForeignHandle(f"reservation {reservation_id} does not belong to this connection, or has ended.")
        return reservation

    def take(self, reservation: Reservation, index: int) -> Place:
        """Take a place out of a reservation; its memory is the caller's to insert or free."""
        place = reservation.places.pop(index)
        if self.in_flight.get(place.block) is reservation:
            del self.in_flight[place.block]
        return place

    def end_reservation(self, reservation: Reservation) -> None:
        """Give back all memory of a reservation."""
        for index in list(reservation.places):
            place = self.take(reservation, index)
            self._host.free(place.extents, len(place.header_bytes))
        del self.reservations[reservation.id]
        reservation.session.reservations.pop(reservation.id, None)

    # -- time ----------------------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """End leases whose time is over; let others store what expired reservations were to hold."""
        now = time.monotonic()
        for lease in [lease for lease in self.leases.values() if lease.expires < now]:
            self.end_lease(lease)
            self.expired += 1
        for reservation in self.reservations.values():
            if reservation.expires < now:
                for place in reservation.places.values():
                    if self.in_flight.get(place.block) is reservation:
                        del self.in_flight[place.block]
