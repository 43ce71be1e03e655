"""The first section of the dashboard: what is saved, what is served from where, and what flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvstore.http import charts, flow
from kvstore.http.numbers import NOTHING, bytes_per_second, compact, per_second, percent, whole
from kvstore.http.view import RECENT_S, View, degraded, many, shown_text
from kvstore.obs import Snapshot, count, number, numbers, part
from kvstore.obs.history import History, Span
from kvstore.units import format_duration, format_size

EVENTS = {
    "hits": "hits",
    "misses": "misses",
    "stored": "stored",
    "exists": "already there",
    "evicted": "evicted",
    "corrupt": "damaged",
}
"""What is counted of blocks in a tier, and the words for it."""


def head(view: View, snapshot: Snapshot, ready: tuple[bool, str]) -> None:
    """State and identity of the daemon."""
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
    view.text["version"] = shown_text(snapshot.get("version", ""))
    uptime = number(snapshot, "uptime_s")
    view.text["uptime"] = NOTHING if uptime is None else format_duration(int(uptime))
    view.text["pid"] = shown_text(snapshot.get("pid", NOTHING))
    view.text["boot"] = view.boot[:12] or NOTHING
    view.shown["empty"] = count(snapshot, "asked_blocks") == 0 and count(snapshot, "reuse", "wanted") == 0


def tiles(view: View, snapshot: Snapshot, history: History, tiers: list[str]) -> None:
    """The large numbers."""
    minute, recent = history.last(60), history.last(RECENT_S)
    _saved(view, snapshot, recent)
    _hit_rate(view, snapshot, minute, tiers)
    text = view.text
    hits = sum(numbers(snapshot, "hit_blocks").values())
    wanted = number(snapshot, "reuse", "wanted")
    total = count(snapshot, "asked_blocks") if wanted is None else wanted
    text["served"] = compact(hits)
    text["served_note"] = f"{percent(hits, total)} of {compact(total)} wanted" if total > 0 else "none wanted yet"
    queued = count(snapshot, "queue", "blocks")
    text["queue"] = format_size(count(snapshot, "queue", "bytes")) if queued else "empty"
    text["queue_note"] = f"{many(queued, 'block')} on the way to lower tiers" if queued else "nothing waits"
    text["sessions"] = whole(count(snapshot, "sessions"))
    text["sessions_note"] = f"{many(count(snapshot, 'leases'), 'lease')}, " + many(
        count(snapshot, "reservations"), "reservation"
    )


def _saved(view: View, snapshot: Snapshot, recent: Span) -> None:
    """Tokens that nobody had to compute, and about how long that would have taken."""
    text = view.text
    tokens = number(snapshot, "saved", "tokens")
    tokens = count(snapshot, "hit_tokens") if tokens is None else tokens
    seconds, timed = count(snapshot, "saved", "seconds"), count(snapshot, "saved", "tokens_timed")
    text["tokens"] = compact(tokens)
    text["tokens_note"] = f"{per_second(recent.rate('tokens'))} now"
    text["seconds"] = f"about {format_duration(seconds)}" if timed > 0 and seconds > 0 else NOTHING
    if timed > 0 and seconds > 0:
        text["seconds_note"] = f"of computing, at the fastest seen: {per_second(timed / seconds)}"
    else:
        text["seconds_note"] = "not known before an engine has computed something here"
    lease = part(snapshot, "requests", "lease")
    times = count(lease, "count")
    text["first_token"], text["first_token_note"] = NOTHING, "not known before something was served and computed"
    if times > 0 and timed > 0 and seconds > 0 and tokens > 0:
        each = tokens / times
        wait = count(lease, "seconds") / times
        sooner = each * seconds / timed - wait
        text["first_token"] = f"about {format_duration(sooner)} sooner" if sooner > 0 else "no sooner"
        text["first_token_note"] = f"a hit of {compact(each)} tokens, leased in {format_duration(wait)}"


def _hit_rate(view: View, snapshot: Snapshot, minute: Span, tiers: list[str]) -> None:
    """The last minute's hit rate beside its ceiling, as numbers and as one bar."""
    text = view.text
    wanted = minute.grown.get("wanted", 0.0)
    text["hit_rate"] = percent(minute.total("hit."), wanted)
    text["hit_rate_note"] = (
        f"of {compact(wanted)} blocks: "
        + ", ".join(f"{t} {percent(minute.grown.get(f'hit.{t}', 0), wanted)}" for t in tiers)
        if wanted > 0
        else "nothing wanted in the last minute"
    )
    ceiling = min(wanted, max(minute.grown.get("reusable", 0.0), minute.total("hit.")))
    text["ceiling"] = percent(ceiling, wanted)
    share = number(snapshot, "reuse", "sampled_share")
    text["ceiling_note"] = (
        "what a store without bounds would have served"
        if share is None or share >= 1
        else f"of a store without bounds; estimated from 1 in {round(1 / max(share, 1e-9)):,} blocks"
    )
    at = 0.0
    for tier in tiers:
        width = min(100.0 - at, 100 * minute.grown.get(f"hit.{tier}", 0.0) / wanted) if wanted > 0 else 0.0
        view.paths[f"gauge_{tier}"] = charts.box(at, 0, width, 10)
        at += width
    mark = 100 * ceiling / wanted if wanted > 0 else -1.0
    view.paths["gauge_ceiling"] = charts.box(min(99.4, mark), -2, 0.6, 14) if mark >= 0 else ""


def pictures(view: View, snapshot: Snapshot, history: History, tiers: list[str]) -> None:
    """The charts, the flow between tiers, and what other sizes would serve."""
    spans = charts.bars_of(history)
    drawn = {"hits": charts.hit_chart(history, spans, tiers), "traffic": charts.traffic_chart(spans)}
    for name, chart in drawn.items():
        view.readouts[name] = chart.readouts
        view.paths |= {f"{name}_{each}": path for each, path in chart.paths.items()}
        view.text |= {f"{name}_{each}": label for each, label in chart.labels.items()}
        view.text[f"{name}_readout"] = chart.readouts[-1]
    view.rows["minutes"] = charts.by_minute(history, tiers)
    flow.draw(view, snapshot, history.last(RECENT_S), tiers)
    charts.what_if(view, snapshot, tiers)


def tier(view: View, name: str, state: Mapping[str, Any], recent: Span) -> None:
    """What one tier holds."""
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
    view.text[f"{name}_used_word"] = "taken from the machine" if slabbed else "used"
    view.text[f"{name}_free_word"] = "room for blocks" if slabbed else "free"
    for each, value in parts.items():
        key = f"{name}_{each}"
        view.shown[f"{key}_row"] = value is not None
        view.text[key] = NOTHING if value is None else format_size(value)
        view.text[f"{key}_share"] = percent(value or 0, capacity)
        view.bars[f"{key}_bar"] = round(min(100.0, 100 * (value or 0) / capacity), 2) if capacity > 0 else 0.0
    view.text[f"{name}_about"] = " · ".join(_about(state))
    view.text[f"{name}_rates"] = (
        f"{bytes_per_second(recent.rate(f'read.{name}'))} read, "
        f"{bytes_per_second(recent.rate(f'written.{name}'))} written"
    )
    view.rows[f"{name}_events"] = [[whole(count(state, event)) for event in EVENTS]]


def _about(state: Mapping[str, Any]) -> Iterator[str]:
    """Facts of a tier that change rarely."""
    if number(state, "capacity") is not None:
        yield f"budget {format_size(count(state, 'capacity'))}"
    if number(state, "blocks") is not None:
        yield many(count(state, "blocks"), "block")
    if number(state, "slabs") is not None:
        yield many(count(state, "slabs"), "slab")
    if "huge_pages" in state:
        huge = state["huge_pages"]
        ordinary = "huge pages" if huge else "ordinary pages"
        yield ordinary if isinstance(huge, (bool, int)) else f"pages: {shown_text(huge)}"
    if "direct_io" in state:
        reason = state.get("direct_io_reason")
        because = f" ({shown_text(reason)})" if reason else ""
        yield "O_DIRECT" if state["direct_io"] else f"through the page cache{because}"
    if state.get("path"):
        yield shown_text(state["path"])
