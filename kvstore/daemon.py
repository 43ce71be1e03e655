"""Wiring and life of the daemon: build the tiers, listen, say so, drain on a signal, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

import uvloop

from kvstore import __version__, machine
from kvstore.chain import TierChain
from kvstore.config import Loaded, split_address
from kvstore.encoding import Encoding
from kvstore.errors import ConfigError, DeviceUnavailable, KVStoreError
from kvstore.eviction import make_policy
from kvstore.gpu_desk import GpuDesk, off_state, open_tier
from kvstore.namespaces import describe_namespace, read_description
from kvstore.obs.snapshot import snapshot
from kvstore.service import Service, only_exact
from kvstore.sockets import SocketDir
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier
from kvstore.types import Namespace, Scope, TierCode
from kvstore.units import format_size
from kvstore.where import Where
from kvstore.wire.fds import FdServer
from kvstore.wire.server import Listener
from kvstore.wire.traffic import Traffic

if TYPE_CHECKING:
    from kvstore.http import HttpServer
    from kvstore.obs.trace import Tracing
    from kvstore.profile import Profiles
    from kvstore.remote_events import EventExchange
    from kvstore.settings import Codecs

log = logging.getLogger("kvstore.daemon")

_HOUSEKEEPING_S = 1.0
_PR_SET_DUMPABLE = 4


class Daemon:
    """One running daemon.

    Parameters
    ----------
    loaded : Loaded
        Settings and their origins.
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
        self._gpu_off = ""

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
        self.chain = TierChain(host, self._lower_tiers(), parallel=2 * s.disk.threads, twice=twice)
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

    def _lower_tiers(self) -> list[Tier]:
        from kvstore.tiers.throttle import Throttled
        from kvstore.tiers.wrappers import Breaker

        s = self._settings
        tiers: list[Tier] = []
        if s.disk.bytes:
            from kvstore.tiers.disk import DiskTier

            # The automatic budget is a share of free space; what is ours already counts with the same share.
            share = machine.DISK_SHARE if "auto" in self.loaded.origins["disk.bytes"] else 0.0
            disk = DiskTier(
                s.disk.path,
                s.disk.bytes,
                threads=s.disk.threads,
                policy=s.disk.policy,
                found_share=share,
                pin_share=s.limits.pin_percent / 100,
            )
            shielded = Breaker(disk, deadline_s=s.disk.deadline_s)
            bound = s.disk.max_bandwidth
            tiers.append(self._ladder(Throttled(shielded, bound) if bound else shielded, s.codecs.disk))
        if s.redis.url:
            tiers.append(self._ladder(Breaker(self._redis_tier(), deadline_s=4 * s.redis.timeout_s), s.codecs.redis))
        return tiers

    async def _gpu_tier(self, host: HostTier) -> GpuDesk | None:
        """The GPU tier, if it is asked for and can be had; if not, log, banner and snapshot say why."""
        if not self._settings.gpu.bytes:
            return None
        try:
            return await asyncio.to_thread(open_tier, self._settings.gpu, host)
        except DeviceUnavailable as error:
            self._gpu_off = error.cause
            log.warning("the GPU tier is off: %s %s", error.cause, error.remedy)
            return None

    def _ladder(self, tier: Tier, exact: str) -> Tier:
        """A tier that keeps blocks encoded as their namespace allows."""
        from kvstore.ladder import Ladder

        threads = self._settings.codecs.threads
        return Ladder(tier, self._fields, exact=exact, profiles=self._profiles, threads=threads)

    def _fields(self, scope: Scope) -> Namespace | None:
        return self.service.namespaces.fields(scope)

    def _refuse_fidelity(self, namespace: Namespace) -> str:
        """Why a namespace may not have the fidelity it asks for; empty if it may."""
        return only_exact(namespace) if self._profiles is None else self._profiles.check(namespace)

    def _redis_tier(self) -> Tier:
        from kvstore.remote.link import read_key
        from kvstore.tiers.redis import RedisTier

        s = self._settings.redis
        return RedisTier(
            s.url.reveal(),
            s.bytes,
            prefix=s.prefix,
            cluster=s.cluster,
            connections=s.connections,
            ttl_s=s.ttl_s,
            timeout_s=s.timeout_s,
            key=b"" if s.key_file is None else read_key(s.key_file),
            own_domain=f"uid-{os.getuid()}",
        )

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
            self.service.desk.tick()
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
        if self._gpu_off:
            shown["tiers"]["gpu"] = off_state(self._gpu_off)
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

    def banner(self) -> str:
        """Where it listens and what it may use."""
        s = self._settings
        arena = self.chain.host.arena
        pages = "huge pages" if arena.huge else "4 KiB pages"
        lines = [
            f"kvstore {__version__} is ready ({time.monotonic() - self.started:.2f} s)",
            f"  socket   {s.listen.socket}",
        ]
        if s.listen.tcp:
            lines.append(f"  tcp      {s.listen.tcp}  (with a token)")
        lines.append(f"  memory   up to {format_size(s.host.bytes)} in shared memory ({pages})")
        if (gpu := self.service.gpu) is not None:
            lines.append(f"  gpu      {format_size(gpu.tier.pool.capacity)} of {gpu.name}, for copies of hot blocks")
        elif self._gpu_off:
            lines.append(f"  gpu      off: {self._gpu_off}")
        for tier in self.chain.below:
            state, usage = tier.describe_state(), tier.usage()
            size, found = format_size(usage.capacity), f"{usage.blocks} blocks found"
            lines.append(f"  {tier.name:<8} up to {size} {place_of(state)}, {found}")
        if not self.chain.below:
            full = "auto" in self.loaded.origins["disk.bytes"]
            why = f" (no free space around {self._settings.disk.path})" if full else ""
            lines.append(f"  disk     off: what memory cannot hold is forgotten{why}")
        lines.append(f"  status   {self._http.url if self._http else 'off'}")
        lines.append('  vLLM     --kv-transfer-config \'{"kv_connector":"KVStoreConnector","kv_role":"kv_both",')
        lines.append('             "kv_load_failure_policy":"recompute"}\'')
        lines.append("Ctrl-C to stop.")
        return "\n".join(lines)


def place_of(state: Mapping[str, Any]) -> str:
    """Where a tier keeps its blocks, in words."""
    if "path" in state:
        how = "direct I/O" if state.get("direct_io", True) else f"buffered I/O: {state.get('direct_io_reason')}"
        return f"in {state['path']} ({how})"
    return "for all its daemons" if state.get("connected") else f"not reached yet ({state.get('last_error')})"


def check_codecs(asked: Codecs) -> None:
    """Codecs need torch, which small images leave out; blocks that stay raw need nothing."""
    wanted = [name for name in ("disk", "redis") if getattr(asked, name) != "raw"]
    wanted += ["profiles"] if asked.profiles is not None else []
    if wanted and importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"codecs.{wanted[0]}: codecs need torch, which is not installed here.",
            "`pip install torch`, or keep blocks raw and name no profiles.",
        )


async def _main(loaded: Loaded) -> int:
    daemon = Daemon(loaded)
    loop = asyncio.get_running_loop()
    try:
        await daemon.start()
    except BaseException:
        await daemon.close()
        raise
    signals = 0

    def interrupted() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(130)  # asked twice: now, with whatever is left unwritten
        daemon.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    _say(daemon.banner())
    _notify_systemd("READY=1")
    await daemon.wait()
    _notify_systemd("STOPPING=1")
    queued = daemon.chain.dirty_blocks
    _say(f"\nStopping: writing {queued} blocks to disk." if queued else "\nStopping.")
    left = await daemon.close()
    _say(f"{left} blocks were not written in time." if left else "Bye.")
    return 0


def _say(text: str) -> None:
    """Print for whoever looks on; what is not on disk yet must not be lost because nobody does any longer."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # a pipe without a reader, a full disk; a letter that the terminal does not have
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


def run(loaded: Loaded) -> int:
    """Run a daemon until it is told to end; its exit status."""
    _set_up_logging(loaded)
    # What is in memory are people's prompts: no core dumps of them.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # Each slab and each connection takes descriptors; the usual soft limit is for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(KeyboardInterrupt):
        return uvloop.run(_main(loaded))
    return 130


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(error, KVStoreError):
            entry["code"] = error.code
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _set_up_logging(loaded: Loaded) -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if loaded.settings.log.json else plain)
    root = logging.getLogger("kvstore")
    root.handlers[:] = [handler]
    root.setLevel(loaded.settings.log.level.upper())
    root.propagate = False


def _notify_systemd(state: str) -> None:
    """Tell a supervisor of type ``notify`` what we are doing, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(state.encode())
