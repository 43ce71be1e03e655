"""The blocking face of the client, for engines and scripts. Needs no event loop."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from kvstore.client import replies
from kvstore.client.address import at_end, parse_address
from kvstore.client.blocks import Buffer, LeasedBlock, Loaded, as_bytes
from kvstore.client.core import Core
from kvstore.client.device import Importer, reaching
from kvstore.client.driver import Driver
from kvstore.client.effects import Call
from kvstore.client.events import Position
from kvstore.client.handles import Lease, Reservation
from kvstore.client.plans import PlanRun
from kvstore.client.slabs import Bytes
from kvstore.client.streams import EventStream
from kvstore.errors import InvalidParams
from kvstore.keys import PrefixChain, TokenIds
from kvstore.plan import Plan
from kvstore.quotas import QuotaRule
from kvstore.types import BlockHeader, ChunkMatch, LoadOutcome, Miss, Namespace, StoreOutcome, TierCode
from kvstore.wire import messages as m

T = TypeVar("T")


class KVStoreClient(Driver):
    """A connection to a kvstore daemon.

    Connects on first use and again after the connection was lost. Safe to use from several threads; their calls take
    turns, so threads that must not wait for each other open a client each.

    Parameters
    ----------
    address : str, optional
        Path of the daemon's socket, or ``tcp://host:port``. Default: KVSTORE_CLIENT_ADDRESS, else the user's daemon.
    namespace : Namespace, optional
        Used where an operation names none.
    token : str, optional
        Secret of a daemon reached over TCP. Default: KVSTORE_CLIENT_TOKEN.
    timeout_s : float
        Longest time an operation may take, unless it says otherwise.
    name : str
        How the daemon lists this client.
    device : Importer, optional
        How this process opens GPU memory of the daemon (`kvstore.client.device`), to read leased blocks there, too.

    Examples
    --------
    >>> with KVStoreClient(namespace=Namespace(model="toy")) as kv:     # doctest: +SKIP
    ...     key, *_ = kv.keys(range(256))
    ...     kv.put(key, b"the KV of 256 tokens")
    ...     kv.get(key).data
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: Namespace | None = None,
        token: str | None = None,
        timeout_s: float = 5.0,
        name: str = "",
        device: Importer | None = None,
    ) -> None:
        self._given = address
        core = Core(namespace, name, token or os.environ.get("KVSTORE_CLIENT_TOKEN", ""), device)
        super().__init__(parse_address(address), core, timeout_s)

    # -- operations ----------------------------------------------------------------------------------------------------

    def keys(self, tokens: TokenIds) -> list[bytes]:
        """Prefix keys of the full blocks of a prompt (see `PrefixChain` for prompts that grow)."""
        _, namespace = self.core.scope(None)
        chain = PrefixChain(namespace)
        chain.extend(tokens)
        return chain.keys

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        prefix: bool = True,
        namespace: Namespace | None = None,
        timeout_s: float | None = None,
    ) -> list[TierCode]:
        """Where blocks are. With `prefix` the answer ends before the first that is nowhere. Changes nothing."""
        return self.drive(self.core.lookup(keys, prefix, namespace), timeout_s)

    def lookup_many(
        self,
        queries: Sequence[tuple[Namespace, Sequence[bytes]]],
        *,
        prefix: bool = True,
        timeout_s: float | None = None,
    ) -> list[list[TierCode]]:
        """Lookups in several namespaces in one round trip, as for the ranks of a tensor-parallel engine."""
        return self.drive(self.core.lookup_many(queries, prefix), timeout_s)

    def match(
        self,
        tokens: TokenIds,
        *,
        spans: Sequence[tuple[int, int]] = (),
        separator: TokenIds = (),
        find: bool = False,
        labels: Sequence[str] = (),
        namespace: Namespace | None = None,
        timeout_s: float | None = None,
    ) -> tuple[list[ChunkMatch], list[tuple[int, int]]]:
        """Which parts of a prompt are stored chunks, wherever they stand (docs/chunks.md).

        Parameters
        ----------
        tokens : ints
            The prompt.
        spans : sequence of (int, int)
            Half-open ranges, in order, that are looked up as they are.
        separator : ints
            What stands between two of these is looked up, too.
        find : bool
            Look for chunks at any other place.
        labels : sequence of str
            Rights to read that the prompt's sender has.

        Returns
        -------
        found : list of ChunkMatch
            In order, none overlapping.
        absent : list of (int, int)
            Spans, named or between separators, that no stored chunk matches.

        Raises
        ------
        InvalidParams
            For spans that overlap, leave the prompt or are too long.
        """
        flow = self.core.match(tokens, spans, separator, find, labels, namespace)
        return self.drive(flow, timeout_s)

    def lease(
        self,
        keys: Sequence[bytes],
        *,
        namespace: Namespace | None = None,
        ttl_s: float = 30.0,
        wait_s: float = 1.0,
        headers: bool = False,
    ) -> Lease:
        """Lease blocks for reading in place. Blocks in lower tiers are brought up; those that take longer than `wait_s`
        are ``Miss(DEADLINE)``."""
        flow = reaching(self.core, self.core.lease(keys, namespace, ttl_s, wait_s, headers))
        return Lease(self, *self.drive(flow, self.timeout_s + wait_s))

    def read(self, lease: Lease, block: LeasedBlock, into: Buffer) -> None:
        """Copy a leased block into a buffer, from shared memory or over the connection."""
        self.drive(self.core.fetch(lease.id, block, as_bytes(into, writable=True)), None)

    def get(self, key: bytes, *, namespace: Namespace | None = None, wait_s: float = 1.0) -> Loaded | Miss:
        """Read one block, or say why not. A `Miss` is falsy."""
        return cast("Loaded | Miss", self._get([key], None, namespace, wait_s)[0])

    def get_many(
        self, keys: Sequence[bytes], *, namespace: Namespace | None = None, wait_s: float = 1.0
    ) -> list[Loaded | Miss]:
        """Read blocks into fresh memory."""
        return cast("list[Loaded | Miss]", self._get(keys, None, namespace, wait_s))

    def get_into(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
    ) -> list[LoadOutcome]:
        """Read blocks into buffers of their exact size. The content of a buffer whose block is missed is undefined."""
        if len(keys) != len(buffers):
            raise InvalidParams(f"buffers: {len(buffers)} for {len(keys)} keys.", "")
        return cast("list[LoadOutcome]", self._get(keys, buffers, namespace, wait_s))

    def _get(
        self, keys: Sequence[bytes], into: Sequence[Buffer] | None, namespace: Namespace | None, wait_s: float
    ) -> list[Any]:
        return self.drive(self.core.get(keys, into, namespace, wait_s, self.still_valid), self.timeout_s + wait_s)

    def reserve(
        self,
        offers: Sequence[tuple[bytes, int, BlockHeader]],
        *,
        namespace: Namespace | None = None,
        ttl_s: float = 30.0,
        wait_s: float = 0.0,
    ) -> Reservation:
        """Ask for room for (key, bytes, header)s. Waits up to `wait_s` for memory that is being written to disk."""
        flow = self.core.reserve(offers, namespace, ttl_s, wait_s)
        return Reservation(self, *self.drive(flow, self.timeout_s + wait_s))

    def put(
        self,
        key: bytes,
        data: Buffer,
        header: BlockHeader | None = None,
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
        durable: bool = False,
    ) -> StoreOutcome:
        """Store one block: stored, already there, or dropped and why."""
        item = (key, data, header or BlockHeader())
        return self.put_many([item], namespace=namespace, wait_s=wait_s, durable=durable)[0]

    def put_many(
        self,
        items: Sequence[tuple[bytes, Buffer, BlockHeader]],
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
        durable: bool = False,
    ) -> list[StoreOutcome]:
        """Store blocks."""
        return self.drive(self.core.put(items, namespace, wait_s, durable), self.timeout_s + wait_s)

    def prefetch(self, keys: Sequence[bytes], *, namespace: Namespace | None = None, cancel: bool = False) -> int:
        """Bring blocks into host memory without waiting, after all that somebody waits for; how many are on their way.

        With `cancel`, no longer do: how many of them will not come. What is being read already still comes.
        """
        joined = replies.join_keys(keys)
        return self.drive(self.core.count(namespace, lambda ns: Call("prefetch", m.Prefetch(ns, joined, cancel))), None)

    def map_all(self) -> list[Bytes]:
        """Map the daemon's memory ahead, slab by slab, as far as there is any; nothing from another host.

        For who has to make it known to a device, which takes time that nobody should wait for later.
        """
        return self.drive(self.core.map_all(), None)

    def pin(self, keys: Sequence[bytes], *, namespace: Namespace | None = None, ttl_s: float = 3600.0) -> int:
        """Keep blocks from eviction; how many were found."""
        joined = replies.join_keys(keys)
        return self.drive(self.core.count(namespace, lambda ns: Call("pin", m.Pin(ns, joined, ttl_s))), None)

    def unpin(self, keys: Sequence[bytes], *, namespace: Namespace | None = None) -> int:
        """End pins; how many blocks were found."""
        joined = replies.join_keys(keys)
        return self.drive(self.core.count(namespace, lambda ns: Call("unpin", m.Unpin(ns, joined))), None)

    def drop(self, keys: Sequence[bytes] | None = None, *, namespace: Namespace | None = None) -> int:
        """Forget blocks in every tier, or without keys the whole namespace; how many there were."""
        joined = None if keys is None else replies.join_keys(keys)
        return self.drive(self.core.count(namespace, lambda ns: Call("drop", m.Drop(ns, joined))), None)

    def stats(self) -> dict[str, Any]:
        """The daemon's snapshot (docs/metrics.md describes its fields)."""
        return self.drive(self.core.stats(), None)

    def quota(self, rule: QuotaRule | None = None, *, remove: str = "") -> tuple[list[QuotaRule], dict[str, Any]]:
        """The rules about quotas, and by tier and rule what they hold; after setting one, or removing one by name."""
        return self.drive(self.core.quota(rule, remove), None)

    def run(self, plan: Plan, *, namespace: Namespace | None = None, ttl_s: float = 3600.0) -> PlanRun:
        """Carry out a plan (`kvstore.plan`): the steps in order, with what they share pinned for exactly as long.

        Pins end by themselves `ttl_s` after they were last renewed, should this process end before the plan.

        Examples
        --------
        >>> with kv.run(plan(prompts)) as steps:        # doctest: +SKIP
        ...     for step in steps:
        ...         engine.generate(texts[step.prompt])
        """
        return PlanRun(self, plan, namespace, ttl_s)

    def events(self, position: Position = Position(), *, idle_s: float | None = None) -> EventStream:  # noqa: B008
        """What comes into the daemon's tiers and leaves them: first a snapshot, then each change as it happens.

        Parameters
        ----------
        position : Position
            Where an earlier stream was, to go on from there if the daemon still knows what followed.
        idle_s : float, optional
            The iteration ends when nothing has happened for so long; by default never.
        """
        sibling = KVStoreClient(self._given, token=self.core.token, timeout_s=self.timeout_s, name=self.core.name)
        return EventStream(sibling, position, idle_s)

    # -- connection ----------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect now.

        Raises
        ------
        Unavailable
            If the daemon does not answer.
        """
        with self._lock:
            self._ensure(time.monotonic() + self.timeout_s)

    @property
    def speeds(self) -> dict[TierCode, tuple[float, float, float]]:
        """What a load costs from the tiers below host memory that the last lookup named, as the daemon measured it.

        Seconds of waiting, then seconds for each block and for each byte. A tier that was never read has no entry.
        """
        return self.core.speeds

    @property
    def boot(self) -> bytes | None:
        """Changes when the daemon was restarted; None while not connected."""
        return None if self.core.link is None else self.core.link.boot

    def still_valid(self, expires: float, epoch: int) -> bool:
        """Whether a right of this connection and local expiry holds."""
        sock = self._socket
        return time.monotonic() < expires and sock is not None and self.core.current(epoch) and not at_end(sock)

    def end_lease(self, lease: int, epoch: int) -> None:
        """Release a lease without waiting."""
        with self._lock:
            self.core.release(lease, epoch)

    def close(self) -> None:
        """End the connection, and with it all leases and reservations. May be called twice."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> KVStoreClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
