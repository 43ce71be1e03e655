"""What engines store: from an offer over lent memory to a block that is acknowledged and readable.

A reservation lends memory for blocks that nobody sees yet; its owner fills it and commits. Of each block is said what
became of it: stored, there already, on its way by somebody else, or why it was dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from kvstore.chain import TierChain
from kvstore.chunks.index import check_chunk
from kvstore.desk import Desk
from kvstore.errors import ForeignHandle, InvalidParams, LeaseExpired
from kvstore.leases import Ledger, Place, Reservation, Session
from kvstore.namespaces import NamespaceRegistry
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockHeader, BlockId, DropReason, Namespace, Scope, Stored
from kvstore.wire import messages as m

Accepts = Callable[[Namespace, BlockHeader, Sequence[memoryview]], bool]
"""Whether a payload may be kept under its name."""

_header = msgspec.msgpack.Decoder(BlockHeader)
_Offers = deque[tuple[int, m.Offer, BlockHeader]]


class StoreDesk:
    """Reservations and commits over a tier chain.

    Parameters
    ----------
    ledger : Ledger
        Where reservations are kept.
    chain : TierChain
    namespaces : NamespaceRegistry
    desk : Desk
        Told of what was offered and refused.
    max_block_bytes : int
        Largest payload of a block.
    max_ttl_s : float
        Longest reservation.
    accepts : callable, optional
        Whether a payload may be kept under its name; without it any may.
    """

    def __init__(
        self,
        ledger: Ledger,
        chain: TierChain,
        namespaces: NamespaceRegistry,
        desk: Desk,
        max_block_bytes: int,
        max_ttl_s: float,
        accepts: Accepts | None,
    ) -> None:
        self.chain = chain
        self.host = chain.host
        self.ledger = ledger
        self.namespaces = namespaces
        self.desk = desk
        self._max_block_bytes = max_block_bytes
        self._max_ttl_s = max_ttl_s
        self._accepts = accepts

    # -- reserve -------------------------------------------------------------------------------------------------------

    def reserve(self, session: Session, p: m.Reserve) -> m.ReserveReply | Awaitable[m.ReserveReply]:
        """Lend memory for new blocks, evicting; or say of each block why not."""
        record = self.namespaces.find(session.domain, p.ns)
        todo = deque((i, offer, self._decode_header(i, offer, p.ns)) for i, offer in enumerate(p.blocks))
        ttl_s = min(p.ttl_s, self._max_ttl_s)
        reservation = self.ledger.new_reservation(session, ttl_s + p.wait_s)
        reply = m.ReserveReply(reservation.id, ttl_s, [], [])
        self._lend_rooms(reservation, record.scope, todo, reply, p.wait_s > 0)
        if todo:
            return self._reserve_later(reservation, record.scope, todo, reply, time.monotonic() + p.wait_s)
        return self._reserved(reservation, reply)

    async def _reserve_later(
        self, reservation: Reservation, scope: Scope, todo: _Offers, reply: m.ReserveReply, deadline: float
    ) -> m.ReserveReply:
        while todo:
            await self.chain.progress(max(0.0, deadline - time.monotonic()))
            if reservation.id not in self.ledger.reservations:  # gone with its connection while it waited
                return m.ReserveReply(reservation.id, 0.0, [], [])
            self._lend_rooms(reservation, scope, todo, reply, time.monotonic() < deadline)
        return self._reserved(reservation, reply)

    def _lend_rooms(
        self, reservation: Reservation, scope: Scope, todo: _Offers, reply: m.ReserveReply, wait: bool
    ) -> None:
        """Answer offers in order, and take them out of `todo`. With `wait`, stop at one that may get room later."""
        # Bytes of a block and of its header for which there was no room; nor is there for one that is no smaller.
        full: tuple[int, int] | None = None
        while todo:
            index, offer, header = todo[0]
            block = BlockId(scope, offer.key)
            status = self._refusal(block, offer)
            if status is None:
                size = offer.nbytes, len(offer.header)
                hopeless = full is not None and size[0] >= full[0] and size[1] >= full[1]
                extents = None if hopeless else self.host.allocate(scope.domain, *size, scope, new=True)
                if extents is not None:
                    self.ledger.reserve(reservation, index, Place(block, header, offer.header, offer.nbytes, extents))
                    reply.rooms.append(m.Room(index, () if reservation.session.remote else extents))
                elif wait and self.chain.dirty_blocks:
                    return
                else:
                    full = full if hopeless else size
                    status = self.host.why_full(scope, offer.nbytes).value
            self.desk.offered(scope, offer.key, offer.nbytes)
            if status is not None:
                self._refused(block, status)
                reply.others.append(m.NoRoom(index, status))
            todo.popleft()

    def _reserved(self, reservation: Reservation, reply: m.ReserveReply) -> m.ReserveReply:
        if not reply.rooms:
            self.ledger.end_reservation(reservation)
        return reply

    def _refused(self, block: BlockId, status: str) -> None:
        self._count_refused(status)
        if status not in ("exists", DropReason.IN_FLIGHT):
            self.desk.departures.refused(block, status)

    def _count_refused(self, status: str) -> None:
        if status == "exists":
            self.host.counters.exists += 1
        else:
            self.host.counters.drop(status)

    def _refusal(self, block: BlockId, offer: m.Offer) -> str | None:
        if self.host.get(block) is not None or self.chain.find_below(block.scope, block.key) is not None:
            return "exists"
        if block in self.ledger.in_flight:
            return DropReason.IN_FLIGHT.value
        if offer.nbytes > min(self._max_block_bytes, self.host.arena.capacity):
            return DropReason.TOO_LARGE.value
        return None

    def _decode_header(self, index: int, offer: m.Offer, ns: bytes) -> BlockHeader:
        try:
            header = _header.decode(offer.header)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidParams(f"reserve: header of block {index}: {error}.") from None
        check_chunk(ns, offer.key, header)
        return header

    # -- commit --------------------------------------------------------------------------------------------------------

    def commit(self, session: Session, p: m.Commit) -> m.CommitReply | Awaitable[m.CommitReply]:
        """Make filled blocks visible. What is acknowledged is readable when the reply is sent."""
        reservation = self.ledger.reservation(session, p.reservation)
        if len(set(p.indexes)) != len(p.indexes):
            raise InvalidParams("commit: an index is named twice.")
        foreign = [index for index in p.indexes if index not in reservation.places]
        if foreign:
            raise ForeignHandle(f"commit: block {foreign[0]} is not part of reservation {p.reservation}.")
        if reservation.expires < time.monotonic():
            self.ledger.end_reservation(reservation)
            for _ in p.indexes:
                self._count_refused(DropReason.EXPIRED.value)
            raise LeaseExpired(f"reservation {p.reservation} has expired; nothing was stored.")
        outcomes: list[m.Outcome] = []
        writes: list[tuple[int, list[asyncio.Future[Any]]]] = []
        for index in p.indexes:
            status, queued = self._commit_one(reservation, index, p.durable)
            outcomes.append(m.Outcome(index, status))
            if status == "stored":
                writes.append((len(outcomes) - 1, queued))
        self.ledger.end_reservation(reservation)
        if not p.durable or not writes:
            return m.CommitReply(outcomes)
        return self._when_durable(outcomes, writes)

    def _commit_one(self, reservation: Reservation, index: int, durable: bool) -> tuple[str, list[asyncio.Future[Any]]]:
        remote = reservation.session.remote
        place = self.ledger.take(reservation, index)
        if self.host.get(place.block) is not None:
            self.host.free(place.extents, len(place.header_bytes))
            return "exists", []
        if remote and not place.filled:
            self.host.free(place.extents, len(place.header_bytes))
            return DropReason.ABORTED.value, []
        if not self._acceptable(place):
            self.host.free(place.extents, len(place.header_bytes))
            self._count_refused(DropReason.UNDECODABLE.value)
            return DropReason.UNDECODABLE.value, []
        block = HostBlock(place.block, place.header_bytes, place.header, place.nbytes, place.extents)
        self.namespaces.count_stored(place.block.scope)
        return "stored", self.chain.admit(block, durable)

    def _acceptable(self, place: Place) -> bool:
        if self._accepts is None:
            return True
        fields = self.namespaces.fields(place.block.scope)
        return fields is None or self._accepts(fields, place.header, self.host.arena.views(place.extents))

    async def _when_durable(self, outcomes: list[m.Outcome], writes: list[tuple[int, list[asyncio.Future[Any]]]]):
        for position, queued in writes:
            outcome = await self.chain.durable(queued)
            if not isinstance(outcome, Stored):
                index = outcomes[position].index
                outcomes[position] = m.Outcome(index, DropReason.NOT_DURABLE.value)
        return m.CommitReply(outcomes)

    def abort(self, session: Session, p: m.Abort) -> m.Empty:
        """Give the room of a reservation back; one that has ended already is passed over."""
        if p.reservation in session.reservations:
            self.ledger.end_reservation(self.ledger.reservation(session, p.reservation))
        return m.Empty()

    # -- payloads that come over the connection ------------------------------------------------------------------------

    def room(self, session: Session, p: m.Fill) -> list[memoryview]:
        """Where the payload of a block goes."""
        return self.host.arena.views(self._place(session, p).extents)

    def filled(self, session: Session, p: m.Fill) -> m.Empty:
        """Note that the payload of a block has arrived."""
        self._place(session, p).filled = True
        return m.Empty()

    def _place(self, session: Session, p: m.Fill) -> Place:
        places = self.ledger.reservation(session, p.reservation).places
        if p.index not in places:
            raise ForeignHandle(f"fill: block {p.index} is not part of reservation {p.reservation}.")
        return places[p.index]
