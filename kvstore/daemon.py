"""Wiring and life of the daemon: build the tiers, listen, drain at the end, leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from kvstore.chain import TierChain
from kvstore.config import Loaded, split_address
from kvstore.encoding import Encoding
from kvstore.errors import ConfigError, DeviceUnavailable
from kvstore.eviction import make_policy
from kvstore.gpu_desk import GpuDesk, off_state, open_tier
from kvstore.lower_tiers import check_codecs, lower_tiers
from kvstore.namespaces import describe_namespace, only_exact, read_description
from kvstore.obs.snapshot import snapshot
from kvstore.service import Service
from kvstore.sockets import SocketDir
from kvstore.tiers.host import HostTier
from kvstore.types import Namespace, Scope, TierCode
from kvstore.where import Where
from kvstore.wire.fds import FdServer
from kvstore.wire.server import Listener
from kvstore.wire.traffic import Traffic

if TYPE_CHECKING:
    from kvstore.http import HttpServer
    from kvstore.obs.trace import Tracing
    from kvstore.profile import Profiles
    from kvstore.remote_events import EventExchange

log = logging.getLogger("kvstore.daemon")

_HOUSEKEEPING_S = 1.0


class Daemon:
    """One running daemon.

    Parameters
    ----------
    loaded : Loaded
        Settings and their origins.

    Attributes
    ----------
    gpu_off : str
        Why there is no GPU tier although one was asked for; empty if there is, or none was.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._settings = loaded.settings
        self.started = time.monotonic()
        self.ready = False
        self.traffic = Traffic()
        self._beat = time.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._populating = False
        self._stop = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._exchange: EventExchange | None = None
        self._fds: FdServer | None = None
        self._tracing: Tracing | None = None
        self._profiles: Profiles | None = None
        self.gpu_off = ""

    # -- start ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Recover the tiers and listen.

        Raises
        ------
        KVStoreError
            If something the settings ask for cannot be had.
        """
        s = self._settings
        self._sockets = SocketDir(s.listen.socket)
        pins = s.limits.pin_percent / 100
        host = HostTier(s.host.bytes, make_policy(s.host.policy), s.host.slab_bytes, s.host.ahead_bytes, pins)
        host.arena.on_low = self._prepare_memory
        check_codecs(s.codecs)
        if s.codecs.profiles is not None:
            from kvstore.profile import Profiles

            self._profiles = await asyncio.to_thread(Profiles, s.codecs.profiles)
        asked = {TierCode.DISK: s.disk.admission, TierCode.REDIS: s.redis.admission}
        twice = [code for code, admission in asked.items() if admission == "second"]
        below = lower_tiers(self.loaded, self._fields, self._profiles)
        self.chain = TierChain(host, below, parallel=2 * s.disk.threads, twice=twice)
        for tier in self.chain.below:
            await tier.start()
        self.service = Service(
            self.chain,
            token=s.listen.token.reveal(),
            max_block_bytes=s.limits.max_block_bytes,
            max_ttl_s=s.limits.lease_ttl_s,
            event_ring=s.events.ring,
            chunk_bytes=s.chunks.index_bytes,
            chunk_variants=s.chunks.variants,
            refuse_fidelity=self._refuse_fidelity,
            accepts=None if self._profiles is None else Encoding("raw", self._profiles).accepts,
            gpu=await self._gpu_tier(host),
        )
        self.service.snapshot = self.snapshot
        self._restore_namespaces()
        self.service.quotas.load(s.limits.quota_file)
        self._share_events()
        if s.trace.endpoint:
            from kvstore.obs import trace

            self._tracing = trace.start(s.trace.endpoint, s.trace.ratio)
            self.traffic.recorder = self._tracing.record
        await self._listen()
        await self._start_http()
        self._prepare_memory(f"uid-{os.getuid()}")
        self._spawn(self._housekeeping())
        self._spawn(self.service.chunks.rebuild())
        self.ready = True

    async def _gpu_tier(self, host: HostTier) -> GpuDesk | None:
        """The GPU tier, if it is asked for and can be had; if not, log, banner and snapshot say why."""
        if not self._settings.gpu.bytes:
            return None
        try:
            return await asyncio.to_thread(open_tier, self._settings.gpu, host)
        except DeviceUnavailable as error:
            self.gpu_off = error.cause
            log.warning("the GPU tier is off: %s %s", error.cause, error.remedy)
            return None

    def _fields(self, scope: Scope) -> Namespace | None:
        return self.service.namespaces.fields(scope)

    def _refuse_fidelity(self, namespace: Namespace) -> str:
        """Why a namespace may not have the fidelity it asks for; empty if it may."""
        return only_exact(namespace) if self._profiles is None else self._profiles.check(namespace)

    def _restore_namespaces(self) -> None:
        """Know the names of what is on disk, and leave a description there of what is new."""
        for tier in self.chain.below:
            for scope, text in tier.descriptions().items():
                namespace = read_description(text)
                if namespace is None:
                    continue
                if reason := self._refuse_fidelity(namespace):
                    log.warning("blocks of %s, %s, cannot be read: %s.", namespace.model, namespace.fidelity, reason)
                else:
                    self.service.namespaces.introduce(scope.domain, namespace)
        self.service.namespaces.on_new = self._describe

    def _describe(self, scope: Scope) -> None:
        self.service.quotas.introduced(scope)
        text = describe_namespace(self.service.namespaces.find(scope.domain, scope.ns).fields)
        for tier in self.chain.below:
            self._spawn(tier.describe(scope, text))

    async def _listen(self) -> None:
        s = self._settings.listen
        uids = set(s.allow_uids) | {os.getuid()}
        mode = 0o600 if uids == {os.getuid()} else 0o666
        loop = asyncio.get_running_loop()
        listener = Listener(self.service, self.traffic, max_connections=s.max_connections, allow_uids=uids)
        self._listeners.append(listener)
        fd_socket = self._sockets.bind(".fd", mode)
        self._fds = FdServer(
            fd_socket, self.chain.host.arena, self.service.ledger.by_token.get, uids, s.max_connections
        )
        self._servers.append(await loop.create_unix_server(listener, sock=self._sockets.bind("", mode), backlog=1024))
        if s.tcp:
            await self._listen_tcp(s.tcp)

    async def _listen_tcp(self, address: str) -> None:
        s = self._settings
        listener = Listener(
            self.service,
            self.traffic,
            max_connections=s.listen.max_connections,
            allow_uids=None,
            max_payload=s.limits.max_block_bytes,
        )
        self._listeners.append(listener)
        try:
            host, port = split_address(address)
            server = await asyncio.get_running_loop().create_server(listener, host, port)
        except OSError as error:
            raise ConfigError(f"listen.tcp: cannot listen on {address} ({error.strerror or error}).") from None
        for sock in server.sockets:  # connections inherit these
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that vanished says nothing, and holds what it was lent until its connection ends.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._servers.append(server)

    def _share_events(self) -> None:
        """Publish events where the other daemons see them, and follow theirs; say who has what of a prompt."""
        s, domain = self._settings, f"uid-{os.getuid()}"
        if s.redis.url and s.events.share:
            from kvstore.remote.link import read_key
            from kvstore.remote_events import EventExchange

            self._exchange = EventExchange(
                s.redis.url.reveal(),
                cluster=s.redis.cluster,
                prefix=s.redis.prefix,
                name=s.events.name,
                feed=self.service.feed,
                domain=domain,
                length=s.events.stream,
                key=b"" if s.redis.key_file is None else read_key(s.redis.key_file),
                timeout_s=s.redis.timeout_s,
            )
            self._exchange.start()
        peers = tuple if self._exchange is None else self._exchange.known
        self.where = Where(self.chain, self.service.namespaces, domain, s.events.name, peers)

    async def _start_http(self) -> None:
        address = self._settings.http.address
        if not address:
            return
        from kvstore.http import start_http

        host, port = split_address(address)
        parts = self.service.quotas, self.where, self.service.desk, self._settings.listen.token.reveal()
        try:
            self._http = await start_http(self, host, port, *parts)
        except ConfigError as error:
            if self.loaded.origins["http.address"] != "default":
                raise
            # Nobody asked for this very port, so another will do; the banner says which.
            log.warning("%s Using a free port.", error.cause)
            self._http = await start_http(self, host, 0, *parts)
        self.where.address = self._http.url
        if self._exchange is not None:
            self._exchange.address = self._http.url

    # -- work ----------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _prepare_memory(self, domain: str) -> None:
        if not self._populating:
            self._populating = True
            self._spawn(self._populate(domain))

    async def _populate(self, domain: str) -> None:
        """Make slabs ready ahead of need; touching them happens in a thread."""
        arena = self.chain.host.arena
        try:
            while arena.wants_ahead(domain):
                await asyncio.to_thread(arena.make_ahead(domain).populate)
        finally:
            self._populating = False

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            self._beat = time.monotonic()
            self.service.ledger.expire()
            self.chain.host.expire()
            for _ in self.service.desk.tick():
                await asyncio.sleep(0)
            for tier in self.chain.below:
                self._spawn(tier.expire())

    # -- what others ask of the daemon (kvstore.http.Source) -----------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything there is to show."""
        shared = {} if self._exchange is None else {"event_exchange": self._exchange.state()}
        profiles = [] if self._profiles is None else self._profiles.state()
        shown: dict[str, Any] = (
            snapshot(self.service, self.traffic, self.started, self.ready) | shared | {"profiles": profiles}
        )
        if self.gpu_off:
            shown["tiers"]["gpu"] = off_state(self.gpu_off)
        return shown

    def readiness(self) -> tuple[bool, str]:
        """Whether work can be done, and a sentence."""
        if self.service.draining:
            return False, "draining: new blocks are not taken"
        if not self.ready:
            return False, "starting"
        blocks = {tier.name: tier.usage().blocks for tier in self.chain.below}
        return True, "ready" + "".join(f"; {name}: {count} blocks" for name, count in blocks.items())

    def liveness(self) -> bool:
        """Whether the loop is turning."""
        return time.monotonic() - self._beat < 5 * _HOUSEKEEPING_S

    def settings(self) -> list[tuple[str, str, str]]:
        """Settings with their origin, secrets masked."""
        return [(row.key, row.value, row.origin) for row in self.loaded.rows()]

    @property
    def url(self) -> str:
        """Where the status page is; empty if it is off."""
        return "" if self._http is None else self._http.url

    # -- end -----------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the daemon to end."""
        self._stop.set()

    async def wait(self) -> None:
        """Return once somebody asked the daemon to end."""
        await self._stop.wait()

    async def close(self) -> int:
        """Drain and let go of everything; how many blocks were not written to disk."""
        self.ready = False
        left = 0
        if hasattr(self, "service"):
            self.service.draining = True
            left = await self.chain.drain(self._settings.drain_s)
        for server in self._servers:
            server.close()
        for listener in self._listeners:
            listener.close_all()
        if self._fds is not None:
            self._fds.close()
        if self._http is not None:
            await self._http.close()
        if self._exchange is not None:
            await self._exchange.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "service") and self.service.gpu is not None:
            await self.service.gpu.close()
        if hasattr(self, "chain"):
            await self.chain.close()
        if hasattr(self, "_sockets"):
            self._sockets.close()
        return left
