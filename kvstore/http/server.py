"""The HTTP face: what the daemon tells about itself, read-only but for the rules about quotas.

`ROUTES` is all there is; a path is looked up by exact match, so there is nothing to traverse. The daemon is known only
as a `Source`. Nothing executes, nothing is proxied, and no environment is shown.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from kvstore.errors import ConfigError, InternalError, KVStoreError, ShuttingDown, Unavailable
from kvstore.http import guard, page, quotas, view, where
from kvstore.http.events import Hub
from kvstore.obs import metrics
from kvstore.obs.history import History, series

log = logging.getLogger("kvstore.http")

SAMPLE_S = 1.0
CLOSE_S = 2.0
"""How long `close` waits for answers that are under way."""


class Source(Protocol):
    """What the HTTP face asks of the daemon. All of it is called on the event loop and must return at once."""

    def snapshot(self) -> dict[str, Any]:
        """State and counters, as one consistent picture."""
        ...

    def readiness(self) -> tuple[bool, str]:
        """Whether clients may come, and the reason in words."""
        ...

    def liveness(self) -> bool:
        """Whether the daemon's own work goes on."""
        ...

    def settings(self) -> list[tuple[str, str, str]]:
        """(name, value as it may be shown, origin) of every setting; secrets are masked already."""
        ...


class HttpServer:
    """A running HTTP face. Made by `start_http`.

    Attributes
    ----------
    url : str
        Where it listens, for people.
    """

    def __init__(
        self, source: Source, host: str, desk: quotas.Desk | None = None, places: where.Desk | None = None
    ) -> None:
        self._source = source
        self._desk = desk
        self._places = places
        self._host = host
        self._history = History()
        self._hub = Hub()
        self._template = page.load_template()
        self._assets = page.load_assets()
        self._runner: web.ServerRunner | None = None
        self._sampling: asyncio.Task[None] | None = None
        self.url = ""

    @property
    def viewers(self) -> int:
        """Open event streams."""
        return len(self._hub.viewers)

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
        self._hub.close()
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
            self._sampling = None
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        refused = guard.refuse(request, self._host, list(ROUTES))
        if refused is not None:
            return refused
        try:
            return await ROUTES[request.path](self, request)
        except KVStoreError as error:
            status = 429 if error.code == "KV402" else None
            return guard.error_response(error, status)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("cannot answer %s", request.path)
            return guard.error_response(InternalError(f"{request.path} could not be made."))

    async def _livez(self, request: web.BaseRequest) -> web.StreamResponse:
        if not self._source.liveness():
            raise Unavailable("The daemon's work has stopped.", "Restart it; its log tells what came before.")
        return guard.json_response({"live": True})

    async def _readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        ready, reason = self._source.readiness()
        snapshot = self._source.snapshot()
        if not ready:
            if snapshot.get("draining"):
                raise ShuttingDown(reason)
            raise Unavailable(reason, "Wait; ask again until this answers 200.")
        return guard.json_response({"ready": True, "reason": reason, "degraded": view.degraded(snapshot)})

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        body = metrics.expose(self._source.snapshot())
        return web.Response(body=body, headers={**guard.HEADERS, "Content-Type": metrics.CONTENT_TYPE})

    async def _stats(self, request: web.BaseRequest) -> web.StreamResponse:
        return guard.json_response(self._source.snapshot())

    async def _config(self, request: web.BaseRequest) -> web.StreamResponse:
        names = ("name", "value", "origin")
        return guard.json_response(
            {"settings": [dict(zip(names, each, strict=True)) for each in self._source.settings()]}
        )

    async def _events(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._hub.serve(request, self._event(self._source.snapshot()))

    async def _quotas(self, request: web.BaseRequest) -> web.StreamResponse:
        return await quotas.answer(self._desk, request)

    async def _where(self, request: web.BaseRequest) -> web.StreamResponse:
        return await where.answer(self._places, request)

    async def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        snapshot = self._source.snapshot()
        shown = view.build(snapshot, self._history, self._source.readiness())
        text = page.render(self._template, shown, view.tier_names(snapshot), self._source.settings())
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=guard.HEADERS)

    async def _asset(self, request: web.BaseRequest) -> web.StreamResponse:
        body, kind = self._assets[request.path.removeprefix("/dashboard/")]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=guard.HEADERS)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _event(self, snapshot: dict[str, Any]) -> bytes:
        """One server-sent event. The list of namespaces is cut, since it goes to every viewer every second."""
        short = dict(snapshot)
        if isinstance(short.get("namespaces"), list):
            short["namespaces"] = short["namespaces"][: view.MAX_ROWS]
        shown = view.build(snapshot, self._history, self._source.readiness())
        body = {
            "snapshot": guard.plain(short),
            "rates": view.rates(self._history),
            "view": msgspec.to_builtins(shown),
        }
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _sample(self) -> None:
        snapshot = self._source.snapshot()
        self._history.add(time.monotonic(), series(snapshot))
        if self._hub.viewers:
            self._hub.publish(self._event(snapshot))

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


Handler = Callable[[HttpServer, web.BaseRequest], Awaitable[web.StreamResponse]]

ROUTES: dict[str, Handler] = {
    "/": HttpServer._page,
    "/livez": HttpServer._livez,
    "/readyz": HttpServer._readyz,
    "/healthz": HttpServer._readyz,
    "/metrics": HttpServer._metrics,
    "/v1/stats": HttpServer._stats,
    "/v1/config": HttpServer._config,
    "/v1/events": HttpServer._events,
    quotas.PATH: HttpServer._quotas,
    where.PATH: HttpServer._where,
    "/dashboard/app.js": HttpServer._asset,
    "/dashboard/style.css": HttpServer._asset,
}
"""Every path that is served, by GET and HEAD, and by what `guard.WRITES` says."""


async def start_http(
    source: Source, host: str, port: int, desk: quotas.Desk | None = None, places: where.Desk | None = None
) -> HttpServer:
    """Serve `source` on host:port and return the running server.

    Parameters
    ----------
    source : Source
        The daemon.
    host : str
        Address to listen on. Nothing here asks for a token: beyond loopback, the caller answers for who can reach it.
    port : int
        Port; 0 takes a free one, `HttpServer.url` tells which.
    desk : Desk, optional
        Where the rules about quotas are.
    places : Desk, optional
        Who knows which daemon has a prefix.

    Raises
    ------
    ConfigError
        Where the address cannot be bound.
    """
    server = HttpServer(source, host, desk, places)
    await server.start(port)
    return server


def _not_bound(host: str, port: int, error: Exception) -> ConfigError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return ConfigError(f"HTTP port {port} on {host} is taken.", "Choose another, or 0 for any that is free.")
    if number == errno.EACCES:
        return ConfigError(f"HTTP port {port} on {host} is not allowed to this user.", "Choose a port above 1023.")
    return ConfigError(f"Cannot listen for HTTP on {host} port {port}: {error}.", "Choose an address of this machine.")
