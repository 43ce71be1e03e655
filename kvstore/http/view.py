"""What the dashboard shows, as text: the one place where numbers become words.

The server fills the page with a view, and the stream sends a fresh one each second, so the page looks the same with and
without JavaScript and nothing is formatted in two languages. `kvstore.http.build` puts it together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvstore.http.numbers import whole
from kvstore.obs import Snapshot, part

TIER_ORDER = ("gpu", "host", "disk", "redis")
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
        Width of a bar in percent; path data of a shape.
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


def degraded(snapshot: Snapshot) -> list[str]:
    """Tiers that are asked to rest: the daemon serves without them."""
    states = {tier: part(state, "breaker").get("state", "closed") for tier, state in part(snapshot, "tiers").items()}
    return [tier for tier, state in states.items() if state != "closed"]


def tier_names(snapshot: Snapshot) -> list[str]:
    """Tiers of a snapshot, nearest first."""
    found = dict.fromkeys([*part(snapshot, "tiers"), *part(snapshot, "hit_blocks")])
    return sorted(map(str, found), key=lambda tier: (TIER_ORDER.index(tier) if tier in TIER_ORDER else 9, tier))[:8]


def many(value: float, word: str) -> str:
    """A count with its noun."""
    return f"{whole(value)} {word}{'' if value == 1 else 's'}"


def shown_text(value: Any) -> str:
    """Any value as a short text."""
    return (value.hex() if isinstance(value, bytes) else str(value))[:200]


def states_of(snapshot: Snapshot, tiers: list[str]) -> dict[str, Mapping[str, Any]]:
    """The part of a snapshot about each tier."""
    return {tier: part(snapshot, "tiers", tier) for tier in tiers}
