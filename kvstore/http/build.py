"""Puts the view of the dashboard together, section by section."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.http import now, tables
from kvstore.http.quality import quality
from kvstore.http.view import RECENT_S, View, shown_text, tier_names
from kvstore.obs import Snapshot, part
from kvstore.obs.history import History
from kvstore.sightings import HeldLease


def build(snapshot: Snapshot, history: History, ready: tuple[bool, str], leases: Sequence[HeldLease] = ()) -> View:
    """The view of a snapshot and what went before it."""
    view = View(boot=shown_text(snapshot.get("boot", "")))
    tiers = tier_names(snapshot)
    now.head(view, snapshot, ready)
    now.tiles(view, snapshot, history, tiers)
    now.pictures(view, snapshot, history, tiers)
    for tier in tiers:
        now.tier(view, tier, part(snapshot, "tiers", tier), history.last(RECENT_S))
    tables.spaces(view, snapshot)
    tables.quotas(view, snapshot)
    tables.verbs(view, snapshot)
    tables.leases(view, leases)
    quality(view, snapshot, tiers)
    tables.trouble(view, snapshot, tiers)
    return view
