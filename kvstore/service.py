"""The verbs: what a client may ask of the daemon, and nothing else.

One instance serves all connections. A verb gets its session and its decoded, typed parameters and returns a typed
result; those that wait return an awaitable. All state lives on the event loop, so a verb sees a consistent world
between awaits.
"""

from __future__ import annotations

import hmac
import os
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kvstore import __version__
from kvstore.chain import TierChain
from kvstore.chunks.desk import ChunkDesk
from kvstore.desk import Desk
from kvstore.errors import (
    AccessError,
    AuthenticationFailed,
    FidelityRefused,
    ForeignHandle,
    HandshakeRequired,
    InvalidParams,
    LimitExceeded,
    ShuttingDown,
    VersionMismatch,
)
from kvstore.events import EventLog
from kvstore.feed import Feed
from kvstore.gpu_desk import GpuDesk
from kvstore.leases import Lease, Ledger, Session
from kvstore.namespaces import NamespaceRecord, NamespaceRegistry, only_exact
from kvstore.quota_desk import QuotaDesk
from kvstore.store_desk import Accepts, StoreDesk
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockId, Miss, MissReason, Namespace, Scope, TierCode
from kvstore.watcher import Watchers
from kvstore.wire import messages as m

MAX_HANDLES = 4096
"""Leases, and reservations, that one connection may have open."""

MAX_LENT = 1 << 18
"""Blocks in the leases of one connection, each as often as it was lent: 64 Mi tokens at 256 a block."""

MAX_HEADER_BYTES = 2 << 20
"""Block headers in one reply; with the extents of as many blocks as a request names it stays within a frame."""


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
    event_ring : int
        Events kept for subscribers of each trust domain.
    chunk_bytes, chunk_variants : int
        Bytes of the chunk index, and variants of one chunk.
    refuse_fidelity : callable
        Why a namespace may not have the fidelity it asks for; empty if it may.
    accepts : callable, optional
        Whether a payload may be kept under its name: an engine may have encoded it in a way its profile does not know.
    gpu : GpuDesk, optional
        The GPU tier, if there is one.
    """

    def __init__(
        self,
        chain: TierChain,
        *,
        token: str = "",
        max_block_bytes: int = 1 << 30,
        max_ttl_s: float = 300,
        event_ring: int = 65_536,
        chunk_bytes: int = 64 << 20,
        chunk_variants: int = 5,
        refuse_fidelity: Callable[[Namespace], str] = only_exact,
        accepts: Accepts | None = None,
        gpu: GpuDesk | None = None,
    ) -> None:
        self.chain = chain
        self.gpu = gpu
        self.host = chain.host
        self.ledger = Ledger(chain.host)
        self.namespaces = NamespaceRegistry()
        divided = {"host": (chain.host.order, chain.host.arena.capacity)}
        divided |= {tier.name: (tier.order, tier.usage().capacity) for tier in chain.below if tier.order is not None}
        self.quotas = QuotaDesk(divided, self.namespaces)
        self.desk = Desk(self)
        self.stores = StoreDesk(self.ledger, chain, self.namespaces, self.desk, max_block_bytes, max_ttl_s, accepts)
        self.boot = secrets.token_bytes(16)
        log = EventLog(event_ring)
        self.chunks = ChunkDesk(chain, chunk_bytes, chunk_variants)
        copies = () if gpu is None else (gpu.tier,)
        chain.watch(Watchers(*copies, self.chunks.watcher(log), self.desk.departures))
        self.feed = Feed(log, chain.holdings(), self.namespaces, self.boot)
        self.draining = False
        self.missed: Counter[str] = Counter()
        self.asked = 0
        self.hit_tokens = 0
        self.hit: Counter[int] = Counter()
        self._token = token
        self._refuse_fidelity = refuse_fidelity
        self._max_block_bytes = max_block_bytes
        self._max_ttl_s = max_ttl_s
        self._verbs: dict[str, Callable[[Session, Any], m.Message | Awaitable[m.Message]]] = {
            name: getattr(self, name) for name in m.METHODS
        }

    # -- entry ---------------------------------------------------------------------------------------------------------

    def call(self, session: Session, method: str, params: m.Message) -> m.Message | Awaitable[m.Message]:
        """Run a verb. Raises `KVStoreError`s that travel to the client as they are."""
        self._admit(session, method)
        return self._verbs[method](session, params)

    @staticmethod
    def _admit(session: Session, method: str) -> None:
        if not session.greeted and method != "hello":
            raise HandshakeRequired(f"{method} was called before hello.")

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
        if reason := self._refuse_fidelity(namespace):
            raise FidelityRefused(f"fidelity {namespace.fidelity!r} of {namespace.model!r}: {reason}.")
        self.namespaces.introduce(domain, namespace)
        if len(self.namespaces) > 2 * 4096:
            held = set(self.host.scopes()).union(*(tier.scopes() for tier in self.chain.below))
            self.namespaces.prune(held)

    # -- looking and reading -------------------------------------------------------------------------------------------

    def lookup(self, session: Session, p: m.Lookup) -> m.LookupReply:
        """Where blocks are; changes nothing."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        keys = m.split_keys(p.keys)
        tiers = self.chain.locate(scope, keys, p.prefix)
        if len(tiers) < len(keys):
            self.desk.absent(scope, keys[len(tiers)])
        return m.LookupReply(tiers, self.chain.speeds(tiers))

    def match(self, session: Session, p: m.Match) -> m.MatchReply:
        """Which parts of a prompt are stored chunks."""
        return self.chunks.match(self.namespaces.find(session.domain, p.ns).scope, p)

    def lease(self, session: Session, p: m.Lease) -> m.LeaseReply:
        """Lend what is in memory; start bringing up what is below; say what is nowhere."""
        record = self.namespaces.find(session.domain, p.ns)
        keys = m.split_keys(p.keys)
        self._limit(session.leases)
        if session.lent + len(keys) > MAX_LENT:
            raise LimitExceeded(f"this connection holds {session.lent} leased blocks; {MAX_LENT} are the most allowed.")
        ttl_s = min(p.ttl_s, self._max_ttl_s)
        in_host = self.host.blocks(record.scope)
        found = {index: block for index, block in enumerate(map(in_host.get, keys)) if block is not None}
        if p.headers and sum([len(block.header_bytes) for block in found.values()]) > MAX_HEADER_BYTES:
            raise LimitExceeded(f"the headers of {len(found)} blocks are more than {MAX_HEADER_BYTES} bytes.")
        lease = self.ledger.new_lease(session, record.scope, ttl_s)
        self.ledger.lend(lease, found)
        granted = self._grant(lease, record, found, TierCode.HOST, p.headers)
        refused: list[m.Refusal] = []
        below: list[int] = []
        for index in range(len(keys)) if len(found) < len(keys) else ():
            if index in found:
                continue
            if self.chain.find_below(record.scope, keys[index]) is not None:
                below.append(index)
            else:
                refused.append(self._refuse(index, MissReason.ABSENT))
        if refused:
            self.desk.absent(record.scope, keys[refused[0].index])
        self.asked += len(keys)
        record.asked += len(keys)
        self.host.counters.misses += len(keys) - len(found)
        self.chain.touch(list(found.values()))
        lease.pending = len(below)
        for index in below:
            # Started after the loop: a promotion may evict, and what this lease holds must be held by then.
            arrived = self._arrival(lease, record, index, p.headers)
            self.chain.promote(BlockId(record.scope, keys[index]), arrived, lease.wanted)
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
                self.ledger.lend(lease, {index: found})
                granted += self._grant(lease, record, {index: found}, code, headers)
            lease.session.notify("leased", m.LeaseNotice(lease.id, granted, refused))

        return arrived

    def _grant(
        self, lease: Lease, record: NamespaceRecord, blocks: dict[int, HostBlock], tier: TierCode, headers: bool
    ) -> list[m.Grant]:
        """What the client is told of blocks lent to it, by index; counts them as hits."""
        self.hit[tier] += len(blocks)
        self.hit_tokens += len(blocks) * record.fields.block_tokens
        record.hit[tier] += len(blocks)
        self.host.counters.hits += len(blocks)
        self.host.counters.bytes_read += sum([block.nbytes for block in blocks.values()])
        self.desk.reuse.note([(block.id.key, block.nbytes) for block in blocks.values()])
        remote, code = lease.session.remote, int(tier)
        return [
            m.Grant(index, block.nbytes, code, () if remote else block.extents, block.header_bytes if headers else b"")
            for index, block in blocks.items()
        ]

    def _refuse(self, index: int, reason: MissReason) -> m.Refusal:
        self.missed[reason.value] += 1
        return m.Refusal(index, reason.value)

    def reach(self, session: Session, p: m.Reach) -> m.ReachReply:
        """Where a lease's blocks lie on the GPU, too; they are lent there until it ends."""
        lease, gpu = self.ledger.lease(session, p.lease), self.gpu
        if gpu is None or session.remote:
            return m.ReachReply(b"", [])
        copies = gpu.reach(lease) if p.gpu == gpu.gpu else {}
        places = [m.Place(index, copy.extent.slab, copy.extent.offset) for index, copy in copies.items()]
        return m.ReachReply(gpu.gpu, places)

    def open_slab(self, session: Session, p: m.OpenSlab) -> m.OpenSlabReply:
        """The handle of a slab of GPU memory."""
        slab = None if self.gpu is None or session.remote else self.gpu.slab(p.slab, session.domain)
        if slab is None:
            raise ForeignHandle(f"there is no slab {p.slab} of GPU memory for this connection.")
        return m.OpenSlabReply(slab.nbytes, slab.handle)

    def slabs(self, session: Session, p: m.Slabs) -> m.SlabsReply:
        """The slabs of a trust domain; descriptors are had where they always are."""
        return m.SlabsReply([] if session.remote else self.host.arena.slabs_of(session.domain))

    def release(self, session: Session, p: m.Release) -> m.Empty:
        """End leases; those that have ended already are passed over."""
        for lease_id in p.leases:
            lease = session.leases.get(lease_id)
            if lease is not None:
                self.ledger.end_lease(lease)
        return m.Empty()

    def prefetch(self, session: Session, p: m.Prefetch) -> m.CountReply:
        """Bring up what is below once nobody waits; how many blocks are on their way, or no longer are."""
        scope = self.namespaces.find(session.domain, p.ns).scope
        act = self.chain.ahead.discard if p.cancel else self.chain.prefetch
        return m.CountReply(sum([act(BlockId(scope, key)) for key in m.split_keys(p.keys)]))

    # -- storing -------------------------------------------------------------------------------------------------------

    def reserve(self, session: Session, p: m.Reserve) -> m.ReserveReply | Awaitable[m.ReserveReply]:
        """Lend memory for new blocks, evicting; or say of each block why not."""
        if self.draining:
            raise ShuttingDown("the daemon is shutting down.")
        self._limit(session.reservations)
        return self.stores.reserve(session, p)

    def commit(self, session: Session, p: m.Commit) -> m.CommitReply | Awaitable[m.CommitReply]:
        """Make filled blocks visible. What is acknowledged is readable when the reply is sent."""
        return self.stores.commit(session, p)

    def abort(self, session: Session, p: m.Abort) -> m.Empty:
        """Give the room of a reservation back; one that has ended already is passed over."""
        return self.stores.abort(session, p)

    # -- remote payloads -----------------------------------------------------------------------------------------------

    def fetch(self, session: Session, p: m.Fetch) -> m.Message:
        """Never called as a verb: the connection answers it from `payload`."""
        raise InvalidParams("fetch is for connections without shared memory.")

    def fill(self, session: Session, p: m.Fill) -> m.Message:
        """Reached when the payload has arrived; see `place`."""
        return self.stores.filled(session, p)

    def payload(self, session: Session, p: m.Fetch) -> tuple[Lease, list[memoryview]]:
        """Bytes of a leased block, to be sent while the lease lasts."""
        self._admit(session, "fetch")
        lease = self.ledger.lease(session, p.lease)
        if p.index not in lease.blocks:
            raise ForeignHandle(f"fetch: block {p.index} is not part of lease {p.lease}.")
        return lease, self.host.arena.views(lease.blocks[p.index].extents)

    def place(self, session: Session, p: m.Fill) -> list[memoryview]:
        """Where the payload of a `fill` goes."""
        self._admit(session, "fill")
        return self.stores.room(session, p)

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

    def quota(self, session: Session, p: m.Quota) -> m.QuotaReply:
        """List the rules about quotas, set one, or remove one."""
        if p.set is not None or p.remove:
            self._operator(session, "quotas are")
        if p.set is not None:
            self.quotas.set(p.set)
        if p.remove:
            self.quotas.remove(p.remove)
        return m.QuotaReply(self.quotas.rules, self.quotas.state())

    def report(self, session: Session, p: m.Report) -> m.Empty:
        """Note what an engine says that it put together from chunks."""
        self.desk.blends.add(self.namespaces.find(session.domain, p.ns).scope, p)
        return m.Empty()

    def explain(self, session: Session, p: m.Explain) -> m.ExplainReply:
        """Where each block of a prompt is, and why the others are not here."""
        seen = self.desk.explain(Scope(session.domain, p.ns), m.split_keys(p.keys))
        return m.ExplainReply([msgspec.structs.asdict(each) for each in seen])

    def leases(self, session: Session, p: m.Leases) -> m.LeasesReply:
        """Leases that are open, of the caller's trust domain."""
        held = [msgspec.structs.asdict(each) for each in self.desk.leases()]
        return m.LeasesReply([each for each in held if each["domain"] == session.domain])

    def policy(self, session: Session, p: m.Policy) -> m.PolicyReply:
        """The eviction policy of each tier, after giving one to a tier."""
        if p.tier:
            self._operator(session, "policies are")
            self.desk.set_policy(p.tier, p.policy)
        return m.PolicyReply(self.desk.policies())

    def events(self, session: Session, p: m.Events) -> m.EventsReply | Awaitable[m.EventsReply]:
        """What happened to blocks, or what there is."""
        return self.feed.answer(session, session.domain, p)

    snapshot: Callable[[], dict[str, Any]] = staticmethod(dict)
    """Set by the daemon, which knows what else there is to tell."""

    # -- helpers -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _operator(session: Session, what: str) -> None:
        if session.remote or session.domain != f"uid-{os.getuid()}":
            raise AccessError(f"{what} changed by the user that runs the daemon, on its own machine.")

    @staticmethod
    def _limit(handles: dict[int, Any]) -> None:
        if len(handles) >= MAX_HANDLES:
            raise LimitExceeded(f"this connection has {len(handles)} handles open, the most allowed.")
