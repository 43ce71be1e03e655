"""The verbs: what a client may ask of the daemon, and nothing else.

One instance serves all connections. A verb gets its session and its decoded, typed parameters and returns a typed
result; those that wait return an awaitable. All state lives on the event loop, so a verb sees a consistent world
between awaits.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kvstore import __version__
from kvstore.chain import TierChain
from kvstore.errors import (
    AuthenticationFailed,
    ForeignHandle,
    HandshakeRequired,
    InvalidParams,
    LeaseExpired,
    LimitExceeded,
    ShuttingDown,
    VersionMismatch,
)
from kvstore.leases import Lease, Ledger, Place, Reservation, Session
from kvstore.namespaces import NamespaceRecord, NamespaceRegistry
from kvstore.tiers.host import HostBlock
from kvstore.types import BlockHeader, BlockId, DropReason, Miss, MissReason, Namespace, Scope, Stored, TierCode
from kvstore.wire import messages as m

log = logging.getLogger("kvstore.service")

MAX_HANDLES = 4096
"""Leases, and reservations, that one connection may have open."""

_header = msgspec.msgpack.Decoder(BlockHeader)


class Service:
    """The daemon's verbs over a tier chain.

    Parameters
    ----------
    chain : TierChain
        Where blocks are.
    token : str
        What remote clients must present; empty if there is no TCP listener.
    max_block_bytes : int
        Largest payload of a block.
    max_ttl_s : float
        Longest lease or reservation.
    """

    def __init__(
        self, chain: TierChain, *, token: str = "", max_block_bytes: int = 1 << 30, max_ttl_s: float = 300
    ) -> None:
        self.chain = chain
        self.host = chain.host
        self.ledger = Ledger(chain.host)
        self.namespaces = NamespaceRegistry()
        self.boot = secrets.token_bytes(16)
        self.draining = False
        self.missed: Counter[str] = Counter()
        self.asked = 0
        self.hit_tokens = 0
        self.hit: Counter[int] = Counter()
        self._token = token
        self._max_block_bytes = max_block_bytes
        self._max_ttl_s = max_ttl_s
        self._verbs: dict[str, Callable[[Session, Any], m.Message | Awaitable[m.Message]]] = {
            name: getattr(self, name) for name in m.METHODS
        }

    # -- entry ---------------------------------------------------------------------------------------------------------

    def call(self, session: Session, method: str, params: m.Message) -> m.Message | Awaitable[m.Message]:
        """Run a verb. Raises `KVStoreError`s that travel to the client as they are."""
        if not session.greeted and method != "hello":
            raise HandshakeRequired(f"{method} was called before hello.")
        return self._verbs[method](session, params)

    def hello(self, session: Session, p: m.Hello) -> m.HelloReply:
        """Authenticate, agree on a version, introduce namespaces."""
        if p.protocol != m.PROTOCOL_VERSION:
            raise VersionMismatch(f"the client speaks protocol {p.protocol}, this daemon {m.PROTOCOL_VERSION}.")
        if session.remote and not hmac.compare_digest(p.token.encode(), self._token.encode()):
            raise AuthenticationFailed("the token is missing or wrong.")
        session.greeted = True
        session.name = p.client or session.name
        for namespace in p.namespaces:
            self._introduce(session.domain, namespace)
        return m.HelloReply(
            protocol=m.PROTOCOL_VERSION,
            version=__version__,
            boot=self.boot,
            session=session.token,
            domain=session.domain,
            shared_memory=not session.remote,
            max_block_bytes=self._max_block_bytes,
            max_keys=m.MAX_KEYS,
        )

    def _introduce(self, domain: str, namespace: Namespace) -> None:
        self.namespaces.introduce(domain, namespace)
        if len(self.namespaces) > 2 * 4096:
            held = set(self.host.scopes()).union(*(tier.scopes() for tier in self.chain.below))
            self.namespaces.prune(held)

    # -- looking and reading -------------------------------------------------------------------------------------------

    def lookup(self, session: Session, p: m.Lookup) -> m.LookupReply:
        """Where blocks are; changes nothing."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        return m.LookupReply(self.chain.locate(scope, m.split_keys(p.keys), p.prefix))

    def lease(self, session: Session, p: m.Lease) -> m.LeaseReply:
        """Lend what is in memory; start bringing up what is below; say what is nowhere."""
        record = self.namespaces.find(session.domain, p.ns)
        keys = m.split_keys(p.keys)
        self._limit(session.leases)
        ttl_s = min(p.ttl_s, self._max_ttl_s)
        lease = self.ledger.new_lease(session, record.scope, ttl_s)
        granted: list[m.Grant] = []
        refused: list[m.Refusal] = []
        in_host = self.host.blocks(record.scope)
        below: list[int] = []
        for index, key in enumerate(keys):
            block = in_host.get(key)
            if block is not None:
                self.ledger.lend(lease, index, block)
                granted.append(self._grant(lease, index, block, TierCode.HOST, p.headers))
                self._count_hit(record, TierCode.HOST)
            elif self.chain.find_below(record.scope, key) is not None:
                below.append(index)
            else:
                refused.append(self._refuse(index, MissReason.ABSENT))
        self.asked += len(keys)
        record.asked += len(keys)
        self.host.counters.misses += len(keys) - len(lease.blocks)
        self.chain.touch([block for block in lease.blocks.values() if not block.gone])
        lease.pending = len(below)
        for index in below:
            # Started after the loop: a promotion may evict, and what this lease holds must be held by then.
            self.chain.promote(BlockId(record.scope, keys[index]), self._arrival(lease, record, index, p.headers))
        return m.LeaseReply(lease.id, ttl_s, granted, refused, lease.pending)

    def _arrival(self, lease: Lease, record: NamespaceRecord, index: int, headers: bool):
        def arrived(found: HostBlock | Miss, code: TierCode) -> None:
            if lease.ended:
                return
            lease.pending -= 1
            granted: list[m.Grant] = []
            refused: list[m.Refusal] = []
            if isinstance(found, Miss):
                refused.append(self._refuse(index, found.reason))
            else:
                self.ledger.lend(lease, index, found)
                self._count_hit(record, code)
                granted.append(self._grant(lease, index, found, code, headers))
            lease.session.notify("leased", m.LeaseNotice(lease.id, granted, refused))

        return arrived

    def _grant(self, lease: Lease, index: int, block: HostBlock, tier: TierCode, headers: bool) -> m.Grant:
        extents: Any = [] if lease.session.remote else block.extents
        self.host.counters.hits += 1
        self.host.counters.bytes_read += block.nbytes
        return m.Grant(index, block.nbytes, int(tier), extents, block.header_bytes if headers else b"")

    def _refuse(self, index: int, reason: MissReason) -> m.Refusal:
        self.missed[reason.value] += 1
        return m.Refusal(index, reason.value)

    def _count_hit(self, record: NamespaceRecord, tier: TierCode) -> None:
        self.hit[tier] += 1
        self.hit_tokens += record.fields.block_tokens
        record.count_hit(tier)

    def release(self, session: Session, p: m.Release) -> m.Empty:
        """End leases; those that have ended already are passed over."""
        for lease_id in p.leases:
            lease = session.leases.get(lease_id)
            if lease is not None:
                self.ledger.end_lease(lease)
        return m.Empty()

    def prefetch(self, session: Session, p: m.Prefetch) -> m.CountReply:
        """Bring up what is below; how many blocks are on their way."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        started = 0
        for key in m.split_keys(p.keys):
            block = BlockId(scope, key)
            if self.host.get(block) is None and self.chain.find_below(scope, key) is not None:
                self.chain.promote(block, lambda found, code: None)
                started += 1
        return m.CountReply(started)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def reserve(self, session: Session, p: m.Reserve) -> m.ReserveReply:
        """Lend memory for new blocks, evicting; or say of each block why not."""
        if self.draining:
            raise ShuttingDown("the daemon is shutting down.")
        record = self.namespaces.find(session.domain, p.ns)
        self._limit(session.reservations)
        headers = [self._decode_header(index, offer) for index, offer in enumerate(p.blocks)]
        ttl_s = min(p.ttl_s, self._max_ttl_s)
        deadline = time.monotonic() + p.wait_s
        reservation = self.ledger.new_reservation(session, ttl_s + p.wait_s)
        rooms: list[m.Room] = []
        others: list[m.NoRoom] = []
        for index, (offer, header) in enumerate(zip(p.blocks, headers, strict=True)):
            status = await self._reserve_one(reservation, record.scope, index, offer, header, deadline)
            if session.id not in self.ledger.sessions:  # gone while it waited
                if reservation.id in self.ledger.reservations:
                    self.ledger.end_reservation(reservation)
                return m.ReserveReply(reservation.id, 0.0, [], [])
            if status is None:
                extents: Any = [] if session.remote else reservation.places[index].extents
                rooms.append(m.Room(index, extents))
            else:
                self._count_refused(status)
                others.append(m.NoRoom(index, status))
        if not rooms:
            self.ledger.end_reservation(reservation)
        return m.ReserveReply(reservation.id, ttl_s, rooms, others)

    def _count_refused(self, status: str) -> None:
        if status == "exists":
            self.host.counters.exists += 1
        else:
            self.host.counters.drop(status)

    async def _reserve_one(
        self, reservation: Reservation, scope: Scope, index: int, offer: m.Offer, header: BlockHeader, deadline: float
    ) -> str | None:
        """Lend memory for one block; None, or why not."""
        block = BlockId(scope, offer.key)
        refusal = self._refusal(block, offer)
        if refusal is not None:
            return refusal
        extents = await self.chain.make_room(scope.domain, offer.nbytes, len(offer.header), deadline)
        if extents is None:
            return DropReason.HOST_FULL.value
        refusal = self._refusal(block, offer)  # the world may have changed while it waited
        if refusal is not None or reservation.session.id not in self.ledger.sessions:
            self.host.free(extents, len(offer.header))
            return refusal or DropReason.ABORTED.value
        self.ledger.reserve(reservation, index, Place(block, header, offer.header, offer.nbytes, extents))
        return None

    def _refusal(self, block: BlockId, offer: m.Offer) -> str | None:
        if self.host.get(block) is not None or self.chain.find_below(block.scope, block.key) is not None:
            return "exists"
        if block in self.ledger.in_flight:
            return DropReason.IN_FLIGHT.value
        if offer.nbytes > min(self._max_block_bytes, self.host.arena.capacity):
            return DropReason.TOO_LARGE.value
        return None

    def _decode_header(self, index: int, offer: m.Offer) -> BlockHeader:
        try:
            return _header.decode(offer.header)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidParams(f"reserve: header of block {index}: {error}.") from None

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
        block = HostBlock(place.block, place.header_bytes, place.header, place.nbytes, place.extents)
        self.namespaces.count_stored(place.block.scope)
        return "stored", self.chain.admit(block, durable)

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

    # -- remote payloads -----------------------------------------------------------------------------------------------

    def fetch(self, session: Session, p: m.Fetch) -> m.Message:
        """Never called as a verb: the connection answers it from `payload`."""
        raise InvalidParams("fetch is for connections without shared memory.")

    def fill(self, session: Session, p: m.Fill) -> m.Message:
        """Reached when the payload has arrived; see `place`."""
        if not session.remote:
            raise InvalidParams("fill is for connections without shared memory.")
        self.ledger.reservation(session, p.reservation).places[p.index].filled = True
        return m.Empty()

    def payload(self, session: Session, p: m.Fetch) -> tuple[Lease, list[memoryview]]:
        """Bytes of a leased block, to be sent while the lease lasts."""
        lease = self.ledger.lease(session, p.lease)
        if p.index not in lease.blocks:
            raise ForeignHandle(f"fetch: block {p.index} is not part of lease {p.lease}.")
        return lease, self.host.arena.views(lease.blocks[p.index].extents)

    def place(self, session: Session, p: m.Fill) -> list[memoryview]:
        """Where the payload of a `fill` goes."""
        reservation = self.ledger.reservation(session, p.reservation)
        if p.index not in reservation.places:
            raise ForeignHandle(f"fill: block {p.index} is not part of reservation {p.reservation}.")
        return self.host.arena.views(reservation.places[p.index].extents)

    # -- keeping and forgetting ----------------------------------------------------------------------------------------

    def pin(self, session: Session, p: m.Pin) -> m.CountReply:
        """Keep blocks from eviction."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        return m.CountReply(self.chain.pin(scope, m.split_keys(p.keys), time.monotonic() + p.ttl_s))

    def unpin(self, session: Session, p: m.Unpin) -> m.CountReply:
        """End pins."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        return m.CountReply(self.chain.pin(scope, m.split_keys(p.keys), 0.0))

    async def drop(self, session: Session, p: m.Drop) -> m.CountReply:
        """Forget blocks everywhere."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        keys = None if p.keys is None else m.split_keys(p.keys)
        return m.CountReply(await self.chain.drop(scope, keys))

    def stats(self, session: Session, p: m.Stats) -> m.StatsReply:
        """A snapshot; `kvstore.obs.snapshot` makes it."""
        return m.StatsReply(self.snapshot())

    snapshot: Callable[[], dict[str, Any]] = staticmethod(dict)
    """Set by the daemon, which knows what else there is to tell."""

    # -- helpers -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _limit(handles: dict[int, Any]) -> None:
        if len(handles) >= MAX_HANDLES:
            raise LimitExceeded(f"this connection has {len(handles)} handles open, the most allowed.")
