"""Which daemon has most of a prompt: asked over HTTP, of daemons that know each other through a real Valkey."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from daemons import NAMESPACE, NS, MakeDaemon, free_port, payload, store, until

from kvstore import KVStoreClient
from kvstore.chain import TierChain
from kvstore.client.events import Event
from kvstore.errors import InvalidParams, LimitExceeded
from kvstore.eviction import make_policy
from kvstore.http import start_http
from kvstore.keys import prefix_keys
from kvstore.namespaces import NamespaceRegistry
from kvstore.peers import Peer
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.host import HostTier
from kvstore.types import TierCode
from kvstore.where import MAX_KEYS, Where

KEYS = prefix_keys(NAMESPACE, range(256 * 6))
FIELDS = {"model": NAMESPACE.model, "dtype": NAMESPACE.dtype}


def peer(**tiers: dict[bytes, int]) -> Peer:
    """A daemon that has blocks in some tiers."""
    made = Peer(b"", b"0-0", address="http://there", heard=time.monotonic(), believed=True)
    for tier, blocks in tiers.items():
        made.mirror.apply(Event("held", 0, NS, TierCode[tier.upper()], list(blocks), list(blocks.values())))
    return made


def where(**peers: Peer) -> Where:
    host = HostTier(1 << 20, make_policy("lru"), 1 << 18, 0)
    return Where(TierChain(host, []), NamespaceRegistry(), "uid-7", "me", lambda: list(peers.items()))


async def test_the_longest_prefix_is_first_and_then_who_loads_least() -> None:
    desk = where(
        short=peer(host=dict.fromkeys(KEYS[:2], 10)),
        disk=peer(disk=dict.fromkeys(KEYS[:5], 10)),
        mixed=peer(host=dict.fromkeys(KEYS[:3], 10), disk=dict.fromkeys(KEYS[:5], 10)),
        hole=peer(host=dict.fromkeys([KEYS[0], *KEYS[2:]], 10)),
    )
    scores = await desk.scores(NAMESPACE, KEYS)
    assert [(s.daemon, s.blocks, s.tokens, s.load_bytes) for s in scores] == [
        ("mixed", 5, 1280, 20),
        ("disk", 5, 1280, 50),
        ("short", 2, 512, 0),
        ("hole", 1, 256, 0),
        ("me", 0, 0, 0),
    ]
    assert scores[0].tiers["host"].blocks == 3
    assert scores[0].tiers["disk"].bytes == 20
    by_digest = await desk.scores(NS, KEYS)
    assert [s.tokens for s in by_digest] == [0] * 5, "a digest does not say how long a block is"
    assert all(not s.blocks for s in await desk.scores(b"o" * 32, KEYS))


async def test_what_is_too_much_or_no_key_is_refused() -> None:
    desk = where()
    with pytest.raises(LimitExceeded):
        await desk.scores(NS, [KEYS[0]] * (MAX_KEYS + 1))
    with pytest.raises(InvalidParams):
        await desk.scores(NS, [b"short"])
    with pytest.raises(InvalidParams):
        desk.keys(NS, [1, 2, 3])
    with pytest.raises(LimitExceeded):
        desk.keys(NAMESPACE, range(256 * MAX_KEYS + 1))
    assert desk.keys(NAMESPACE, range(256 * 6)) == KEYS


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Quiet:
    """A daemon with nothing to say but where prefixes are."""

    def snapshot(self) -> dict[str, Any]:
        return {}

    def readiness(self) -> tuple[bool, str]:
        return True, ""

    def liveness(self) -> bool:
        return True

    def settings(self) -> list[tuple[str, str, str]]:
        return []


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    desk = where(other=peer(host=dict.fromkeys(KEYS[:3], 10)))
    server = await start_http(Quiet(), "127.0.0.1", 0, None, desk)
    async with aiohttp.ClientSession(server.url) as session:
        yield session
    await server.close()


async def test_a_question_by_keys_or_tokens(session: aiohttp.ClientSession) -> None:
    listed = ",".join(key.hex() for key in KEYS[:4])
    async with session.get(f"/v1/where?namespace={NS.hex()}&keys={listed}") as answer:
        assert answer.status == 200
        got = await answer.json()
    assert got["blocks"] == 4
    assert [(d["daemon"], d["blocks"], d["own"]) for d in got["daemons"]] == [("other", 3, False), ("me", 0, True)]
    assert got["daemons"][0]["tiers"] == {"host": {"blocks": 3, "bytes": 30}}
    for question in (
        {"namespace": FIELDS, "tokens": list(range(256 * 6 + 5))},
        {"namespace": NS.hex(), "keys": [key.hex() for key in KEYS]},
    ):
        async with session.post("/v1/where", json=question) as answer:
            assert answer.status == 200
            assert (await answer.json())["daemons"][0]["blocks"] == 3


async def test_a_key_that_is_none_is_refused_in_words(session: aiohttp.ClientSession) -> None:
    async with session.get(f"/v1/where?namespace={NS.hex()}&keys=ABC") as answer:
        assert answer.status == 400
        cause = (await answer.json())["cause"]
    assert "keys: must be up to 41 keys of 64 hexadecimal digits" in cause
    assert "regex" not in cause


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("{", 400),
        ('{"namespace":"00"}', 400),
        (json.dumps({"namespace": NS.hex()}), 409),
        (json.dumps({"namespace": NS.hex(), "keys": ["zz"]}), 400),
        (json.dumps({"namespace": NS.hex(), "keys": ["ab"]}), 400),
        (json.dumps({"namespace": NS.hex(), "tokens": [1]}), 409),
        (json.dumps({"namespace": FIELDS, "tokens": [-1]}), 400),
        (json.dumps({"namespace": FIELDS | {"block_tokens": 0}, "tokens": [1]}), 409),
        (json.dumps({"namespace": FIELDS, "tokens": [], "keys": []}), 409),
        (json.dumps({"namespace": FIELDS, "surplus": 1, "keys": []}), 400),
        (json.dumps({"namespace": NS.hex(), "keys": [NS.hex()] * (MAX_KEYS + 1)}), 400),
        (" " * (12 << 20) + "{}", 413),
    ],
)
async def test_wrong_questions_are_typed_errors(session: aiohttp.ClientSession, body: str, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    async with session.post("/v1/where", data=body.encode(), headers=headers) as answer:
        assert answer.status == status
        assert set(await answer.json()) == {"code", "cause", "remedy"}


async def test_a_browser_on_another_site_cannot_ask(session: aiohttp.ClientSession) -> None:
    body = json.dumps({"namespace": NS.hex(), "keys": []}).encode()
    async with session.post("/v1/where", data=body, headers={"Content-Type": "text/plain"}) as answer:
        assert answer.status == 400
    async with session.post("/v1/where", json={}, headers={"Host": "evil.example"}) as answer:
        assert answer.status == 403
    async with session.post("/v1/stats", json={}) as answer:
        assert answer.status == 405
    async with session.get("/v1/where") as answer:
        assert answer.status == 400


async def test_a_body_that_never_comes_is_not_waited_for_forever(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.http.face.BODY_S", 0.1)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(0.5)
        yield b"}"

    headers = {"Content-Type": "application/json", "Content-Length": "2"}
    async with session.post("/v1/where", data=stuck(), headers=headers) as answer:
        assert (await answer.json())["code"] == "KV502"


async def test_two_daemons_and_a_valkey(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with ValkeyServer(tmp_path) as server:
        ports = [free_port(), free_port()]
        shared = {"redis.url": server.url, "redis.bytes": "64MiB"}
        daemons = [
            make_daemon({**shared, "http.address": f"127.0.0.1:{port}", "events.name": f"daemon {port}"})
            for port in ports
        ]
        for daemon in daemons:
            daemon.start()
        with KVStoreClient(daemons[1].socket, namespace=NAMESPACE, timeout_s=20) as client:
            store(client, KEYS[:4])
        question = {"namespace": FIELDS, "tokens": list(range(256 * 6))}
        async with aiohttp.ClientSession(f"http://127.0.0.1:{ports[0]}") as session:

            async def scores() -> list[dict[str, Any]]:
                async with session.post("/v1/where", json=question) as answer:
                    assert answer.status == 200
                    return (await answer.json())["daemons"]

            deadline = time.monotonic() + 20
            while (found := await scores())[0]["tiers"].get("host", {}).get("blocks") != 4:
                assert time.monotonic() < deadline, found
                await asyncio.sleep(0.05)
            until(lambda: daemons[0].stats()["tiers"]["redis"]["blocks"] == 4, "the write to Redis")
            best, own = await scores()
            assert (best["daemon"], best["own"], best["load_bytes"]) == (f"daemon {ports[1]}", False, 0)
            assert best["address"] == f"http://127.0.0.1:{ports[1]}"
            nbytes = 4 * len(payload(KEYS[0]))
            assert (own["own"], own["tiers"]) == (True, {"redis": {"blocks": 4, "bytes": nbytes}})
            assert own["load_bytes"] == nbytes
