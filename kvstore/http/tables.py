"""The tables of the dashboard: namespaces, quotas, verbs, leases and trouble."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvstore.http.numbers import NOTHING, percent, quantile, whole
from kvstore.http.view import View, shown_text, states_of
from kvstore.http.words import DROPS, GONE, MISSES, UNKNOWN_REASON, error_words
from kvstore.obs import Snapshot, count, namespaces, number, numbers, part
from kvstore.sightings import NEVER, HeldLease, Sighting
from kvstore.units import format_duration, format_size

MAX_ROWS = 100
"""Rows of a table; the largest namespaces are shown, the rest is counted."""


def spaces(view: View, snapshot: Snapshot) -> None:
    """The namespaces, largest first."""
    listed = sorted(namespaces(snapshot), key=lambda each: -sum(numbers(each, "bytes").values()))
    view.rows["namespaces"] = [_space(each) for each in listed[:MAX_ROWS]]
    hidden = len(listed) - MAX_ROWS
    view.shown["more_namespaces"] = hidden > 0
    view.text["more_namespaces"] = f"and {whole(max(0, hidden))} smaller ones; /v1/stats has them all"


def _space(each: Mapping[str, Any]) -> list[str]:
    blocks, sizes, hits = (numbers(each, name) for name in ("blocks", "bytes", "hit"))
    served = sum(hits.values())
    kept = [f"{tier} {whole(blocks.get(tier, 0))} ({format_size(sizes.get(tier, 0))})" for tier in blocks | sizes]
    ranks = count(each, "tp_size")
    facts = [shown_text(each["dtype"])] if each.get("dtype") else []
    facts += [f"rank {count(each, 'tp_rank'):.0f} of {ranks:.0f}"] if ranks > 1 else []
    facts += [f"LoRA {shown_text(each['lora'])}"] if each.get("lora") else []
    facts += [f"tenant {shown_text(each['tenant'])}"] if each.get("tenant") else []
    return [
        shown_text(each.get("model") or "unnamed"),
        ", ".join(facts) or NOTHING,
        shown_text(each.get("digest", ""))[:12] or NOTHING,
        shown_text(each.get("domain") or NOTHING),
        ", ".join(kept) or NOTHING,
        whole(count(each, "stored")),
        whole(served),
        percent(served, served + count(each, "stored")),
    ]


def choices(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Namespaces to choose from: digest and words."""
    return [
        (
            shown_text(each.get("digest", "")),
            f"{shown_text(each.get('model') or 'unnamed')} · {str(each.get('digest'))[:12]}",
        )
        for each in namespaces(snapshot)[:MAX_ROWS]
    ]


def quotas(view: View, snapshot: Snapshot) -> None:
    """What each rule holds in each tier, and who made whom give way."""
    view.rows["quotas"] = [
        [
            tier,
            rule or "everybody else",
            format_size(count(state, "bytes")),
            format_size(count(state, "guarantee")) if count(state, "guarantee") else NOTHING,
            format_size(count(state, "limit")) if count(state, "limit") else NOTHING,
            whole(count(state, "expired")),
        ]
        for tier, rules in part(snapshot, "quotas").items()
        for rule, state in part(rules).items()
    ][:MAX_ROWS]
    view.rows["evictions"] = [
        [shown_text(tier), shown_text(by) or "everybody else", shown_text(of) or "everybody else", whole(blocks)]
        for tier, by, of, blocks in snapshot.get("quota_evictions", ())
    ][:MAX_ROWS]


def verbs(view: View, snapshot: Snapshot) -> None:
    """Requests by verb, with the times that half, nine in ten and 99 in a hundred stay below."""
    rows: list[list[str]] = []
    for verb, state in part(snapshot, "requests").items():
        times = count(state, "count")
        mean = format_duration(count(state, "seconds") / times) if times > 0 else NOTHING
        shares = [_time(quantile(_buckets(state), times, share)) for share in (0.5, 0.9, 0.99)]
        rows.append([str(verb), whole(times), whole(count(state, "errors")), mean, *shares])
    view.rows["verbs"] = rows


def _buckets(state: Any) -> list[tuple[float, float]]:
    listed = part(state).get("buckets")
    pairs = listed if isinstance(listed, (list, tuple)) else ()
    return [(float(pair[0]), float(pair[1])) for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]


def _time(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"≤ {format_duration(seconds)}"


def leases(view: View, held: Sequence[HeldLease]) -> None:
    """Rights to read that are held now."""
    view.rows["leases"] = [
        [
            each.client or "unnamed",
            each.domain,
            each.model or NOTHING,
            each.namespace[:12],
            whole(each.blocks),
            format_size(each.bytes),
            whole(each.pending),
            format_duration(each.expires_s),
        ]
        for each in held[:MAX_ROWS]
    ]


def trouble(view: View, snapshot: Snapshot, tiers: list[str]) -> None:
    """Errors, drops, misses, breakers and slow calls."""
    states = states_of(snapshot, tiers)
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
    view.rows["slow"] = list(_slow(snapshot.get("slow"), time.time()))


def _breaker(tier: str, breaker: Mapping[str, Any], corrupt: float) -> list[str]:
    since = number(breaker, "since_s")
    return [
        tier,
        shown_text(breaker.get("state", NOTHING)),
        NOTHING if since is None else format_duration(since),
        whole(count(breaker, "failures")) if breaker else NOTHING,
        whole(corrupt),
        shown_text(breaker.get("reason") or NOTHING),
    ]


def _slow(calls: Any, now: float) -> Iterable[list[str]]:
    for call in reversed(calls if isinstance(calls, (list, tuple)) else ()):
        at, seconds = number(call, "at"), number(call, "seconds")
        if at is not None and seconds is not None:
            ago = f"{format_duration(max(0, int(now - at)))} ago"
            error = shown_text(part(call).get("error", "")) or NOTHING
            yield [ago, shown_text(part(call).get("verb")), format_duration(seconds), error]


def sighting(index: int, block: Sighting) -> list[str]:
    """One block of a prompt that was looked up."""
    facts = [
        f"in memory for {format_duration(int(block.age_s))}" if block.age_s is not None else "",
        f"read by {block.readers}" if block.readers else "",
        "pinned" if block.pinned else "",
        "not yet below" if block.waiting else "",
        f"ends a chunk ({block.chunk})" if block.chunk else "",
    ]
    why = ", ".join(filter(None, facts)) or NOTHING
    if not block.tiers:
        why = GONE.get(block.reason) or DROPS.get(block.reason, UNKNOWN_REASON)
        if block.reason != NEVER and block.gone_s is not None:
            why = f"{format_duration(int(block.gone_s))} ago: {why}"
    use = "yes" if block.reachable and block.tiers else "no, one before it is missing" if block.tiers else "no"
    return [whole(index), block.key[:16], block.where, format_size(block.bytes) if block.tiers else NOTHING, use, why]
