"""The dashboard as a browser without JavaScript sees it, and the words and numbers on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from kvstore.errors import BY_CODE
from kvstore.http import start_http
from kvstore.http.numbers import NOTHING, compact, per_second, percent
from kvstore.http.words import DROPS, MISSES
from kvstore.types import DropReason, MissReason

VLLM_CONFIG = '{"kv_connector":"KVStoreConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'

BUSY = {
    "asked_blocks": 100,
    "hit_blocks": {"host": 40, "disk": 10},
    "missed": {"absent": 50},
    "hit_tokens": 1000,
    "errors": {"KV401": 2, "KV999": 1},
    "requests": {
        "lookup": {"count": 4, "errors": 1, "seconds": 0.002},
        "stats": {"count": 0, "errors": 0, "seconds": 0},
    },
    "namespaces": [{"digest": "c0ffee" * 10, "model": "<script>alert('x')</script>", "asked": 10, "hit": {"host": 5}}],
    "tiers": {
        "host": {"capacity": 4096, "used": 1024, "leased_bytes": 512, "dropped": {"host_full": 3}},
        "disk": {
            "capacity": 8192,
            "used": 0,
            "path": "/d&d",
            "breaker": {"state": "open", "reason": "EIO", "since_s": 5},
        },
    },
}


class FakeSource:
    """A daemon that says what it is told to."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"tiers": {"host": {"capacity": 100, "used": 25}}}

    def snapshot(self) -> dict[str, Any]:
        return dict(self.state)

    def readiness(self) -> tuple[bool, str]:
        return True, "ready"

    def liveness(self) -> bool:
        return True

    def settings(self) -> list[tuple[str, str, str]]:
        return [("listen.token", "********", "KVSTORE_TOKEN")]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest_asyncio.fixture
async def client(source: FakeSource) -> AsyncIterator[aiohttp.ClientSession]:
    running = await start_http(source, "127.0.0.1", 0)
    async with aiohttp.ClientSession(running.url) as session:
        yield session
    await running.close()


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Text by element id, the cells of each table, and everything that the page loads or runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: dict[str, str] = {}
        self.hidden: set[str] = set()
        self.cells: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.inline: list[str] = []
        self.tags: list[str] = []
        self._id = self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self._id = named.get("id") or ""
        if "hidden" in named:
            self.hidden.add(self._id)
        if tag == "table":
            self._table = self._id
        if tag == "td":
            self.cells.setdefault(self._table, []).append("")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and tag != "a"]
        self.inline += [name for name, _ in attrs if name == "style" or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._id = ""
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self._id:
            self.ids[self._id] = self.ids.get(self._id, "") + data
        if self.tags and self.tags[-1] == "td":
            self.cells[self._table][-1] += data


async def page(client: aiohttp.ClientSession) -> tuple[str, Page]:
    text = await (await client.get("/")).text()
    return text, Page(text)


async def test_the_page_loads_only_its_own_files_and_has_nothing_inline(client: aiohttp.ClientSession):
    text, parsed = await page(client)
    assert [each for each in parsed.loads if not each.startswith("data:")] == [
        "/dashboard/style.css",
        "/dashboard/app.js",
    ]
    assert parsed.inline == []
    assert "<style" not in text
    assert "{{" not in text


async def test_scripts_never_turn_data_into_markup(client: aiohttp.ClientSession):
    script = await (await client.get("/dashboard/app.js")).text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "http://",
        "https://",
    ):
        assert word not in script


async def test_an_idle_daemon_is_shown_honestly(client: aiohttp.ClientSession):
    text, parsed = await page(client)
    assert f"--kv-transfer-config '{VLLM_CONFIG}'" in text
    assert "empty" not in parsed.hidden
    assert parsed.ids["hit_rate"] == NOTHING
    assert "NaN" not in text
    assert parsed.cells["errors"] == ["No error was sent to any client."]


async def test_a_busy_daemon_is_shown_without_javascript(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= BUSY
    _, parsed = await page(client)
    assert "empty" in parsed.hidden
    assert parsed.ids["blocks_note"] == "50 % of 100 asked"
    assert parsed.ids["state"] == "degraded: disk"
    assert parsed.ids["host_used"] == "1 KiB"
    assert parsed.ids["host_used_share"] == "25 %"
    assert "LeaseExpired" in parsed.cells["errors"]
    assert DROPS["host_full"] in parsed.cells["drops"]
    assert MISSES["absent"] in parsed.cells["missed"]
    assert parsed.cells["verbs"] == ["lookup", "4", "1", "500 µs", "stats", "0", "0", NOTHING]
    assert "EIO" in parsed.cells["breakers"]
    assert parsed.cells["config"][:3] == ["listen.token", "********", "KVSTORE_TOKEN"]


async def test_names_from_clients_stay_text(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= BUSY
    text, parsed = await page(client)
    assert "<script>alert" not in text
    assert parsed.tags.count("script") == 1
    assert "<script>alert('x')</script>" in parsed.cells["namespaces"]


async def test_many_namespaces_are_cut_and_counted(client: aiohttp.ClientSession, source: FakeSource):
    source.state["namespaces"] = [{"digest": f"{i:064x}", "bytes": {"host": i}} for i in range(1000)]
    _, parsed = await page(client)
    assert len(parsed.cells["namespaces"]) == 100 * 8
    assert parsed.ids["more_namespaces"].startswith("and 900 smaller")


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"tiers": None, "requests": [], "namespaces": {}},
        {"tiers": {"host": {"capacity": 0, "used": 0, "breaker": None}}, "hit_blocks": {"redis": 1}},
        {"tiers": {"<b>": {"capacity": -1, "used": "x"}}, "boot": b"\x00", "asked_blocks": float("nan")},
    ],
)
async def test_the_page_tolerates_missing_and_odd_fields(
    client: aiohttp.ClientSession, source: FakeSource, state: dict[str, Any]
):
    source.state = state
    async with client.get("/") as answer:
        assert answer.status == 200
        assert "<b>" not in await answer.text()


# -- words and numbers -------------------------------------------------------------------------------------------------


def test_every_reason_has_a_sentence():
    assert set(DROPS) == set(DropReason)
    assert set(MISSES) == set(MissReason)
    assert all(each.default_remedy for each in BY_CODE.values())


@pytest.mark.parametrize(
    ("part", "of", "text"),
    [
        (0, 0, NOTHING),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 1e6, "<0.1 %"),
        (999_999, 1e6, ">99.9 %"),
        (1, 3, "33.3 %"),
        (9, 5, "100 %"),
    ],
)
def test_percent(part: float, of: float, text: str):
    assert percent(part, of) == text


def test_counts_and_rates():
    assert [compact(v) for v in (0, 9999, 10_000, 999_999, 1.234e6, 5e12)] == [
        "0",
        "9,999",
        "10.0 k",
        "1.00 M",
        "1.23 M",
        "5.00 T",
    ]
    assert [per_second(v) for v in (0, 0.01, 0.5, 12, 12_000)] == ["0/s", "<0.1/s", "0.5/s", "12/s", "12.0 k/s"]
