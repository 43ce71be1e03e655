"""Who may ask for what, the description of all there is, and the few things that can be changed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from daemons import NAMESPACE, NS, MakeDaemon, free_port, store

from kvstore import KVStoreClient
from kvstore.errors import BY_CODE, ConfigError, RequestError
from kvstore.http import TABLE, HttpServer, Route, start_http
from kvstore.http.access import Access
from kvstore.http.answers import Problem
from kvstore.http.openapi import describe
from kvstore.keys import prefix_keys
from kvstore.namespaces import NamespaceRegistry
from kvstore.quota_desk import QuotaDesk
from kvstore.sightings import HeldLease, Sighting
from kvstore.types import Scope

TOKEN = "0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BASIC = {"Authorization": "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()}
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": TOKEN},
    {"Authorization": f"Bearer {TOKEN}x"},
    {"Authorization": f"Bearer {TOKEN[:-1]}"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Digest {TOKEN}"},
    {"Authorization": "Basic " + base64.b64encode(f"{TOKEN}:".encode()).decode()},
    {"Authorization": "Basic ???"},
    {"Authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()},
    {"Authorization": "Bearer \udcff"},
]
EXAMPLES: dict[str, Any] = {
    "where": {"namespace": "00" * 32, "keys": []},
    "explain": {"namespace": "00" * 32, "keys": ["11" * 32]},
    "set_quota": {"name": "a", "tenant": "a", "limit": "10%"},
    "set_policy": {"tier": "host", "policy": "lru"},
    "drop": {"namespace": "00" * 32},
    "drain": {"draining": True},
}
QUERIES = {
    "where_get": {"namespace": "00" * 32},
    "explain_get": {"namespace": "00" * 32},
    "remove_quota": {"name": "a"},
}


class Quiet:
    """A daemon with nothing to tell."""

    def snapshot(self) -> dict[str, Any]:
        return {"tiers": {"host": {"capacity": 100, "used": 25}}}

    def readiness(self) -> tuple[bool, str]:
        return True, "ready"

    def liveness(self) -> bool:
        return True

    def settings(self) -> list[tuple[str, str, str]]:
        return []


class Desk:
    """An operator's desk that notes what it was told to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def explain(self, scope: Scope, keys: Sequence[bytes]) -> list[Sighting]:
        return [Sighting(key.hex(), [], 0, False, reason="never_stored") for key in keys]

    def leases(self) -> list[HeldLease]:
        return [HeldLease("engine", "uid-1", "00" * 32, "m", 3, 12, 0, 1.5)]

    def policies(self) -> dict[str, str]:
        return {"host": "lhd"}

    def set_policy(self, tier: str, policy: str) -> None:
        if tier != "host":
            raise RequestError(f"no tier {tier}")
        self.done.append((tier, policy))

    async def drop(self, ns: bytes, domain: str = "") -> int:
        self.done.append((ns, domain))
        return 7

    def drain(self, on: bool) -> int:
        self.done.append(on)
        return 2


class Places:
    """Knows of no daemon."""

    def keys(self, namespace: Any, tokens: Sequence[int]) -> list[bytes]:
        return [bytes(32)] * (len(tokens) // 256)

    async def scores(self, namespace: Any, keys: Sequence[bytes]) -> list[Any]:
        return []


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def serve(desk: Desk, host: str = "127.0.0.1", token: str = TOKEN) -> HttpServer:
    """A server of a quiet daemon."""
    rules = QuotaDesk({}, NamespaceRegistry())
    return await start_http(Quiet(), host, 0, rules, Places(), desk, token)


@pytest_asyncio.fixture
async def near(desk: Desk) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server on loopback."""
    server = await serve(desk)
    async with aiohttp.ClientSession(server.url) as session:
        yield session
    await server.close()


@pytest_asyncio.fixture
async def far(desk: Desk) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server that listens on every address."""
    server = await serve(desk, "0.0.0.0")
    async with aiohttp.ClientSession(server.url.replace("0.0.0.0", "127.0.0.1")) as session:
        yield session
    await server.close()


async def asked(session: aiohttp.ClientSession, route: Route, headers: dict[str, str]) -> tuple[int, str]:
    """Status of a route asked in the right way, and what it wants to be shown."""
    body = EXAMPLES.get(route.name)
    if route.name == "remove_quota":  # there has to be one
        async with session.put("/v1/quotas", json=EXAMPLES["set_quota"], headers=BEARER):
            pass
    how = {"json": body} if route.body is not None else {"params": QUERIES.get(route.name, {})}
    async with session.request(route.method, route.path, headers=headers, **how) as answer:
        if answer.status >= 400:
            problem = msgspec.json.decode(await answer.read(), type=Problem)
            assert problem.code in BY_CODE
            assert problem.remedy
        return answer.status, answer.headers.get("WWW-Authenticate", "")


# -- access ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", TABLE, ids=lambda route: f"{route.method} {route.path}")
async def test_near_everybody_reads_and_only_the_token_acts(near: aiohttp.ClientSession, desk: Desk, route: Route):
    for headers in WRONG:
        status, challenge = await asked(near, route, headers)
        assert status == (401 if route.access is Access.ACT else 200)
        assert challenge == ('Bearer realm="kvstore"' if route.access is Access.ACT else "")
    assert desk.done == []
    status, _ = await asked(near, route, BASIC)
    assert status == (401 if route.access is Access.ACT else 200), "a browser adds Basic by itself: it must not act"
    assert (await asked(near, route, BEARER))[0] == 200


@pytest.mark.parametrize("route", TABLE, ids=lambda route: f"{route.method} {route.path}")
async def test_far_only_probes_answer_without_the_token(far: aiohttp.ClientSession, desk: Desk, route: Route):
    for headers in WRONG:
        status, challenge = await asked(far, route, headers)
        assert status == (200 if route.access is Access.OPEN else 401)
        if route.access is Access.READ:
            assert challenge.startswith("Basic"), "so that a browser asks its user"
    assert desk.done == []
    assert (await asked(far, route, BASIC))[0] == (401 if route.access is Access.ACT else 200)
    assert (await asked(far, route, BEARER))[0] == 200


@pytest.mark.parametrize("route", [r for r in TABLE if r.access is Access.ACT], ids=lambda r: f"{r.method} {r.path}")
async def test_without_a_token_nobody_acts(desk: Desk, route: Route):
    server = await serve(desk, token="")
    async with aiohttp.ClientSession(server.url) as session:
        for headers in (*WRONG, BEARER):
            assert (await asked(session, route, headers))[0] == 403
    await server.close()
    assert desk.done == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_beyond_loopback_it_does_not_listen_without_a_token(desk: Desk, host: str):
    with pytest.raises(ConfigError, match="no token"):
        await serve(desk, host, token="")


async def test_far_any_name_will_do_since_the_token_decides(far: aiohttp.ClientSession):
    async with far.get("/v1/stats", headers=BEARER | {"Host": "kvstore.fleet.example:7070"}) as answer:
        assert answer.status == 200


# -- the description ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_the_description_names_every_route_and_resolves(wide: bool):
    text = describe(wide)
    assert text["openapi"] == "3.1.0"
    assert {(route.method.lower(), route.path) for route in TABLE} == {
        (method, path) for path, each in text["paths"].items() for method in each
    }
    operations = [each for path in text["paths"].values() for each in path.values()]
    names = [each["operationId"] for each in operations]
    assert len(names) == len(set(names))
    schemas = text["components"]["schemas"]
    for reference in _references(text):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    validator = pytest.importorskip("openapi_spec_validator", reason="pip install -e .[deploy]")
    validator.validate(text)


def _references(node: Any):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for each in node.values():
            yield from _references(each)
    elif isinstance(node, list):
        for each in node:
            yield from _references(each)


async def test_the_description_is_served(near: aiohttp.ClientSession, far: aiohttp.ClientSession):
    assert await (await near.get("/v1/openapi.json")).json() == json.loads(json.dumps(describe()))
    theirs = await (await far.get("/v1/openapi.json", headers=BEARER)).json()
    assert theirs["paths"]["/v1/stats"]["get"]["security"] == [{"bearer": []}, {"basic": []}]


# -- questions and actions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "how", "status"),
    [
        ("GET", "/v1/explain", {"params": {"namespace": "x"}}, 400),
        ("GET", "/v1/explain", {"params": {"namespace": "00" * 32, "surplus": "1"}}, 400),
        ("GET", "/v1/explain", {"params": [("namespace", "00" * 32), ("namespace", "11" * 32)]}, 400),
        ("POST", "/v1/explain", {"json": {"namespace": "00" * 32}}, 409),
        ("POST", "/v1/explain", {"json": {"namespace": "00" * 32, "keys": ["0"]}}, 400),
        ("POST", "/v1/explain", {"json": {"namespace": "00" * 32, "tokens": [1 << 31]}}, 400),
        ("POST", "/v1/explain", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 400),
        ("PUT", "/v1/policy", {"json": {"tier": "attic", "policy": "lru"}}, 409),
        ("PUT", "/v1/policy", {"json": {"tier": "host"}}, 400),
        ("POST", "/v1/drop", {"json": {"namespace": "00" * 31}}, 400),
        ("PUT", "/v1/drain", {"json": {"draining": "yes"}}, 400),
        ("PUT", "/v1/drain", {"data": b"\xff\xfe", "headers": {"Content-Type": "application/json"}}, 400),
        ("DELETE", "/v1/quotas", {"params": {"name": "nobody"}}, 409),
        ("DELETE", "/v1/policy", {}, 405),
        ("POST", "/v1/leases", {}, 405),
    ],
)
async def test_wrong_questions_are_typed(
    near: aiohttp.ClientSession, method: str, path: str, how: dict[str, Any], status: int
):
    how["headers"] = BEARER | how.get("headers", {})
    async with near.request(method, path, **how) as answer:
        assert answer.status == status
        assert msgspec.json.decode(await answer.read(), type=Problem).code in BY_CODE


async def test_actions_reach_the_desk(near: aiohttp.ClientSession, desk: Desk):
    async with near.put("/v1/policy", json={"tier": "host", "policy": "lru"}, headers=BEARER) as answer:
        assert (await answer.json())["policies"] == {"host": "lhd"}
    async with near.post("/v1/drop", json={"namespace": NS.hex(), "domain": "uid-5"}, headers=BEARER) as answer:
        assert await answer.json() == {"blocks": 7}
    async with near.put("/v1/drain", json={"draining": True}, headers=BEARER) as answer:
        assert await answer.json() == {"draining": True, "waiting_blocks": 2}
    assert desk.done == [("host", "lru"), (NS, "uid-5"), True]
    assert (await (await near.get("/v1/leases")).json())["leases"][0]["client"] == "engine"


async def test_a_real_daemon_over_http(make_daemon: MakeDaemon):
    port = free_port()
    daemon = make_daemon(
        {"http.address": f"127.0.0.1:{port}", "listen.token": TOKEN, "host.bytes": "32MiB", "disk.bytes": "0"}
    ).start()
    keys = prefix_keys(NAMESPACE, range(256 * 4))
    with KVStoreClient(daemon.socket, namespace=NAMESPACE) as client:
        store(client, keys[:3])
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            body = {"namespace": NS.hex(), "tokens": list(range(256 * 4))}
            seen = await (await session.post("/v1/explain", json=body)).json()
            assert seen["usable"] == 3
            assert [block["key"] for block in seen["blocks"]] == [key.hex() for key in keys]
            assert [block["reason"] for block in seen["blocks"]] == ["", "", "", "never_stored"]
            stats = await (await session.get("/v1/stats")).json()
            assert stats["policies"] == {"host": "lhd"}
            assert sum(below for _, below in stats["requests"]["reserve"]["buckets"][-1:]) == 1
            metrics = await (await session.get("/metrics")).text()
            assert 'kvstore_request_seconds_bucket{le="+Inf",verb="reserve"} 1.0' in metrics
            async with session.put("/v1/drain", json={"draining": True}, headers=BEARER) as answer:
                assert answer.status == 200
            async with session.get("/readyz") as answer:
                assert answer.status == 503
                assert (await answer.json())["code"] == "KV403"
            assert client.get(keys[0]), "what is there can still be read"
            async with session.put("/v1/drain", json={"draining": False}, headers=BEARER) as answer:
                assert answer.status == 200
            assert (await session.get("/readyz")).status == 200
            async with session.post("/v1/drop", json={"namespace": NS.hex()}, headers=BEARER) as answer:
                assert await answer.json() == {"blocks": 3}
        await asyncio.sleep(0)
        assert not client.get(keys[0])
