"""Divergence of blended prompts against what was computed, as a table and as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, PAD = 340, 320, 48
COLOURS = ("#27c", "#c33", "#2a2", "#a5c", "#e80", "#0aa", "#777", "#b07", "#550")


def table(rows: Sequence[Any]) -> list[str]:
    """Lines of a table of `blend.evaluate.Row`s, in parts by capture; intervals in brackets."""
    lines: list[str] = []
    before = ""
    for row in rows:
        if row.capture != before:
            before = row.capture
            lines += ["", f"{before:18} share computed  {'KL':>23}  {'top-1':>18}  {'NLL':>25}  {'time saved':>18}"]
        lines.append(
            f"{row.selector:18} {row.share:5.0%} {row.computed:8.1%}  {_with(row, 'kl', '.4f'):>23}  "
            f"{_with(row, 'top1', '.3f'):>18}  {_with(row, 'nll', '+.4f'):>25}  {_with(row, 'saved', '.0%'):>18}"
        )
    return lines


def _with(row: Any, name: str, form: str) -> str:
    low, high = getattr(row, f"{name}_interval")
    return f"{getattr(row, name):{form}} [{low:{form}}, {high:{form}}]"


def svg(rows: Sequence[Any], model: str) -> str:
    """A panel for each capture: divergence, logarithmic, over the share computed, choosing included; a line a selector.

    Parameters
    ----------
    rows : sequence of blend.evaluate.Row
    model : str
        For the title.
    """
    captures = list(dict.fromkeys(row.capture for row in rows))
    names = list(dict.fromkeys(row.selector for row in rows))
    shown = [row for row in rows if row.kl > 0]
    powers = [math.log10(row.kl) for row in shown] or [-1.0]
    low, high = min(powers) - 0.1, max(powers) + 0.1
    widest = max([row.computed for row in rows] or [0.0]) * 1.05 or 1.0
    wide, tall = WIDTH * max(1, len(captures)), HEIGHT + 20 * math.ceil(len(names) / 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{tall}" fill="white"/>',
    ]
    for place, capture in enumerate(captures):
        left = place * WIDTH + PAD

        def at(row: Any, left: float = left) -> tuple[float, float]:
            x = left + (WIDTH - PAD - 12) * row.computed / widest
            return x, _height(math.log10(row.kl), low, high)

        parts += _frame(left, f"{model}, {capture}: KL, nats a token", low, high, widest)
        for number, name in enumerate(names):
            line = sorted(map(at, (row for row in shown if (row.capture, row.selector) == (capture, name))))
            colour = COLOURS[number % len(COLOURS)]
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in line]
    for number, name in enumerate(names):
        x, y = PAD + (number % 4) * wide / 4.4, HEIGHT + 8 + 20 * (number // 4)
        parts.append(f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(x + 9, y, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _height(power: float, low: float, high: float) -> float:
    return HEIGHT - PAD - (HEIGHT - 2 * PAD) * (power - low) / (high - low)


def _frame(left: float, title: str, low: float, high: float, widest: float) -> list[str]:
    parts = [_text(left, 24, title)]
    steps = [step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in (1, 2, 5)]
    for value in (step for step in steps if low <= math.log10(step) <= high):
        y = _height(math.log10(value), low, high)
        parts.append(f'<line x1="{left}" x2="{left + WIDTH - PAD - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, f"{value:g}", "end"))
    for step in range(5):
        share = widest * step / 4
        parts.append(_text(left + (WIDTH - PAD - 12) * step / 4, HEIGHT - PAD + 16, f"{share:.0%}", "middle"))
    parts.append(_text(left + (WIDTH - PAD) / 2, HEIGHT - 16, "of the reused tokens computed", "middle"))
    return parts


def _text(left: float, top: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}" fill="#222">{html.escape(words)}</text>'
