"""What the dashboard shows, as text: the one place where numbers become words.

The server fills the page with a view, and the stream sends a fresh one each second, so the page looks the same with and
without JavaScript and nothing is formatted in two languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kvstore.http import charts
from kvstore.http.numbers import NOTHING, bytes_per_second, compact, per_second, percent, whole
from kvstore.http.words import DROPS, MISSES, UNKNOWN_REASON, error_words
from kvstore.obs import Snapshot, count, namespaces, number, numbers, part
from kvstore.obs.history import History, Span
from kvstore.sightings import HeldLease
from kvstore.units import format_duration, format_size

MAX_ROWS = 100
"""Rows of a table; the largest namespaces are shown, the rest is counted."""
TIER_ORDER = ("gpu", "host", "disk", "redis")
EVENTS = {
    "hits": "hits",
    "misses": "misses",
    "stored": "stored",
    "exists": "already there",
    "evicted": "evicted",
    "corrupt": "damaged",
}
"""What is counted of blocks in a tier, and the words for it."""
RECENT_S = 10.0
"""Window of the rates that are shown as 'now'."""


class View(msgspec.Struct):
    """Everything on the page that changes, by the id of the element.

    Attributes
    ----------
    boot : str
        Changes when the daemon was restarted; the page then loads itself anew.
    text, mood : dict
        Text of an element; and whether it is ``good``, ``warn``, ``bad`` or plain.
    bars, paths : dict
        Width of a bar in percent; path data of a curve.
    rows : dict
        Cells of a table.
    shown : dict
        Whether an element is shown.
    readouts : dict
        A line for each bar of a chart.
    """

    boot: str = ""
    text: dict[str, str] = msgspec.field(default_factory=dict)
    mood: dict[str, str] = msgspec.field(default_factory=dict)
    bars: dict[str, float] = msgspec.field(default_factory=dict)
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    rows: dict[str, list[list[str]]] = msgspec.field(default_factory=dict)
    shown: dict[str, bool] = msgspec.field(default_factory=dict)
    readouts: dict[str, list[str]] = msgspec.field(default_factory=dict)


def build(snapshot: Snapshot, history: History, ready: tuple[bool, str], leases: Sequence[HeldLease] = ()) -> View:
    """The view of a snapshot and what went before it."""
    view = View(boot=_text(snapshot.get("boot", "")))
    tiers = tier_names(snapshot)
    _head(view, snapshot, ready)
    _tiles(view, snapshot, history, tiers)
    _charts(view, history, tiers)
    for tier in tiers:
        _tier(view, tier, part(snapshot, "tiers", tier), history.last(RECENT_S))
    _namespaces(view, snapshot)
    _verbs(view, snapshot)
    _trouble(view, snapshot, tiers)
    return view


def rates(history: History, seconds: float = RECENT_S) -> dict[str, Any]:
    """Growth a second of the counters in the history over its newest seconds."""
    span = history.last(seconds)
    return {"window_s": span.seconds, **{name: span.rate(name) for name in span.grown}}


def degraded(snapshot: Snapshot) -> list[str]:
    """Tiers that are asked to rest: the daemon serves without them."""
    states = {tier: part(state, "breaker").get("state", "closed") for tier, state in part(snapshot, "tiers").items()}
    return [tier for tier, state in states.items() if state != "closed"]


def tier_names(snapshot: Snapshot) -> list[str]:
    """Tiers of a snapshot, nearest first."""
    found = dict.fromkeys([*part(snapshot, "tiers"), *part(snapshot, "hit_blocks")])
    return sorted(map(str, found), key=lambda tier: (TIER_ORDER.index(tier) if tier in TIER_ORDER else 9, tier))[:8]


# -- Now ---------------------------------------------------------------------------------------------------------------


def _head(view: View, snapshot: Snapshot, ready: tuple[bool, str]) -> None:
    is_ready, reason = ready
    weak = degraded(snapshot)
    if snapshot.get("draining"):
        state, mood = "draining", "warn"
    elif not is_ready:
        state, mood = f"not ready: {reason}", "bad"
    elif weak:
        state, mood = f"degraded: {', '.join(weak)}", "warn"
    else:
        state, mood = "ready", "good"
    view.text["state"], view.mood["state"] = state, mood
    view.text["version"] = _text(snapshot.get("version", ""))
    uptime = number(snapshot, "uptime_s")
    view.text["uptime"] = NOTHING if uptime is None else format_duration(int(uptime))
    view.text["pid"] = _text(snapshot.get("pid", NOTHING))
    view.text["boot"] = view.boot[:12] or NOTHING
    view.shown["empty"] = count(snapshot, "asked_blocks") == 0


def _tiles(view: View, snapshot: Snapshot, history: History, tiers: list[str]) -> None:
    minute, recent = history.last(60), history.last(RECENT_S)
    asked = minute.grown.get("asked", 0.0)
    text = view.text
    text["hit_rate"] = percent(minute.total("hit."), asked)
    text["hit_rate_note"] = (
        f"of {compact(asked)} blocks: "
        + ", ".join(f"{t} {percent(minute.grown.get(f'hit.{t}', 0), asked)}" for t in tiers)
        if asked > 0
        else "nothing asked in the last minute"
    )
    view.shown["tokens_card"] = number(snapshot, "hit_tokens") is not None
    text["tokens"] = compact(count(snapshot, "hit_tokens"))
    text["tokens_note"] = f"{per_second(recent.rate('tokens'))} now"
    hits = sum(numbers(snapshot, "hit_blocks").values())
    total = count(snapshot, "asked_blocks")
    text["blocks"] = compact(hits)
    text["blocks_note"] = f"{percent(hits, total)} of {compact(total)} asked" if total > 0 else "none asked"
    host = part(snapshot, "tiers", "host")
    text["out"] = bytes_per_second(recent.rate("read.host"))
    text["out_note"] = f"{format_size(count(host, 'bytes_read'))} in all"
    text["in"] = bytes_per_second(recent.rate("written.host"))
    text["in_note"] = f"{format_size(count(host, 'bytes_written'))} in all"
    queued = count(snapshot, "queue", "blocks")
    text["queue"] = format_size(count(snapshot, "queue", "bytes")) if queued else "empty"
    text["queue_note"] = f"{whole(queued)} blocks on their way to disk" if queued else "nothing waits"
    text["sessions"] = whole(count(snapshot, "sessions"))
    text["sessions_note"] = f"{_many(count(snapshot, 'leases'), 'lease')}, " + _many(
        count(snapshot, "reservations"), "reservation"
    )


def _charts(view: View, history: History, tiers: list[str]) -> None:
    drawn = {"hits": charts.hit_chart(history, tiers), "traffic": charts.traffic_chart(history)}
    for name, chart in drawn.items():
        view.readouts[name] = chart.readouts
        view.paths |= {f"{name}_{each}": path for each, path in chart.paths.items()}
        view.text |= {f"{name}_{each}": label for each, label in chart.labels.items()}
        view.text[f"{name}_readout"] = chart.readouts[-1]
    view.rows["minutes"] = charts.by_minute(history, tiers)


def _tier(view: View, tier: str, state: Mapping[str, Any], recent: Span) -> None:
    capacity, used = count(state, "capacity"), count(state, "used")
    sized = number(state, "capacity") is not None
    free = number(state, "free")
    parts = {
        "used": used,
        "leased": number(state, "leased_bytes"),
        "dirty": number(state, "dirty_bytes"),
        "pinned": number(state, "pinned_bytes"),
        "writing": number(state, "writing_bytes"),
        "quarantined": number(state, "quarantined_bytes") or None,
        "dropping": number(state, "dropping_bytes"),
        "free": max(0.0, capacity - used) if free is None and sized else free,
    }
    # Memory is taken from the machine in slabs, before blocks fill it: what is taken and what is free overlap there.
    slabbed = "slabs" in state
    view.text[f"{tier}_used_word"] = "taken from the machine" if slabbed else "used"
    view.text[f"{tier}_free_word"] = "room for blocks" if slabbed else "free"
    for name, value in parts.items():
        key = f"{tier}_{name}"
        view.shown[f"{key}_row"] = value is not None
        view.text[key] = NOTHING if value is None else format_size(value)
        view.text[f"{key}_share"] = percent(value or 0, capacity)
        view.bars[f"{key}_bar"] = round(min(100.0, 100 * (value or 0) / capacity), 2) if capacity > 0 else 0.0
    view.text[f"{tier}_about"] = " · ".join(_about(state))
    view.text[f"{tier}_rates"] = (
        f"{bytes_per_second(recent.rate(f'read.{tier}'))} read, "
        f"{bytes_per_second(recent.rate(f'written.{tier}'))} written"
    )
    view.rows[f"{tier}_events"] = [[whole(count(state, name)) for name in EVENTS]]


def _about(state: Mapping[str, Any]) -> Iterator[str]:
    """Facts of a tier that change rarely."""
    if number(state, "capacity") is not None:
        yield f"budget {format_size(count(state, 'capacity'))}"
    if number(state, "blocks") is not None:
        yield _many(count(state, "blocks"), "block")
    if number(state, "slabs") is not None:
        yield _many(count(state, "slabs"), "slab")
    if "huge_pages" in state:
        huge = state["huge_pages"]
        yield ("huge pages" if huge else "ordinary pages") if isinstance(huge, (bool, int)) else f"pages: {_text(huge)}"
    if "direct_io" in state:
        reason = state.get("direct_io_reason")
        yield "O_DIRECT" if state["direct_io"] else "through the page cache" + (f" ({_text(reason)})" if reason else "")
    if state.get("path"):
        yield _text(state["path"])


# -- tables ------------------------------------------------------------------------------------------------------------


def _namespaces(view: View, snapshot: Snapshot) -> None:
    spaces = sorted(namespaces(snapshot), key=lambda each: -sum(numbers(each, "bytes").values()))
    view.rows["namespaces"] = [_namespace(each) for each in spaces[:MAX_ROWS]]
    hidden = len(spaces) - MAX_ROWS
    view.shown["more_namespaces"] = hidden > 0
    view.text["more_namespaces"] = f"and {whole(max(0, hidden))} smaller ones; /v1/stats has them all"


def _namespace(each: Mapping[str, Any]) -> list[str]:
    blocks, sizes, hits = (numbers(each, name) for name in ("blocks", "bytes", "hit"))
    asked = count(each, "asked")
    kept = [f"{tier} {whole(blocks.get(tier, 0))} ({format_size(sizes.get(tier, 0))})" for tier in blocks | sizes]
    ranks = count(each, "tp_size")
    facts = [_text(each["dtype"])] if each.get("dtype") else []
    facts += [f"rank {count(each, 'tp_rank'):.0f} of {ranks:.0f}"] if ranks > 1 else []
    facts += [f"LoRA {_text(each['lora'])}"] if each.get("lora") else []
    return [
        _text(each.get("model") or "unnamed"),
        ", ".join(facts) or NOTHING,
        _text(each.get("digest", ""))[:12] or NOTHING,
        _text(each.get("domain") or NOTHING),
        ", ".join(kept) or NOTHING,
        whole(count(each, "stored")),
        whole(asked),
        percent(sum(hits.values()), asked),
    ]


def _verbs(view: View, snapshot: Snapshot) -> None:
    rows = []
    for verb, state in part(snapshot, "requests").items():
        times = count(state, "count")
        mean = format_duration(count(state, "seconds") / times) if times > 0 else NOTHING
        rows.append([str(verb), whole(times), whole(count(state, "errors")), mean])
    view.rows["verbs"] = rows


def _trouble(view: View, snapshot: Snapshot, tiers: list[str]) -> None:
    states = {tier: part(snapshot, "tiers", tier) for tier in tiers}
    # A block that was there already is no trouble, though it was not stored either.
    offered = {reason: times for reason, times in numbers(snapshot, "not_stored").items() if reason != "exists"}
    dropped = {"request": offered} | {tier: numbers(state, "dropped") for tier, state in states.items()}
    view.rows["errors"] = [
        [code, name, whole(times), remedy.replace("`", "")]
        for code, times in sorted(numbers(snapshot, "errors").items())
        if times > 0
        for name, remedy in [error_words(code)]
    ]
    view.rows["drops"] = [
        [tier, reason.replace("_", " "), whole(times), DROPS.get(reason, UNKNOWN_REASON)]
        for tier, reasons in dropped.items()
        for reason, times in reasons.items()
        if times > 0
    ]
    view.rows["missed"] = [
        [reason.replace("_", " "), whole(times), MISSES.get(reason, UNKNOWN_REASON)]
        for reason, times in numbers(snapshot, "missed").items()
        if times > 0
    ]
    view.rows["breakers"] = [
        _breaker(tier, part(state, "breaker"), count(state, "corrupt"))
        for tier, state in states.items()
        if "breaker" in state or "corrupt" in state
    ]


def _breaker(tier: str, breaker: Mapping[str, Any], corrupt: float) -> list[str]:
    since = number(breaker, "since_s")
    return [
        tier,
        _text(breaker.get("state", NOTHING)),
        NOTHING if since is None else format_duration(since),
        whole(count(breaker, "failures")) if breaker else NOTHING,
        whole(corrupt),
        _text(breaker.get("reason") or NOTHING),
    ]


def _many(value: float, word: str) -> str:
    return f"{whole(value)} {word}{'' if value == 1 else 's'}"


def _text(value: Any) -> str:
    return (value.hex() if isinstance(value, bytes) else str(value))[:200]
