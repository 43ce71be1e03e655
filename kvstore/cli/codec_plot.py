"""Size against loss of chains of codecs, as a table and as SVG: shared by `kvstore calibrate` and `kvstore eval`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

WIDTH, HEIGHT, PAD = 720, 440, 64


class Point(Protocol):
    """What is drawn of a chain."""

    @property
    def chain(self) -> str:
        """Its name."""
        ...

    @property
    def kl(self) -> float:
        """Mean divergence."""
        ...

    @property
    def ratio(self) -> float:
        """How many times smaller than raw."""
        ...


def short(chain: str) -> str:
    """A chain's name without what is the same for all: digests of bases, and turning keys back."""
    return re.sub(r"basis=[0-9a-f]+,?", "", chain).removeprefix("prerope|").removesuffix("|zstd").replace("()", "")


def table(rows: Sequence[Any], verdicts: Mapping[str, str] | None = None) -> list[str]:
    """Lines of a table of `codec_eval.Row`s, or of a profile's rungs; with verdicts by chain, if there are some."""
    head = f"{'chain':24} {'smaller':>7}  {'KL':>16}  {'top-1':>14}  {'NLL':>16}  enc GiB/s   dec"
    lines = [head if verdicts is None else f"{head}  gate"]
    for row in rows:
        verdict = "" if verdicts is None else f"  {verdicts[row.chain]}"
        lines.append(
            f"{short(row.chain):24} {row.ratio:7.2f}  {_with(row, 'kl', '.4f'):>16}  {_with(row, 'top1', '.3f'):>14}  "
            f"{_with(row, 'nll', '+.4f'):>16}  {row.encode_gib_s:9.2f} {row.decode_gib_s:5.2f}{verdict}"
        )
    return lines


def _with(row: Any, name: str, form: str) -> str:
    """A figure with half of its interval, where that is known."""
    spread = getattr(row, f"{name}_interval", None)
    if name == "kl" and spread is None:
        spread = row.kl_upper - row.kl
    shown = f"{getattr(row, name):{form}}"
    return shown if spread is None else f"{shown} ±{spread:{form.lstrip('+')}}"


def svg(points: Sequence[Point], model: str, gate: float) -> str:
    """Divergence against size, both logarithmic; what is on the frontier is joined and named, the rest is grey.

    Parameters
    ----------
    points : sequence of Point
    model : str
        For the title.
    gate : float
        A divergence to mark.
    """
    shown = [p for p in points if p.kl > 0 and p.ratio > 0]
    frontier: list[Point] = []
    for point in sorted(shown, key=lambda p: -p.ratio):
        if not frontier or point.kl < frontier[-1].kl:
            frontier.append(point)
    powers = [math.log10(kl) for kl in (*(p.kl for p in shown), gate) if kl > 0] or [-3.0]
    low, high = math.floor(min(powers)), math.ceil(max(powers) + 1e-9)
    left, right = 0.0, math.log2(max([p.ratio for p in shown] or [2.0])) * 1.12 + 0.01

    def x(ratio: float) -> float:
        return PAD + (WIDTH - 2 * PAD) * (math.log2(max(ratio, 1.0)) - left) / (right - left)

    def y(kl: float) -> float:
        return HEIGHT - PAD - (HEIGHT - 2 * PAD) * (math.log10(kl) - low) / max(high - low, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        parts += [_line(y(10**power), "#ddd"), _text(PAD - 6, y(10**power) + 4, f"1e{power}", "end")]
    for power in range(math.floor(right) + 1):
        parts.append(_text(x(2**power), HEIGHT - PAD + 18, f"{2**power}x", "middle"))
    if gate > 0:
        parts.append(_line(y(gate), "#c33", ' stroke-dasharray="4"'))
    way = " ".join(f"{x(p.ratio):.1f},{y(p.kl):.1f}" for p in frontier)
    parts.append(f'<polyline points="{way}" fill="none" stroke="#27c" stroke-width="1.5"/>')
    places = [(x(point.ratio), y(point.kl)) for point in shown]
    boxes = [_Box(left - 5, top - 5, left + 5, top + 5) for left, top in places]
    for point, (left, top) in sorted(zip(shown, places, strict=True), key=lambda both: both[1]):
        best = point in frontier
        colour, name = "#27c" if best else "#999", short(point.chain)
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{colour}"/>')
        lower = _beside(left + 7, top + 4, 5.4 * len(name), boxes)
        parts.append(_text(left + 7, lower, html.escape(name), "start", colour))
    title = f"KL, nats a token, {html.escape(model)} (dashed: gate at {gate:g})"
    parts += [_text(WIDTH / 2, HEIGHT - 14, "times smaller than raw", "middle"), _text(PAD, 24, title, "start")]
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Box(NamedTuple):
    """What a point or its name covers."""

    left: float
    top: float
    right: float
    bottom: float


def _beside(left: float, base: float, width: float, boxes: list[_Box]) -> float:
    """Where a name of a width goes, beside its point or as near as it covers no other; it is put to the boxes."""
    found = base
    for shift in (0, 11, -11, 22, -22, 33, -33, 44, -44):
        box = _Box(left, base + shift - 9, left + width, base + shift + 2)
        if not any(
            box.left < o.right and o.left < box.right and box.top < o.bottom and o.top < box.bottom for o in boxes
        ):
            found = base + shift
            break
    boxes.append(_Box(left, found - 9, left + width, found + 2))
    return found


def _line(at: float, colour: str, look: str = "") -> str:
    return f'<line x1="{PAD}" x2="{WIDTH - PAD}" y1="{at:.1f}" y2="{at:.1f}" stroke="{colour}"{look}/>'


def _text(left: float, top: float, words: str, anchor: str, colour: str = "#222") -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'
