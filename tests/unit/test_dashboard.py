"""The dashboard as a browser without JavaScript sees it, and the words and numbers on it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from kvstore.errors import BY_CODE
from kvstore.http import start_http
from kvstore.http.face import pasted
from kvstore.http.numbers import NOTHING, compact, per_second, percent
from kvstore.http.tables import sighting
from kvstore.http.words import DROPS, GONE, MISSES
from kvstore.sightings import NEVER, Sighting
from kvstore.types import DropReason, Gone, MissReason

VLLM_CONFIG = '{"kv_connector":"KVStoreConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'

BUSY = {
    "asked_blocks": 100,
    "hit_blocks": {"host": 40, "disk": 10},
    "missed": {"absent": 50},
    "hit_tokens": 1000,
    "errors": {"KV401": 2, "KV999": 1},
    "requests": {
        "lookup": {"count": 4, "errors": 1, "seconds": 0.002, "buckets": [[250e-6, 3], [1e-3, 4]]},
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
    assert parsed.ids["served_note"] == "50 % of 100 wanted"
    assert parsed.ids["state"] == "degraded: disk"
    assert parsed.ids["host_used"] == "1 KiB"
    assert parsed.ids["host_used_share"] == "25 %"
    assert "LeaseExpired" in parsed.cells["errors"]
    assert DROPS["host_full"] in parsed.cells["drops"]
    assert MISSES["absent"] in parsed.cells["missed"]
    times = ["≤ 250 µs", "≤ 1 ms", "≤ 1 ms"]
    assert parsed.cells["verbs"] == ["lookup", "4", "1", "500 µs", *times, "stats", "0", "0", *[NOTHING] * 4]
    assert "EIO" in parsed.cells["breakers"]
    assert parsed.cells["config"][:3] == ["listen.token", "********", "KVSTORE_TOKEN"]


RUNG = {"chain": "kv4", "planes": 0, "kl": 0.004, "kl_upper": 0.006, "top1": 0.97, "ratio": 3.9, "passed": True}
PROBE = {"share": 0.15, "selector": "auto", "prompts": 8, "kl": 0.05, "top1": 0.97, "most_kl": 0.1, "least_top1": 0.9}


async def test_quality_shows_what_was_measured_and_what_runs(client: aiohttp.ClientSession, source: FakeSource):
    source.state["profiles"] = [
        {
            "name": "small",
            "model": "m",
            "most_kl": 0.012,
            "least_top1": 0.95,
            "rungs": [
                RUNG | {"held_as": "kv4(group=64)"},
                RUNG | {"planes": 2, "kl": 0.03, "kl_upper": 0.04, "passed": False},
                RUNG | {"chain": "fp8", "top1": 0.5, "passed": False},
                RUNG | {"chain": "raw", "ratio": 1.0, "passed": False},
                RUNG | {"chain": "fp8", "ratio": 1.9, "passed": False},
            ],
        }
    ]
    held = {
        "kv4(group=64)": {"blocks": 3, "stored_bytes": 1024, "logical_bytes": 4096},
        "byteplanes|zstd(level=1)": {"blocks": 1, "stored_bytes": 512, "logical_bytes": 1024},
        "gone": {"blocks": 1, "stored_bytes": 0, "logical_bytes": 1024},
    }
    codecs = {"held": held, "since_start": {"kv4": {"blocks": 5}}, "stepped_down": 2, "bytes_freed": 2048, "busy_s": 1}
    source.state["tiers"]["disk"] = {"capacity": 9, "used": 9, "codecs": codecs}
    source.state["blends"] = [
        {"model": "m", "prompts": 4, "tokens": 2000, "computed": 300, "verdict": PROBE},
        {"model": "m", "tp_rank": 1, "tp_size": 2, "verdict": PROBE | {"kl": 0.2}},
        {"model": "n", "prompts": 1, "tokens": 10, "computed": 10},
    ]
    _, parsed = await page(client)
    gates = parsed.cells["gates"]
    assert gates[:7] == ["small: m", "kv4", "3.90 ×", "0.0040", "0.0060", "97 %", "passed"]
    assert gates[8] == "kv4, 2 of its planes"
    assert gates[13] == "refused: KL may be above 0.012"
    assert gates[20] == "refused: the first choice stays in less than 95 %"
    assert gates[27] == "refused: it saves nothing"
    assert gates[34] == "left out: a smaller one costs less"
    assert parsed.cells["codecs"][:7] == ["disk", "kv4(group=64)", "3", "4 KiB", "1 KiB", "4.00 ×", "0.0040"]
    assert parsed.cells["codecs"][13] == "none"
    assert parsed.cells["codecs"][19:21] == [NOTHING, NOTHING]
    assert parsed.cells["ladder"] == ["disk", "5", "0", "2", "2 KiB", "0", "1 s"]
    blends = parsed.cells["blends"]
    assert blends[:6] == ["m", NOTHING, "4", "2,000", "15 %", "85 %"]
    assert blends[6].startswith("passed: KL 0.0500 (at most 0.1), same first choice 97 % (at least 90 %)")
    assert blends[8] == "1 of 2"
    assert blends[13].startswith("failed: KL 0.2000")
    assert blends[20] == "not told by this engine"


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
        {"reuse": {"wanted": 3, "curve": [[0, 1], [8, 0.5]]}, "slow": [{}, 3], "quota_evictions": [], "saved": 1},
        {"reuse": {"wanted": 3, "curve": [[1, 0], [8, 0.5]]}, "slow": [{"at": 1, "seconds": 2}], "quotas": {"host": 3}},
    ],
)
async def test_the_page_tolerates_missing_and_odd_fields(
    client: aiohttp.ClientSession, source: FakeSource, state: dict[str, Any]
):
    source.state = state
    async with client.get("/") as answer:
        assert answer.status == 200
        assert "<b>" not in await answer.text()


REUSE = {
    "asked_blocks": 40,
    "hit_blocks": {"host": 40},
    "hit_tokens": 10_240,
    "reuse": {"wanted": 100, "reusable": 80, "sampled_share": 0.25, "curve": [[1024, 0.1], [2048, 0.4], [4096, 0.8]]},
    "saved": {"tokens": 10_240, "seconds": 4.0, "tokens_timed": 5120},
    "requests": {"lease": {"count": 10, "errors": 0, "seconds": 0.01}},
    "tiers": {"host": {"capacity": 1024, "used": 512}, "disk": {"capacity": 2048, "used": 2048}},
    "slow": [{"at": 0.0, "verb": "lease", "seconds": 1.5, "error": "KV502"}],
    "quotas": {"host": {"": {"bytes": 10}, "team": {"bytes": 20, "limit": 30, "expired": 2}}},
    "quota_evictions": [["host", "team", "", 5]],
}


async def test_what_was_saved_is_said_as_far_as_it_is_known(client: aiohttp.ClientSession, source: FakeSource):
    _, parsed = await page(client)
    assert parsed.ids["seconds"] == parsed.ids["first_token"] == NOTHING
    source.state |= REUSE
    _, parsed = await page(client)
    assert parsed.ids["tokens"] == "10.2 k"
    assert parsed.ids["seconds"] == "about 4 s"
    assert parsed.ids["seconds_note"] == "of computing, at the fastest seen: 1,280/s"
    assert parsed.ids["first_token"] == "about 799 ms sooner", "1,024 tokens a hit at 1,280/s, less 1 ms to lease them"
    assert "1 in 4 blocks" in parsed.ids["ceiling_note"]


async def test_pictures_are_drawn_by_the_server(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= REUSE
    text, parsed = await page(client)
    assert "whatif_card" not in parsed.hidden
    assert parsed.cells["whatif"] == ["1 KiB", "10 %", "4 KiB", "80 %"]
    assert parsed.ids["flow_host_used"] == "50 % of 1 KiB"
    assert parsed.ids["flow_disk_used"] == "100 % of 2 KiB"
    assert parsed.ids["flow_engines_out"] == "idle"
    assert 'id="flow_disk_out_arrow"' in text
    assert parsed.cells["slow"][1:] == ["lease", "1.5 s", "KV502"]
    assert parsed.cells["quotas"][:6] == ["host", "everybody else", "10 B", NOTHING, NOTHING, "0"]
    assert parsed.cells["evictions"] == ["host", "team", "everybody else", "5"]


async def test_what_nothing_reports_yet_says_so(client: aiohttp.ClientSession):
    _, parsed = await page(client)
    assert parsed.cells["fidelity"] == ["Every namespace is exact: what is handed out is, bit by bit, what was stored."]
    assert parsed.cells["chunks"] == ["No engine has stored a chunk."]
    assert parsed.cells["blends"] == ["No engine has reported a blended prompt."]
    assert parsed.cells["gates"][0].startswith("No profile is here")
    assert parsed.cells["leases"] == ["Nobody reads at this moment."]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Sighting("ab" * 32, ["host", "disk"], 1024, True, 3.7, 2, True, True, "live"), "in memory for 3 s, read by 2"),
        (Sighting("ab" * 32, ["disk"], 1024, False), "no, one before it is missing"),
        (Sighting("ab" * 32, ["host", "disk"], 1024, True, chains={"disk": "kv4"}), "host, disk (kv4)"),
        (Sighting("ab" * 32, [], 0, False, reason="never_stored"), "never stored here"),
        (Sighting("ab" * 32, [], 0, False, reason="evicted", left="host", gone_s=61.0), "1 min 1 s ago: It left"),
        (Sighting("ab" * 32, [], 0, False, reason="host_full", gone_s=1.0), "Host memory was full"),
        (Sighting("ab" * 32, [], 0, False, reason="new in another version", gone_s=1.0), "does not know"),
    ],
)
def test_a_block_that_was_looked_up_is_put_into_words(block: Sighting, words: str):
    row = sighting(7, block)
    assert row[0] == "7"
    assert len(row) == 6
    assert words in " ".join(row)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("[1, 2,3]", {"tokens": [1, 2, 3]}),
        ("1 2\n3", {"tokens": [1, 2, 3]}),
        ("AB" * 32, {"keys": ["ab" * 32]}),
        ("hello", {"tokens": ["hello"]}),
        ("-1", {"tokens": ["-1"]}),
    ],
)
def test_what_was_pasted_is_understood(text: str, question: dict[str, Any]):
    assert pasted(text) == question


# -- words and numbers -------------------------------------------------------------------------------------------------


def test_every_reason_has_a_sentence():
    assert set(DROPS) == set(DropReason)
    assert set(MISSES) == set(MissReason)
    assert set(GONE) == {*Gone, NEVER}
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


async def test_no_id_is_used_twice(client: aiohttp.ClientSession, source: FakeSource):
    source.state |= REUSE
    text, _ = await page(client)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), sorted({each for each in ids if ids.count(each) > 1})
