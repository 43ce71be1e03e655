"""The picture of what flows: engines on the left, host memory in the middle, the tiers below it on the right.

A tier is a vessel, filled as far as it is used. An arrow is as thick as its rate, on a scale that makes a hundredfold
rate some steps thicker; one that is idle is a hair line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from kvstore.http.numbers import NOTHING, bytes_per_second, percent
from kvstore.http.view import View, states_of
from kvstore.obs import Snapshot, count
from kvstore.obs.history import Span
from kvstore.units import format_size

WIDTH, ROW = 900, 112
_BOX_W, _BOX_H = 150, 84
_COLUMNS = (10, 375, 740)
_THICK = (1.5, 22.0)


def _below(tiers: list[str]) -> list[str]:
    return [tier for tier in tiers if tier not in ("host", "gpu")]


def _top(row: int) -> float:
    return 4 + ROW * row + (ROW - _BOX_H) / 2


def _tall(rows: int) -> float:
    """Height of the box of host memory, which stands beside all the tiers below it."""
    return ROW * (rows - 1) + _BOX_H


def draw(view: View, snapshot: Snapshot, recent: Span, tiers: list[str]) -> None:
    """Fill levels, arrows and their labels."""
    below = _below(tiers)
    rows = max(1, len(below))
    states = states_of(snapshot, tiers)
    brought_up = sum(recent.rate(f"read.{tier}") for tier in below)
    stored = max(0.0, recent.rate("written.host") - brought_up)
    _vessel(view, "host", states.get("host", {}), (_COLUMNS[1], _top(0)), _tall(rows))
    middle = _top(0) + (_tall(rows) - _BOX_H) / 2
    _arrows(view, "engines", _COLUMNS[0] + _BOX_W, _COLUMNS[1], middle, (stored, recent.rate("read.host")))
    for row, tier in enumerate(below):
        _vessel(view, tier, states.get(tier, {}), (_COLUMNS[2], _top(row)), _BOX_H)
        both = recent.rate(f"written.{tier}"), recent.rate(f"read.{tier}")
        _arrows(view, tier, _COLUMNS[1] + _BOX_W, _COLUMNS[2], _top(row), both)
    ways = [("engines", "host", "flow_engines_out"), ("host", "engines", "flow_engines_in")]
    for tier in below:
        ways += [("host", tier, f"flow_{tier}_out"), (tier, "host", f"flow_{tier}_in")]
    view.rows["flows"] = [[f"{start} → {end}", view.text[rate]] for start, end, rate in ways]
    view.text["flow_about"] = "; ".join(
        [f"engines store {bytes_per_second(stored)} and load {bytes_per_second(recent.rate('read.host'))}"]
        + [f"{tier}: {view.text[f'flow_{tier}_out']} written, {view.text[f'flow_{tier}_in']} read" for tier in below]
    )


def _vessel(view: View, tier: str, state: Mapping[str, Any], corner: tuple[float, float], tall: float) -> None:
    capacity = count(state, "capacity")
    share = min(1.0, count(state, "used") / capacity) if capacity > 0 else 0.0
    (left, top), fill = corner, (tall - 4) * share
    view.paths[f"flow_{tier}_fill"] = f"M{left + 2} {top + tall - 2 - fill:.1f}h{_BOX_W - 4}v{fill:.1f}h{4 - _BOX_W}z"
    view.text[f"flow_{tier}_used"] = f"{percent(share, 1)} of {format_size(capacity)}" if capacity else NOTHING


def _arrows(view: View, name: str, left: float, right: float, top: float, rates: tuple[float, float]) -> None:
    """Away from the engines above, towards them below."""
    for way, rate, offset in (("out", rates[0], 0.3), ("in", rates[1], 0.7)):
        y, half = top + _BOX_H * offset, _thickness(rate) / 2
        start, end = (left + 8, right - 8) if way == "out" else (right - 8, left + 8)
        neck = end - math.copysign(9 + half, end - start)
        view.paths[f"flow_{name}_{way}_arrow"] = (
            f"M{start} {y - half:.1f}H{neck:.1f}V{y - half - 5:.1f}L{end} {y:.1f}"
            f"L{neck:.1f} {y + half + 5:.1f}V{y + half:.1f}H{start}z"
        )
        view.text[f"flow_{name}_{way}"] = bytes_per_second(rate) if rate > 0 else "idle"


def _thickness(rate: float) -> float:
    """Of an arrow: from a kilobyte a second on, a bit more for each doubling."""
    if rate < 1024:
        return _THICK[0]
    return min(_THICK[1], _THICK[0] + 0.9 * math.log2(rate / 1024))


def markup(view: View, tiers: list[str], colour: Mapping[str, str]) -> str:
    """The picture as SVG."""
    below = _below(tiers)
    rows = max(1, len(below))
    middle = _top(0) + (_tall(rows) - _BOX_H) / 2
    parts = [_box("engines", "Engines", (_COLUMNS[0], middle), _BOX_H, None)]
    parts.append(_box("host", "host", (_COLUMNS[1], _top(0)), _tall(rows), view))
    parts += _ways(view, "engines", (_COLUMNS[0] + _BOX_W + _COLUMNS[1]) / 2, middle, colour.get("host", "other"))
    for row, tier in enumerate(below):
        parts.append(_box(tier, tier, (_COLUMNS[2], _top(row)), _BOX_H, view))
        x = (_COLUMNS[1] + _BOX_W + _COLUMNS[2]) / 2
        parts += _ways(view, tier, x, _top(row), colour.get(tier, "other"))
    return (
        f'<svg class="flow" viewBox="0 0 {WIDTH} {ROW * rows + 8}" role="img" aria-labelledby="flow_about">'
        f'<title id="flow_about">{escape(view.text["flow_about"])}</title>{"".join(parts)}</svg>'
    )


def _box(name: str, title: str, corner: tuple[float, float], tall: float, view: View | None) -> str:
    (left, top), x, y = corner, corner[0] + _BOX_W / 2, corner[1] + tall / 2
    inside, second = "", "vLLM, transformers, …"
    if view is not None:
        fill = name if name in ("gpu", "host", "disk", "redis") else "other"
        shape = view.paths[f"flow_{name}_fill"]
        inside = f'<path id="flow_{escape(name)}_fill" class="level fill-{fill}" d="{shape}"/>'
        second = view.text[f"flow_{name}_used"]
    return (
        f'<rect class="vessel" x="{left}" y="{top}" width="{_BOX_W}" height="{tall}" rx="10"/>{inside}'
        f'<text class="name" x="{x}" y="{y - 6}">{escape(title)}</text>'
        f'<text id="flow_{escape(name)}_used" class="small" x="{x}" y="{y + 16}">{escape(second)}</text>'
    )


def _ways(view: View, name: str, x: float, top: float, colour: str) -> list[str]:
    parts: list[str] = []
    for way, y in (("out", top + 0.3 * _BOX_H - 17), ("in", top + 0.7 * _BOX_H + 26)):
        key = f"flow_{name}_{way}"
        parts.append(
            f'<path id="{escape(key)}_arrow" class="arrow arrow-{way} fill-{escape(colour)}" '
            f'd="{view.paths[f"{key}_arrow"]}"/>'
            f'<text id="{escape(key)}" class="rate" x="{x}" y="{y:.0f}">{escape(view.text[key])}</text>'
        )
    return parts
