"""The asyncio face of the client. Operations run concurrently over one connection."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from kvstore.client import replies
from kvstore.client.address import CONNECT_AGAIN_S, connect_unix, parse_address
from kvstore.client.aio_wire import Wire, in_thread
from kvstore.client.blocks import Buffer, LeasedBlock, Loaded, as_bytes
from kvstore.client.core import Core
from kvstore.client.device import Importer, reaching
from kvstore.client.effects import Arrivals, Call, Calls, Effect, Flow, Work
from kvstore.client.events import Position
from kvstore.client.handles import AsyncReservation, Lease
from kvstore.client.mailbox import Pending
from kvstore.client.plans import AsyncPlanRun
from kvstore.client.slabs import Bytes
from kvstore.client.streams import AsyncEventStream
from kvstore.errors import ConnectionLost, DeadlineExceeded, InvalidParams, KVStoreError
from kvstore.keys import PrefixChain, TokenIds
from kvstore.plan import Plan
from kvstore.quotas import QuotaRule
from kvstore.types import BlockHeader, ChunkMatch, LoadOutcome, Miss, Namespace, StoreOutcome, TierCode
from kvstore.wire import messages as m

T = TypeVar("T")

_INLINE_BYTES = 256 * 1024
"""Copies up to this size run on the loop; a thread would cost more than the copy."""


class AsyncKVStoreClient:
    """A connection to a daemon, for asyncio programs. Parameters and operations are those of `KVStoreClient`."""

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
        self.address = parse_address(address)
        self.timeout_s = timeout_s
        self.core = Core(namespace, name, token or os.environ.get("KVSTORE_CLIENT_TOKEN", ""), device)
        self.core.tell = self._tell
        self.core.forget = self._forget
        self._wire: Wire | None = None
        self._connecting = asyncio.Lock()

    # -- operations ----------------------------------------------------------------------------------------------------

    def keys(self, tokens: TokenIds) -> list[bytes]:
        """See `KVStoreClient.keys`."""
        _, namespace = self.core.scope(None)
        chain = PrefixChain(namespace)
        chain.extend(tokens)
        return chain.keys

    async def lookup(
        self,
        keys: Sequence[bytes],
        *,
        prefix: bool = True,
        namespace: Namespace | None = None,
        timeout_s: float | None = None,
    ) -> list[TierCode]:
        """See `KVStoreClient.lookup`."""
        return await self.drive(self.core.lookup(keys, prefix, namespace), timeout_s)

    async def lookup_many(
        self,
        queries: Sequence[tuple[Namespace, Sequence[bytes]]],
        *,
        prefix: bool = True,
        timeout_s: float | None = None,
    ) -> list[list[TierCode]]:
        """See `KVStoreClient.lookup_many`."""
        return await self.drive(self.core.lookup_many(queries, prefix), timeout_s)

    async def match(
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
        """See `KVStoreClient.match`."""
        flow = self.core.match(tokens, spans, separator, find, labels, namespace)
        return await self.drive(flow, timeout_s)

    async def lease(
        self,
        keys: Sequence[bytes],
        *,
        namespace: Namespace | None = None,
        ttl_s: float = 30.0,
        wait_s: float = 1.0,
        headers: bool = False,
    ) -> Lease:
        """See `KVStoreClient.lease`. The lease is an ordinary context manager: giving it back waits for nothing."""
        flow = reaching(self.core, self.core.lease(keys, namespace, ttl_s, wait_s, headers))
        return Lease(self, *await self.drive(flow, self.timeout_s + wait_s))

    async def read(self, lease: Lease, block: LeasedBlock, into: Buffer) -> None:
        """See `KVStoreClient.read`."""
        await self.drive(self.core.fetch(lease.id, block, as_bytes(into, writable=True)), None)

    async def get(self, key: bytes, *, namespace: Namespace | None = None, wait_s: float = 1.0) -> Loaded | Miss:
        """See `KVStoreClient.get`."""
        return cast("Loaded | Miss", (await self._get([key], None, namespace, wait_s))[0])

    async def get_many(
        self, keys: Sequence[bytes], *, namespace: Namespace | None = None, wait_s: float = 1.0
    ) -> list[Loaded | Miss]:
        """See `KVStoreClient.get_many`."""
        return cast("list[Loaded | Miss]", await self._get(keys, None, namespace, wait_s))

    async def get_into(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
    ) -> list[LoadOutcome]:
        """See `KVStoreClient.get_into`."""
        if len(keys) != len(buffers):
            raise InvalidParams(f"buffers: {len(buffers)} for {len(keys)} keys.", "")
        return cast("list[LoadOutcome]", await self._get(keys, buffers, namespace, wait_s))

    async def _get(
        self, keys: Sequence[bytes], into: Sequence[Buffer] | None, namespace: Namespace | None, wait_s: float
    ) -> list[Any]:
        flow = self.core.get(keys, into, namespace, wait_s, self.still_valid)
        return await self.drive(flow, self.timeout_s + wait_s)

    async def reserve(
        self,
        offers: Sequence[tuple[bytes, int, BlockHeader]],
        *,
        namespace: Namespace | None = None,
        ttl_s: float = 30.0,
        wait_s: float = 0.0,
    ) -> AsyncReservation:
        """See `KVStoreClient.reserve`."""
        flow = self.core.reserve(offers, namespace, ttl_s, wait_s)
        return AsyncReservation(self, *await self.drive(flow, self.timeout_s + wait_s))

    async def put(
        self,
        key: bytes,
        data: Buffer,
        header: BlockHeader | None = None,
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
        durable: bool = False,
    ) -> StoreOutcome:
        """See `KVStoreClient.put`."""
        item = (key, data, header or BlockHeader())
        return (await self.put_many([item], namespace=namespace, wait_s=wait_s, durable=durable))[0]

    async def put_many(
        self,
        items: Sequence[tuple[bytes, Buffer, BlockHeader]],
        *,
        namespace: Namespace | None = None,
        wait_s: float = 1.0,
        durable: bool = False,
    ) -> list[StoreOutcome]:
        """See `KVStoreClient.put_many`."""
        return await self.drive(self.core.put(items, namespace, wait_s, durable), self.timeout_s + wait_s)

    async def prefetch(self, keys: Sequence[bytes], *, namespace: Namespace | None = None, cancel: bool = False) -> int:
        """See `KVStoreClient.prefetch`."""
        joined = replies.join_keys(keys)
        flow = self.core.count(namespace, lambda ns: Call("prefetch", m.Prefetch(ns, joined, cancel)))
        return await self.drive(flow, None)

    async def map_all(self) -> list[Bytes]:
        """See `KVStoreClient.map_all`."""
        return await self.drive(self.core.map_all(), None)

    async def pin(self, keys: Sequence[bytes], *, namespace: Namespace | None = None, ttl_s: float = 3600.0) -> int:
        """See `KVStoreClient.pin`."""
        joined = replies.join_keys(keys)
        return await self.drive(self.core.count(namespace, lambda ns: Call("pin", m.Pin(ns, joined, ttl_s))), None)

    async def unpin(self, keys: Sequence[bytes], *, namespace: Namespace | None = None) -> int:
        """See `KVStoreClient.unpin`."""
        joined = replies.join_keys(keys)
        return await self.drive(self.core.count(namespace, lambda ns: Call("unpin", m.Unpin(ns, joined))), None)

    async def drop(self, keys: Sequence[bytes] | None = None, *, namespace: Namespace | None = None) -> int:
        """See `KVStoreClient.drop`."""
        joined = None if keys is None else replies.join_keys(keys)
        return await self.drive(self.core.count(namespace, lambda ns: Call("drop", m.Drop(ns, joined))), None)

    async def stats(self) -> dict[str, Any]:
        """See `KVStoreClient.stats`."""
        return await self.drive(self.core.stats(), None)

    async def quota(self, rule: QuotaRule | None = None, *, remove: str = "") -> tuple[list[QuotaRule], dict[str, Any]]:
        """See `KVStoreClient.quota`."""
        return await self.drive(self.core.quota(rule, remove), None)

    def run(self, plan: Plan, *, namespace: Namespace | None = None, ttl_s: float = 3600.0) -> AsyncPlanRun:
        """See `KVStoreClient.run`."""
        return AsyncPlanRun(self, plan, namespace, ttl_s)

    def events(self, position: Position = Position(), *, idle_s: float | None = None) -> AsyncEventStream:  # noqa: B008
        """See `KVStoreClient.events`."""
        return AsyncEventStream(self, position, idle_s)

    # -- connection ----------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect now; raises `Unavailable` if the daemon does not answer."""
        await self._connected(time.monotonic() + self.timeout_s)

    @property
    def boot(self) -> bytes | None:
        """Changes when the daemon was restarted; None while not connected."""
        return None if self.core.link is None else self.core.link.boot

    def still_valid(self, expires: float, epoch: int) -> bool:
        """Whether a right of this connection and local expiry holds."""
        wire = self._wire
        return time.monotonic() < expires and wire is not None and self.core.current(epoch) and not wire.at_end()

    def end_lease(self, lease: int, epoch: int) -> None:
        """Release a lease without waiting."""
        self.core.release(lease, epoch)

    def lost(self, wire: Wire) -> None:
        """Note that a connection ended."""
        if wire is self._wire:
            self._wire = None
            self.core.unlink()

    async def close(self) -> None:
        """End the connection, and with it all leases and reservations. May be called twice."""
        wire = self._wire
        if wire is not None:
            self.lost(wire)
            wire.close()
            await asyncio.sleep(0)

    async def __aenter__(self) -> AsyncKVStoreClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # -- driving -------------------------------------------------------------------------------------------------------

    async def drive(self, flow: Flow[T], timeout_s: float | None) -> T:
        """Run an operation to its end, within a deadline."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        try:
            wire = await self._connected(deadline)
            return await self._run(flow, wire, deadline)
        finally:
            flow.close()

    async def _run(self, flow: Flow[T], wire: Wire, deadline: float) -> T:
        """An operation stays on the connection it began on: what it was lent there is worth nothing on another."""
        try:
            effect = next(flow)
            while True:
                try:
                    answer = await self._perform(effect, wire, deadline)
                except KVStoreError as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as stop:
            return stop.value

    async def _perform(self, effect: Effect, wire: Wire, deadline: float) -> Any:
        if isinstance(effect, Call):
            return await self._wait(wire, wire.send(effect), deadline)
        if isinstance(effect, Calls):
            pending = [wire.send(call) for call in effect.calls]
            return [await self._wait(wire, one, deadline) for one in pending]
        if isinstance(effect, Work):
            if 0 < effect.nbytes <= _INLINE_BYTES:
                return effect.function()
            with wire.copying():
                return await in_thread(effect.function)
        return await self._await_notice(wire, effect)

    async def _wait(self, wire: Wire, pending: Pending, deadline: float) -> m.Message:
        if pending.result is None:
            arrived = asyncio.get_running_loop().create_future()
            pending.wake = lambda: None if arrived.done() else arrived.set_result(None)
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await arrived
            except TimeoutError:
                pass
            except BaseException:  # cancelled
                self._abandon(wire, pending)
                raise
        if pending.result is None:
            self._abandon(wire, pending)
            raise DeadlineExceeded(f"the daemon did not answer {pending.method} in time.")
        if isinstance(pending.result, KVStoreError):
            raise pending.result
        return pending.result

    @staticmethod
    def _abandon(wire: Wire, pending: Pending) -> None:
        if not wire.mailbox.abandon(pending):
            wire.close()

    async def _await_notice(self, wire: Wire, effect: Arrivals) -> m.LeaseNotice | None:
        while True:
            notice = wire.mailbox.notice(effect.lease)
            if notice is not None:
                return notice
            if not wire.open:
                raise ConnectionLost("the daemon closed the connection.")
            arrived = asyncio.get_running_loop().create_future()
            wire.mailbox.wake[effect.lease] = lambda f=arrived: None if f.done() else f.set_result(None)
            try:
                async with asyncio.timeout(max(0.0, effect.deadline - time.monotonic())):
                    await arrived
            except TimeoutError:
                return None
            finally:
                wire.mailbox.wake.pop(effect.lease, None)

    async def _connected(self, deadline: float) -> Wire:
        """The connection, made now if there is none. Operations that come meanwhile wait for it, each for its time."""
        if self._wire is not None and self._wire.open and self.core.link is not None:
            return self._wire
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._connecting.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to the daemon at {self.address} in time.") from None
        try:
            if self._wire is not None and self._wire.open:
                return self._wire
            return await self._connect(deadline)
        finally:
            self._connecting.release()

    async def _connect(self, deadline: float) -> Wire:
        if self._wire is not None:  # it is being closed
            self.lost(self._wire)
        wire = self._wire = await self._open(max(0.001, deadline - time.monotonic()))
        fd_path = f"{self.address}.fd" if isinstance(self.address, str) else None
        try:
            await self._run(self.core.hello(fd_path, self.timeout_s), wire, deadline)
        except BaseException:
            self.lost(wire)
            wire.close()
            raise
        return wire

    async def _open(self, timeout_s: float) -> Wire:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                if not isinstance(self.address, str):
                    return (await loop.create_connection(lambda: Wire(self), *self.address))[1]
                while (sock := connect_unix(self.address)) is None:  # noqa: ASYNC110 - nothing tells when to try
                    await asyncio.sleep(CONNECT_AGAIN_S)
                return (await loop.create_unix_connection(lambda: Wire(self), sock=sock))[1]
        except TimeoutError:
            raise DeadlineExceeded(f"no connection to the daemon at {self.address} in time.") from None
        except OSError as error:
            raise ConnectionLost(f"no daemon at {self.address} ({error.strerror or error}).") from None

    def _forget(self, lease: int) -> None:
        if self._wire is not None:
            self._wire.mailbox.forget(lease)

    def _tell(self, method: str, params: m.Message) -> None:
        if self._wire is not None:
            self._wire.tell(method, params)
