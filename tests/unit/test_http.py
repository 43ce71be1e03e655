"""The HTTP face, asked over a real socket by a real client."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from kvstore.errors import BY_CODE, ConfigError
from kvstore.http import TABLE, HttpServer, guard, start_http
from kvstore.http import events as events_module
from kvstore.http.numbers import NOTHING
from kvstore.namespaces import NamespaceRegistry
from kvstore.quota_desk import QuotaDesk

TOKEN = "0123456789abcdef"
JSON = {"Content-Type": "application/json"}
PATHS = {route.path for route in TABLE}


class FakeSource:
    """A daemon that says what it is told to."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "boot": "b00t",
            "version": "9.9",
            "tiers": {"host": {"capacity": 100, "used": 25}},
        }
        self.ready: tuple[bool, str] = (True, "recovered 3 of 3 blocks")
        self.alive = True
        self.broken = False

    def snapshot(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("the secret is 1234")
        return dict(self.state)

    def readiness(self) -> tuple[bool, str]:
        return self.ready

    def liveness(self) -> bool:
        return self.alive

    def settings(self) -> list[tuple[str, str, str]]:
        return [("listen.token", "********", "KVSTORE_TOKEN"), ("host.bytes", "8 GiB", "default")]


BUSY = {
    "asked_blocks": 100,
    "hit_blocks": {"host": 40, "disk": 10},
    "tiers": {"host": {"capacity": 4096}, "disk": {"breaker": {"state": "open"}}},
}


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest_asyncio.fixture
async def server(source: FakeSource) -> AsyncIterator[HttpServer]:
    running = await start_http(source, "127.0.0.1", 0, QuotaDesk({}, NamespaceRegistry()), token=TOKEN)
    yield running
    await running.close()


@pytest_asyncio.fixture
async def client(server: HttpServer) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as session:
        yield session


async def is_typed(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """The body of an error, which must be exactly {code, cause, remedy} with a code that exists."""
    body = json.loads(await answer.read())
    assert set(body) == {"code", "cause", "remedy"}
    assert body["code"] in BY_CODE
    assert body["cause"]
    assert body["remedy"]
    return body


# -- what there is -----------------------------------------------------------------------------------------------------


def test_the_route_table():
    assert [f"{route.method} {route.path} {route.access.value}" for route in TABLE] == [
        "GET / read",
        "GET /dashboard/app.js read",
        "GET /dashboard/style.css read",
        "GET /livez open",
        "GET /readyz open",
        "GET /healthz open",
        "GET /metrics read",
        "GET /v1/openapi.json read",
        "GET /v1/stats read",
        "GET /v1/config read",
        "GET /v1/events read",
        "GET /v1/where read",
        "POST /v1/where read",
        "GET /v1/explain read",
        "POST /v1/explain read",
        "GET /v1/leases read",
        "GET /v1/quotas read",
        "PUT /v1/quotas act",
        "DELETE /v1/quotas act",
        "GET /v1/policy read",
        "PUT /v1/policy act",
        "POST /v1/drop act",
        "PUT /v1/drain act",
    ]


PLAIN = [route.path for route in TABLE if route.method == "GET" and route.query is None]


@pytest.mark.parametrize("path", sorted({*PLAIN} - {"/v1/leases", "/v1/policy"}))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_route_answers_with_the_guarding_headers(client: aiohttp.ClientSession, path: str, method: str):
    async with client.request(method, path) as answer:
        assert answer.status == 200
        for name, value in guard.HEADERS.items():
            assert answer.headers[name] == value
        if method == "HEAD":
            assert await answer.read() == b""


async def test_errors_carry_the_guarding_headers_too(client: aiohttp.ClientSession):
    async with client.get("/nowhere") as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


async def test_stats_are_the_snapshot(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= {"boot": b"\x01\xff", "bad": float("inf"), "nested": {3: (1, 2)}, "odd": object}
    got = await (await client.get("/v1/stats")).json()
    assert got["boot"] == "01ff"
    assert got["bad"] is None
    assert got["nested"] == {"3": [1, 2]}
    assert got["tiers"] == source.state["tiers"]


async def test_config_shows_value_and_origin(client: aiohttp.ClientSession):
    got = await (await client.get("/v1/config")).json()
    assert got["settings"][0] == {"name": "listen.token", "value": "********", "origin": "KVSTORE_TOKEN"}


async def test_metrics_are_what_stats_say(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= BUSY
    answer = await client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = [s for family in text_string_to_metric_families(await answer.text()) for s in family.samples]
    assert ("kvstore_asked_blocks_total", 100) in [(s.name, s.value) for s in samples]


# -- health ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
async def test_not_ready_is_503_with_the_reason(client: aiohttp.ClientSession, source: FakeSource, path: str):
    source.ready = (False, "recovering 41 of 100 blocks")
    async with client.get(path) as answer:
        assert answer.status == 503
        assert (await is_typed(answer))["cause"] == "recovering 41 of 100 blocks"
    source.ready = (True, "recovered 100 blocks")
    async with client.get(path) as answer:
        assert answer.status == 200
        assert await answer.json() == {"ready": True, "reason": "recovered 100 blocks", "degraded": []}


async def test_draining_is_not_ready(client: aiohttp.ClientSession, source: FakeSource):
    source.state["draining"], source.ready = True, (False, "shutting down")
    async with client.get("/readyz") as answer:
        assert answer.status == 503
        assert (await is_typed(answer))["code"] == "KV403"


async def test_a_weak_optional_tier_degrades_but_stays_ready(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= BUSY
    async with client.get("/readyz") as answer:
        assert answer.status == 200
        assert (await answer.json())["degraded"] == ["disk"]


async def test_liveness(client: aiohttp.ClientSession, source: FakeSource):
    assert (await client.get("/livez")).status == 200
    source.alive = False
    async with client.get("/livez") as answer:
        assert answer.status == 503
        await is_typed(answer)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_only_reading_is_allowed(client: aiohttp.ClientSession, method: str):
    async with client.request(method, "/v1/stats") as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
        await is_typed(answer)


async def test_a_body_is_refused_and_not_read(client: aiohttp.ClientSession):
    async with client.get("/v1/stats", data=b"x" * 100_000) as answer:
        assert answer.status == 413
        assert answer.headers["Connection"] == "close"
        await is_typed(answer)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:7070", 200),
        ("[::1]:7070", 200),
        ("evil.example", 403),
        ("evil.example:7070", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.1", 403),
        ("[::1", 403),
        ("[::1]x", 403),
        ("localhost:x", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
async def test_the_host_header_must_name_this_server(client: aiohttp.ClientSession, host: str, status: int):
    async with client.get("/v1/stats", headers={"Host": host}) as answer:
        assert answer.status == status
        if status == 403:
            await is_typed(answer)


def test_bound_to_every_address_any_literal_address_will_do_but_no_name():
    assert guard.host_allowed("10.1.2.3:7070", "0.0.0.0")
    assert guard.host_allowed("[fe80::1]:7070", "::")
    assert not guard.host_allowed("evil.example", "0.0.0.0")
    assert guard.host_allowed("10.1.2.3", "10.1.2.3")
    assert not guard.host_allowed("10.1.2.4", "10.1.2.3")


async def raw(server: HttpServer, data: bytes) -> bytes:
    """Everything that is answered to these bytes until the connection ends."""
    port = int(server.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_a_typed_400(server: HttpServer, data: bytes):
    head, _, body = (await raw(server, data)).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"403"), head
    assert set(json.loads(body)) == {"code", "cause", "remedy"}


async def test_odd_paths_get_only_typed_4xx(server: HttpServer):
    chance = random.Random(7)
    odd = [
        "..",
        "%2e%2e",
        "dashboard",
        "index.html",
        "app.js",
        "%00",
        "\\",
        ";",
        "?",
        "*",
        "v1",
        "metrics",
        "etc",
        "%ff",
        "é",
    ]
    paths = [
        "/dashboard/",
        "/dashboard/index.html",
        "/dashboard/../http/server.py",
        "//metrics",
        "/v1/stats/",
        "/run_script",
    ]
    paths += ["/" + "/".join(chance.choices(odd, k=chance.randint(1, 6))) for _ in range(300)]
    paths += ["/" + "".join(chr(chance.randint(33, 126)) for _ in range(chance.randint(1, 60))) for _ in range(300)]
    for path in paths:
        target = path.encode()
        answer = await raw(server, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        if path.split("?")[0].split("#")[0] in PATHS:
            continue
        assert 400 <= int(head.split(b" ")[1]) < 500, (path, head)
        assert set(json.loads(body)) == {"code", "cause", "remedy"}


async def test_a_defect_is_a_typed_500_that_tells_nothing(
    client: aiohttp.ClientSession, source: FakeSource, caplog: Any
):
    source.broken = True
    with caplog.at_level(logging.ERROR, "kvstore.http"):
        for path in ("/", "/metrics", "/v1/stats", "/v1/events"):
            async with client.get(path) as answer:
                assert answer.status == 500
                assert "1234" not in json.dumps(await is_typed(answer))
    assert "the secret" in caplog.text


async def test_connections_are_bounded(server: HttpServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 5)
    port = int(server.url.rsplit(":", 1)[1])
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
    assert await raw(server, b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n") == b""
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.1)
    assert b"200 OK" in await raw(server, b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n")


async def test_a_silent_connection_is_closed(source: FakeSource, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "FIRST_REQUEST_S", 0.1)
    server = await start_http(source, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    writer.write(b"GET / HTTP/1.1\r\n")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    await server.close()


# -- starting and stopping ---------------------------------------------------------------------------------------------


async def test_a_taken_port_is_a_config_error(source: FakeSource):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            await start_http(source, "127.0.0.1", port)
    assert str(port) in caught.value.cause
    assert caught.value.remedy


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 0), ("127.0.0.1", 70_000), ("no.such.host.invalid", 0)])
async def test_an_address_that_cannot_be_bound_is_a_config_error(source: FakeSource, host: str, port: int):
    with pytest.raises(ConfigError):
        await start_http(source, host, port)


async def test_close_ends_streams_and_frees_the_port(source: FakeSource):
    server = await start_http(source, "127.0.0.1", 0)
    port = int(server.url.rsplit(":", 1)[1])
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/events") as stream:
        await stream.content.readuntil(b"\n\ndata: ")
        async with asyncio.timeout(5):
            await server.close()
            rest = await stream.content.read()
    assert rest.endswith(b"event: end\ndata: {}\n\n")
    await server.close()
    again = await start_http(source, "127.0.0.1", port)
    await again.close()


# -- events ------------------------------------------------------------------------------------------------------------


async def next_event(stream: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next event of a stream."""
    async with asyncio.timeout(5):
        while True:
            line = await stream.content.readline()
            if line.startswith(b"data: "):
                return json.loads(line[6:])


async def test_events_carry_what_the_page_shows(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= {"asked_blocks": 0, "hit_blocks": {"host": 0}}
    async with client.get("/v1/events") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        first = await next_event(stream)
        assert first["boot"] == "b00t"
        assert first["text"]["hit_rate"] == NOTHING
        source.state |= {"asked_blocks": 50, "hit_blocks": {"host": 25}}
        second = await next_event(stream)
        assert second["text"]["hit_rate"] == "50 %"


async def test_the_number_of_viewers_is_limited(client: aiohttp.ClientSession, server: HttpServer):
    streams = [await client.get("/v1/events") for _ in range(events_module.MAX_VIEWERS)]
    for stream in streams:
        await next_event(stream)
    async with client.get("/v1/events") as answer:
        assert answer.status == 429
        assert (await is_typed(answer))["code"] == "KV402"
    streams[0].close()
    async with asyncio.timeout(5):
        while server.viewers == events_module.MAX_VIEWERS:
            await asyncio.sleep(0.05)
    async with client.get("/v1/events") as answer:
        assert answer.status == 200
    for stream in streams:
        stream.close()


async def test_a_slow_viewer_holds_few_events_and_is_cut_off(source: FakeSource, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events_module, "STUCK_S", 0.5)
    server = await start_http(source, "127.0.0.1", 0)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        await loop.sock_sendall(slow, b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(5):
            while not server.viewers:
                await asyncio.sleep(0.01)
        hub = server._face.hub
        viewer = next(iter(hub.viewers))
        event = b"data: " + b"x" * 1_000_000 + b"\n\n"
        for _ in range(200):
            hub.publish(event)
            assert viewer.waiting() <= events_module.QUEUED * len(event)
            await asyncio.sleep(0.005)
        async with asyncio.timeout(5):
            while server.viewers:
                await asyncio.sleep(0.05)
    await server.close()


async def test_silence_is_filled_with_comments(
    client: aiohttp.ClientSession, source: FakeSource, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events_module, "HEARTBEAT_S", 0.05)
    async with client.get("/v1/events") as stream:
        await next_event(stream)
        source.broken = True
        async with asyncio.timeout(5):
            await stream.content.readuntil(b": alive\n\n")


async def test_rules_are_changed_with_the_token_alone(client: aiohttp.ClientSession):
    rule = json.dumps({"name": "a", "tenant": "a", "limit": "10%"})
    shown = {"Authorization": f"Bearer {TOKEN}"}
    for wrong in ({}, {"Authorization": "Bearer 0123456789abcdee"}, {"Authorization": TOKEN}):
        for method, query in (("PUT", ""), ("DELETE", "?name=a")):
            async with client.request(method, "/v1/quotas" + query, data=rule, headers=wrong) as answer:
                assert answer.status == 401
                await is_typed(answer)
    async with client.put("/v1/quotas", data=rule, headers=shown | JSON) as answer:
        assert answer.status == 200
        assert (await answer.json())["rules"] == [json.loads(rule)]
    async with client.get("/v1/quotas") as answer:
        assert (await answer.json())["rules"] == [json.loads(rule)]
    async with client.delete("/v1/quotas?name=a", headers=shown) as answer:
        assert (await answer.json())["rules"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"name":"a"}', b'{"name":"a","tenant":"a","limit":"x"}', b"\xff"])
async def test_a_bad_rule_is_a_typed_error(client: aiohttp.ClientSession, body: bytes):
    async with client.put("/v1/quotas", data=body, headers={"Authorization": f"Bearer {TOKEN}"} | JSON) as answer:
        assert answer.status in (400, 409)
        assert (await is_typed(answer))["code"] == ("KV203" if answer.status == 400 else "KV404")


async def test_a_long_rule_is_refused_unread(client: aiohttp.ClientSession):
    async with client.put("/v1/quotas", data=b"x" * 70_000, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        assert answer.status == 413
    for path in ("/v1/stats", "/"):
        async with client.put(path, data=b"{}") as answer:
            assert answer.status == 405


async def test_without_a_token_no_rule_can_be_changed(source: FakeSource):
    server = await start_http(source, "127.0.0.1", 0, QuotaDesk({}, NamespaceRegistry()))
    try:
        async with aiohttp.ClientSession(server.url) as session:
            for shown in ("Bearer ", "Bearer x", ""):
                headers = {"Authorization": shown}
                async with session.delete("/v1/quotas?name=a", headers=headers) as answer:
                    assert answer.status == 403
                    assert "no token" in (await is_typed(answer))["cause"]
    finally:
        await server.close()
