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


def _height(rows: int) -> int:
    return ROW * max(1, rows) + 8


def _top(rows: int, row: int) -> float:
    return (_height(rows) - ROW * rows) / 2 + ROW * row + (ROW - _BOX_H) / 2


def draw(view: View, snapshot: Snapshot, recent: Span, tiers: list[str]) -> None:
    """Fill levels, arrows and their labels."""
    below = [tier for tier in tiers if tier not in ("host", "gpu")]
    rows = max(1, len(below))
    middle = _top(rows, 0) + (rows - 1) * ROW / 2
    states = states_of(snapshot, tiers)
    brought_up = sum(recent.rate(f"read.{tier}") for tier in below)
    stored = max(0.0, recent.rate("written.host") - brought_up)
    _vessel(view, "host", states.get("host", {}), _COLUMNS[1], middle)
    _arrows(view, "engines", middle, _COLUMNS[0] + _BOX_W, _COLUMNS[1], middle, (stored, recent.rate("read.host")))
    for row, tier in enumerate(below):
        top = _top(rows, row)
        _vessel(view, tier, states.get(tier, {}), _COLUMNS[2], top)
        both = recent.rate(f"written.{tier}"), recent.rate(f"read.{tier}")
        _arrows(view, tier, middle, _COLUMNS[1] + _BOX_W, _COLUMNS[2], top, both)
    view.text["flow_about"] = "; ".join(
        [f"engines store {bytes_per_second(stored)} and load {bytes_per_second(recent.rate('read.host'))}"]
        + [f"{tier}: {view.text[f'flow_{tier}_out']} written, {view.text[f'flow_{tier}_in']} read" for tier in below]
    )


def _vessel(view: View, tier: str, state: Mapping[str, Any], left: float, top: float) -> None:
    capacity = count(state, "capacity")
    share = min(1.0, count(state, "used") / capacity) if capacity > 0 else 0.0
    fill = (_BOX_H - 4) * share
    view.paths[f"flow_{tier}_fill"] = f"M{left + 2} {top + _BOX_H - 2 - fill:.1f}h{_BOX_W - 4}v{fill:.1f}h{4 - _BOX_W}z"
    view.text[f"flow_{tier}_used"] = f"{percent(share, 1)} of {format_size(capacity)}" if capacity else NOTHING


def _arrows(
    view: View, name: str, from_top: float, left: float, right: float, to_top: float, rates: tuple[float, float]
) -> None:
    """Away from the engines above, towards them below."""
    for way, rate, offset in (("out", rates[0], 0.3), ("in", rates[1], 0.7)):
        start, end = from_top + _BOX_H * offset, to_top + _BOX_H * offset
        thick = _thickness(rate)
        tip = 9 + thick / 2
        a, b = (left + 8, right - 8) if way == "out" else (right - 8, left + 8)
        ya, yb = (start, end) if way == "out" else (end, start)
        sign = 1 if b > a else -1
        neck = b - sign * tip
        bend = (a + b) / 2
        half = thick / 2
        view.paths[f"flow_{name}_{way}_arrow"] = (
            f"M{a} {ya - half:.1f}C{bend} {ya - half:.1f} {bend} {yb - half:.1f} {neck:.1f} {yb - half:.1f}"
            f"L{neck:.1f} {yb - half - 5:.1f}L{b} {yb:.1f}L{neck:.1f} {yb + half + 5:.1f}L{neck:.1f} {yb + half:.1f}"
            f"C{bend} {yb + half:.1f} {bend} {ya + half:.1f} {a} {ya + half:.1f}z"
        )
        view.text[f"flow_{name}_{way}"] = bytes_per_second(rate) if rate > 0 else "idle"


def _thickness(rate: float) -> float:
    """Of an arrow: from a kilobyte a second on, a bit more for each doubling."""
    if rate < 1024:
        return _THICK[0]
    return min(_THICK[1], _THICK[0] + 0.9 * math.log2(rate / 1024))


def markup(view: View, tiers: list[str], colour: Mapping[str, str]) -> str:
    """The picture as SVG."""
    below = [tier for tier in tiers if tier not in ("host", "gpu")]
    rows = max(1, len(below))
    middle = _top(rows, 0) + (rows - 1) * ROW / 2
    parts = [_box("engines", "Engines", _COLUMNS[0], middle, None)]
    parts.append(_box("host", "host", _COLUMNS[1], middle, view))
    parts += _ways(view, "engines", (_COLUMNS[0] + _BOX_W + _COLUMNS[1]) / 2, middle, middle, "host", colour)
    for row, tier in enumerate(below):
        top = _top(rows, row)
        parts.append(_box(tier, tier, _COLUMNS[2], top, view))
        parts += _ways(view, tier, (_COLUMNS[1] + _BOX_W + _COLUMNS[2]) / 2, middle, top, tier, colour)
    return (
        f'<svg class="flow" viewBox="0 0 {WIDTH} {_height(rows)}" role="img" aria-labelledby="flow_about">'
        f'<title id="flow_about">{escape(view.text["flow_about"])}</title>{"".join(parts)}</svg>'
    )


def _box(name: str, title: str, left: float, top: float, view: View | None) -> str:
    x = left + _BOX_W / 2
    inside = ""
    if view is not None:
        inside = (
            f'<path id="flow_{escape(name)}_fill" class="level fill-{escape(_known(name))}" '
            f'd="{view.paths[f"flow_{name}_fill"]}"/>'
        )
    second = (
        f'<text id="flow_{escape(name)}_used" class="small" x="{x}" y="{top + 58}">'
        f"{escape(view.text[f'flow_{name}_used'])}</text>"
        if view is not None
        else f'<text class="small" x="{x}" y="{top + 58}">vLLM, transformers, …</text>'
    )
    return (
        f'<rect class="vessel" x="{left}" y="{top}" width="{_BOX_W}" height="{_BOX_H}" rx="10"/>{inside}'
        f'<text class="name" x="{x}" y="{top + 36}">{escape(title)}</text>{second}'
    )


def _known(tier: str) -> str:
    return tier if tier in ("gpu", "host", "disk", "redis") else "other"


def _ways(
    view: View, name: str, x: float, from_top: float, to_top: float, tier: str, colour: Mapping[str, str]
) -> list[str]:
    parts: list[str] = []
    for way, offset, shift in (("out", 0.3, -17), ("in", 0.7, 26)):
        y = (from_top + to_top) / 2 + _BOX_H * offset + shift
        key = f"flow_{name}_{way}"
        parts.append(
            f'<path id="{escape(key)}_arrow" class="arrow arrow-{way} fill-{escape(colour.get(tier, "other"))}" '
            f'd="{view.paths[f"{key}_arrow"]}"/>'
            f'<text id="{escape(key)}" class="rate" x="{x}" y="{y:.0f}">{escape(view.text[key])}</text>'
        )
    return parts
