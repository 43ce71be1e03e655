"""The HTTP face: sockets, dispatch by the table of routes, and a sample of the daemon once a second.

What is answered is in `kvstore.http.face`, who may ask in `kvstore.http.access`, and all there is in
`kvstore.http.routes`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time

from aiohttp import web

from kvstore.errors import ConfigError, InternalError, KVStoreError
from kvstore.http import guard
from kvstore.http.access import Gate
from kvstore.http.face import Face, Operator, Places, Rules, Source, status_of
from kvstore.http.routes import find
from kvstore.obs.history import series
from kvstore.rules import is_loopback

log = logging.getLogger("kvstore.http")

SAMPLE_S = 1.0
CLOSE_S = 2.0
"""How long `close` waits for answers that are under way."""


class HttpServer:
    """A running HTTP face. Made by `start_http`.

    Attributes
    ----------
    url : str
        Where it listens, for people.
    """

    def __init__(self, face: Face, source: Source, host: str, gate: Gate) -> None:
        self._face = face
        self._source = source
        self._host = host
        self._gate = gate
        self._runner: web.ServerRunner | None = None
        self._sampling: asyncio.Task[None] | None = None
        self.url = ""

    @property
    def viewers(self) -> int:
        """Open event streams."""
        return len(self._face.hub.viewers)

    async def start(self, port: int) -> None:
        """Listen.

        Raises
        ------
        ConfigError
            Where the address cannot be bound.
        """
        runner = web.ServerRunner(guard.Server(self._answer), shutdown_timeout=CLOSE_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, port).start()
        except (OSError, OverflowError) as error:
            await runner.cleanup()
            raise _not_bound(self._host, port, error) from error
        self._runner = runner
        bound = runner.addresses[0]
        name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self.url = f"http://{name}:{bound[1]}"
        self._sample()
        self._sampling = asyncio.create_task(self._keep_sampling(), name="kvstore-http-sampling")

    async def close(self) -> None:
        """End the streams, finish what is under way and stop listening. May be called twice."""
        self._face.hub.close()
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
            self._sampling = None
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        refused = guard.refuse(request, self._host, self._gate)
        route = find(request.method, request.path)
        if refused is not None or route is None:
            return refused or guard.error_response(InternalError("a request without a route was let in."))
        try:
            return await self._face.answer(route, request)
        except KVStoreError as error:
            return guard.error_response(error, status_of(error, route))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("cannot answer %s", request.path)
            return guard.error_response(InternalError(f"{request.path} could not be made."))

    def _sample(self) -> None:
        snapshot = self._source.snapshot()
        self._face.history.add(time.monotonic(), series(snapshot))
        if self._face.hub.viewers:
            self._face.hub.publish(self._face.event(snapshot))

    async def _keep_sampling(self) -> None:
        failing = False
        while True:
            # Wake at whole seconds of the clock: all pages of a fleet then tick together, and drift does not add up.
            await asyncio.sleep(SAMPLE_S - time.monotonic() % SAMPLE_S)
            try:
                self._sample()
                failing = False
            except Exception:
                if not failing:
                    log.exception("cannot sample the daemon; silent about it until it works again")
                failing = True


async def start_http(
    source: Source,
    host: str,
    port: int,
    rules: Rules | None = None,
    places: Places | None = None,
    operator: Operator | None = None,
    token: str = "",
) -> HttpServer:
    """Serve `source` on host:port and return the running server.

    Parameters
    ----------
    source : Source
        The daemon.
    host : str
        Address to listen on.
    port : int
        Port; 0 takes a free one, `HttpServer.url` tells which.
    rules, places, operator : optional
        The parts of the daemon that answer about quotas, prefixes and blocks.
    token : str
        What has to be shown to change anything, and beyond loopback for everything but the probes.

    Raises
    ------
    ConfigError
        Where the address cannot be bound, or is beyond loopback and there is no token.
    """
    wide = not is_loopback(f"[{host}]:0" if ":" in host else f"{host}:0")
    if wide and not token:
        raise ConfigError(
            f"http.address: {host} is beyond loopback and there is no token.",
            "Give one with --token-file, or listen on 127.0.0.1.",
        )
    face = Face(source, rules, places, operator, wide)
    server = HttpServer(face, source, host, Gate(token, wide))
    await server.start(port)
    return server


def _not_bound(host: str, port: int, error: Exception) -> ConfigError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return ConfigError(f"HTTP port {port} on {host} is taken.", "Choose another, or 0 for any that is free.")
    if number == errno.EACCES:
        return ConfigError(f"HTTP port {port} on {host} is not allowed to this user.", "Choose a port above 1023.")
    return ConfigError(f"Cannot listen for HTTP on {host} port {port}: {error}.", "Choose an address of this machine.")
