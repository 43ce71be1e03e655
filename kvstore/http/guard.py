"""What stands between a socket and the routes: one error shape, one set of headers, who may ask, and how much."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from kvstore.errors import AccessError, KVStoreError, LimitExceeded, ProtocolError, RequestError
from kvstore.http.access import Gate
from kvstore.http.answers import Problem
from kvstore.http.routes import PATHS, find, methods

log = logging.getLogger("kvstore.http")

MAX_LINE_BYTES = 4096
MAX_HEADERS = 64
MAX_CONNECTIONS = 128
FIRST_REQUEST_S = 10.0
"""A connection that has not sent a whole request by then is closed."""
IDLE_S = 75.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "kvstore",
}
"""Sent with every answer, errors included."""


def json_response(value: Any, status: int = 200) -> web.Response:
    """An answer in JSON. Bytes come out as hexadecimal, what is not finite as null."""
    body = msgspec.json.encode(plain(msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value))
    return web.Response(body=body, status=status, content_type="application/json", headers=HEADERS)


def error_response(error: KVStoreError, status: int | None = None) -> web.Response:
    """An error as {code, cause, remedy}."""
    body = Problem(error.code, error.cause, error.remedy)
    return json_response(body, status or error.http_status)


def plain(value: Any) -> Any:
    """A value as JSON can say it: bytes as hexadecimal, unknown types as their text."""
    if isinstance(value, dict):
        return {name.hex() if isinstance(name, bytes) else str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def host_allowed(header: str, bound: str) -> bool:
    """Whether a Host header names this server.

    A page on another site can make its own name resolve to 127.0.0.1 and then read whatever answers there; but the
    browser still sends that name. So a name must be ``localhost`` or the address we were bound to. Where we are bound
    to every address, any literal address will do: it needs no resolving, so nobody can have redirected it.
    """
    name = _host_of(header)
    if name is None:
        return False
    if name in ("localhost", "127.0.0.1", "::1", _unbracketed(bound).lower()):
        return True
    return _unbracketed(bound) in ("0.0.0.0", "::", "") and _is_address(name)


def _host_of(header: str) -> str | None:
    """The host in ``host``, ``host:port``, ``[v6]`` or ``[v6]:port``; None where it is none of these."""
    if header.startswith("["):
        name, closed, port = header[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = header.partition(":")
    return name.lower() if name and (not port or (port.isascii() and port.isdigit())) else None


def _unbracketed(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Connection(RequestHandler):
    """One connection: bounded in number and in the time to its first request, with our shape for what is not HTTP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, unless there are too many."""
        super().connection_made(transport)
        manager = self._manager
        if manager is not None and len(manager.connections) > MAX_CONNECTIONS:
            log.warning("refused an HTTP connection: %d are open", MAX_CONNECTIONS)
            self.force_close()
            return
        asyncio.get_running_loop().call_later(FIRST_REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self._request_count == 0:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not an HTTP request, or not one within the limits."""
        log.debug("refused what %s sent: %s", request.remote, message or exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has already begun")
        error = ProtocolError(
            "This is not an HTTP request within the limits.",
            f"Send HTTP/1.1 without a body, lines up to {MAX_LINE_BYTES} bytes and at most {MAX_HEADERS} headers.",
        )
        response = error_response(error, 400)
        response.force_close()
        return response


class Server(web.Server):
    """aiohttp's low-level server with our `Connection`."""

    def __call__(self) -> RequestHandler:
        """Protocol for a new connection."""
        return Connection(
            self,
            loop=self._loop,
            access_log=None,  # pyright: ignore[reportArgumentType]
            keepalive_timeout=IDLE_S,
            lingering_time=0.0,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )


def refuse(request: web.BaseRequest, bound: str, gate: Gate) -> web.Response | None:
    """The answer to a request that may not be served, or None where it may.

    Where others than this machine can reach us everything but the probes asks for the token, so that nobody gains by
    redirecting a name, and names are not looked at.
    """
    if not gate.wide and not host_allowed(request.headers.get("Host", ""), bound):
        error = AccessError(
            "The Host header does not name this server.", f"Ask for it by its address, {bound}, or as localhost."
        )
        return _last(error_response(error))
    route = find(request.method, request.path)
    if route is None and (request.path in PATHS or request.method not in ("GET", "HEAD")):
        allowed = ", ".join(methods(request.path))
        error = RequestError(f"{_shown(request.method)} is not served here.", f"What is served is {allowed}.")
        response = _last(error_response(error, 405))
        response.headers["Allow"] = allowed
        return response
    if route is None:
        error = RequestError(f"There is nothing at {_shown(request.path)}.", f"There is: {' '.join(PATHS)}")
        return error_response(error, 404)
    try:
        gate.check(route.access, request.headers.get("Authorization", ""))
    except AccessError as error:
        response = _last(error_response(error))
        if response.status == 401:
            response.headers["WWW-Authenticate"] = gate.challenge(route.access)
        return response
    return _refuse_body(request, route.max_body)


def _refuse_body(request: web.BaseRequest, most: int) -> web.Response | None:
    """The answer to a request with a body that is not read."""
    if most:
        length = request.content_length
        if length is None or length > most:
            error = LimitExceeded(f"The body has no length, or more than {most} bytes.", "Send less at once.")
            return _last(error_response(error, 413))
    elif request.can_read_body or request.body_exists:
        error = LimitExceeded("A request may not have a body here.", "Send the request without a body.")
        return _last(error_response(error, 413))
    return None


def _last(response: web.Response) -> web.Response:
    """End the connection with this answer: what follows may be a body that was never asked for."""
    response.force_close()
    return response


def _shown(text: str) -> str:
    return ascii(text[:100])[1:-1]
