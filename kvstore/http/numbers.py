"""Numbers as the dashboard writes them: with units, and never a ratio of zero by zero."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.units import format_size

NOTHING = "–"
"""Stands where there is no number to show."""


def whole(value: float) -> str:
    """A count in full: ``1,234,567``."""
    return f"{value:,.0f}"


def compact(value: float) -> str:
    """A count in three digits: ``1.23 M``; in full below ten thousand."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    for unit in ("k", "M", "G"):
        value /= 1000
        if abs(value) < 999.5:
            return f"{_three(value)} {unit}"
    return f"{_three(value / 1000)} T"


def per_second(value: float) -> str:
    """A rate: ``0.4/s``, ``1.2 k/s``."""
    if 0 < value < 10:
        return f"{value:.1f}/s" if value >= 0.05 else "<0.1/s"
    return f"{compact(value)}/s"


def bytes_per_second(value: float) -> str:
    """A rate of bytes: ``1.2 GiB/s``."""
    return f"{format_size(value)}/s"


def percent(part: float, of: float) -> str:
    """A share. 0 and 100 mean exactly none and all; nothing is shown where there is nothing to have a share of."""
    if of <= 0:
        return NOTHING
    share = min(100.0, 100 * part / of)
    if 0 < share < 0.1:
        return "<0.1 %"
    if 99.9 < share < 100:
        return ">99.9 %"
    return f"{share:.1f}".removesuffix(".0") + " %"


def quantile(below: Sequence[tuple[float, float]], times: float, share: float) -> float | None:
    """The bound that a share of some values stays below, of (bound, values at or below it); None if above all."""
    if times <= 0:
        return None
    return next((bound for bound, count in below if count >= share * times), None)


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
