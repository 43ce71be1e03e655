"""The curves of the dashboard: history in, SVG path data and one readout for each bar out.

Bars instead of lines, because a line would draw a value where nothing was wanted. A bar of the hit-rate chart is as
high as the chart whenever something was wanted: the coloured part was served, by tier, the pale part was computed. A
mark across the bar is the ceiling: what a store without bounds would have served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvstore.http.numbers import NOTHING, bytes_per_second, compact, percent
from kvstore.http.view import View
from kvstore.obs import Snapshot, count, part
from kvstore.obs.history import History, Span
from kvstore.units import format_size

BARS = 90
BAR_S = 10.0
WIDTH, HEIGHT = 900, 160
"""Size of the drawing's coordinates; the page stretches it to its own width."""
GAP = 1.5


@dataclass(slots=True)
class Chart:
    """What the page needs to draw one chart.

    Attributes
    ----------
    paths : dict
        Path data by series.
    readouts : list of str
        One line for each bar, oldest first.
    labels : dict
        Text of the axes and the description for those who do not see it.
    """

    paths: dict[str, str] = field(default_factory=dict)
    readouts: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


def bars_of(history: History) -> list[Span | None]:
    """What each bar of the charts is about, oldest first."""
    return history.buckets(BAR_S, BARS)


def hit_chart(history: History, spans: list[Span | None], tiers: list[str]) -> Chart:
    """Share of the wanted blocks that was served, stacked by tier, below the ceiling."""
    bars: dict[str, list[str]] = {name: [] for name in ("missed", *tiers, "ceiling")}
    readouts = []
    for i, span in enumerate(spans):
        wanted = span.grown.get("wanted", 0.0) if span else 0.0
        if span and wanted > 0:
            bars["missed"].append(_bar(i, 0, HEIGHT))
            floor = HEIGHT * 1.0
            for tier in tiers:
                height = min(floor, HEIGHT * span.grown.get(f"hit.{tier}", 0.0) / wanted)
                floor -= height
                bars[tier].append(_bar(i, floor, height))
            top = HEIGHT - HEIGHT * _ceiling(span, wanted)
            bars["ceiling"].append(_bar(i, max(0.0, min(floor, top) - 1.5), 3))
        readouts.append(f"{_ago(i)}: {_hits_of(span, tiers)}")
    chart = Chart({name: "".join(parts) for name, parts in bars.items()}, readouts)
    minute = history.last(60)
    chart.labels["about"] = (
        f"Hit rate by tier over the last {_minutes()} minutes. Last minute: {_hits_of(minute, tiers)}."
    )
    return chart


def traffic_chart(spans: list[Span | None]) -> Chart:
    """Bytes a second read from host memory, upwards, and written to it, downwards."""
    pairs = [(span.rate("read.host"), span.rate("written.host")) if span else (0.0, 0.0) for span in spans]
    top = _nice(max((max(pair) for pair in pairs), default=0.0))
    middle = HEIGHT / 2
    out, into = [], []
    for i, (read, written) in enumerate(pairs):
        if read > 0:
            out.append(_bar(i, middle - middle * read / top, middle * read / top))
        if written > 0:
            into.append(_bar(i, middle, middle * written / top))
    readouts = [
        f"{_ago(i)}: {bytes_per_second(read)} read, {bytes_per_second(written)} written"
        if span
        else f"{_ago(i)}: not running yet"
        for i, (span, (read, written)) in enumerate(zip(spans, pairs, strict=True))
    ]
    chart = Chart({"out": "".join(out), "in": "".join(into)}, readouts)
    busy = any(map(any, pairs))
    chart.labels["top"] = bytes_per_second(top) if busy else NOTHING
    chart.labels["low"] = chart.labels["top"]
    chart.labels["about"] = f"Bytes a second over the last {_minutes()} minutes. " + (readouts[-1] if readouts else "")
    return chart


def by_minute(history: History, tiers: list[str]) -> list[list[str]]:
    """The hit-rate chart as rows, newest minute first: when, wanted, the share of each tier, computed, ceiling."""
    rows = []
    for i, span in enumerate(reversed(history.buckets(60.0, round(BARS * BAR_S / 60)))):
        if span is None or span.grown.get("wanted", 0.0) <= 0:
            continue
        asked = span.grown["wanted"]
        hits = [span.grown.get(f"hit.{tier}", 0.0) for tier in tiers]
        when = "this minute" if i == 0 else f"{i} min ago"
        shares = [percent(hit, asked) for hit in (*hits, max(0.0, asked - sum(hits)))]
        rows.append([when, compact(asked), *shares, percent(_ceiling(span, asked), 1)])
    return rows


def _ceiling(span: Span, wanted: float) -> float:
    """Share that could have been served; never less than what was."""
    return min(1.0, max(span.grown.get("reusable", 0.0), span.total("hit.")) / wanted)


def _hits_of(span: Span | None, tiers: list[str]) -> str:
    if span is None:
        return "not running yet"
    wanted = span.grown.get("wanted", 0.0)
    if wanted <= 0:
        return "nothing wanted"
    shares = [f"{tier} {percent(span.grown.get(f'hit.{tier}', 0.0), wanted)}" for tier in tiers]
    return f"{', '.join(shares)} of {compact(wanted)} blocks; ceiling {percent(_ceiling(span, wanted), 1)}"


def what_if(view: View, snapshot: Snapshot, tiers: list[str]) -> None:
    """The hit rate of stores of other sizes, and where host memory alone and all tiers together stand on that curve."""
    listed = part(snapshot, "reuse").get("curve")
    pairs = listed if isinstance(listed, (list, tuple)) else ()
    curve = [(float(size), float(rate)) for size, rate in pairs if size > 0]
    view.shown["whatif_card"] = bool(curve) and count(snapshot, "reuse", "wanted") > 0
    rows: list[list[str]] = []
    path = ""
    if curve:
        low, high = math.log2(curve[0][0]), math.log2(curve[-1][0])
        span = max(high - low, 1e-9)
        points = [((math.log2(size) - low) / span * WIDTH, HEIGHT * (1 - rate)) for size, rate in curve]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        rows = [[format_size(size), percent(rate, 1)] for size, rate in curve[::2]]
        sizes = numbers_of(snapshot, tiers)
        for name, size in (("host", sizes.get("host", 0.0)), ("all", sum(sizes.values()))):
            x = (math.log2(size) - low) / span * WIDTH if size > 0 else -1.0
            view.paths[f"whatif_{name}"] = f"M{x:.1f} 0V{HEIGHT}" if 0 <= x <= WIDTH else ""
        view.text["whatif_low"], view.text["whatif_high"] = format_size(curve[0][0]), format_size(curve[-1][0])
    view.paths["whatif_line"] = path
    view.paths["whatif_area"] = f"{path}L{WIDTH} {HEIGHT}L0 {HEIGHT}z" if path else ""
    view.rows["whatif"] = rows


def numbers_of(snapshot: Snapshot, tiers: list[str]) -> dict[str, float]:
    """Budget of each tier."""
    return {tier: count(snapshot, "tiers", tier, "capacity") for tier in tiers}


def box(left: float, top: float, width: float, height: float) -> str:
    """Path data of a rectangle; empty where it has no width."""
    return f"M{left:.2f} {top:g}h{width:.2f}v{height:g}h{-width:.2f}z" if width > 0 else ""


def _bar(index: int, top: float, height: float) -> str:
    step = WIDTH / BARS
    return f"M{index * step + GAP / 2:g} {top:.1f}h{step - GAP:g}v{height:.1f}h{GAP - step:g}z" if height > 0 else ""


def _ago(index: int) -> str:
    seconds = round((BARS - 1 - index) * BAR_S)
    if seconds == 0:
        return "now"
    return f"{seconds} s ago" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02d} s ago"


def _minutes() -> int:
    return round(BARS * BAR_S / 60)


def _nice(value: float) -> float:
    """The next round size a scale can end at: 1, 2, 5, 10 … 500 of a unit, so that it rarely jumps."""
    for unit in (1 << 10, 1 << 20, 1 << 30, 1 << 40):
        for factor in (1, 2, 5, 10, 20, 50, 100, 200, 500):
            if value <= unit * factor:
                return float(unit * factor)
    return value
