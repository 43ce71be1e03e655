"""Sizes and durations as people write them: ``8GiB`` and ``250ms`` to numbers, and back."""

from __future__ import annotations

import re

SIZE_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
TIME_UNITS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

_NUMBER = re.compile(r"(\d{1,19}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)
_SIZES = {unit.lower(): factor for unit, factor in SIZE_UNITS.items()}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB`` or ``4096``.

    Raises
    ------
    ValueError
        With the rule that the text breaks. ``8G`` is refused: it means two different numbers to two tools.
    """
    match = _NUMBER.fullmatch(text.strip())
    factor = _SIZES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError("is not a size: write 8GiB, 500MB or a number of bytes")
    number, _, fraction = match[1].partition(".")
    # Integers all the way: a float would round sizes above 8 PiB.
    return int(number) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``250ms``, ``10s``, ``5m`` or ``1.5``.

    Raises
    ------
    ValueError
        With the rule that the text breaks.
    """
    match = _NUMBER.fullmatch(text.strip())
    factor = TIME_UNITS.get(match[2]) if match else None
    if match is None or factor is None:
        raise ValueError("is not a duration: write 250ms, 10s, 5m or a number of seconds")
    return float(match[1]) * factor


def format_size(nbytes: float) -> str:
    """A size for people: ``8 GiB``, ``1.5 MiB``, ``512 B``."""
    value = float(nbytes)
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.1f}".removesuffix(".0") + f" {units[-1]}"


def format_duration(seconds: float) -> str:
    """A duration for people: ``250 ms``, ``10 s``, ``3 h 12 min``, ``2 d 4 h``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs" if seconds > 0 else "0 s"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    for big, small, size, part in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
