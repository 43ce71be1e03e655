"""Parsers for the values of settings: each takes text or a TOML value and raises ValueError with the rule it breaks."""

from __future__ import annotations

import importlib
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.units import SIZE_UNITS, parse_duration, parse_size

Parser = Callable[[object], Any]


class Secret:
    """A text that does not show itself: printing, logging or formatting gives stars, `reveal` gives the text."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "'***'" if self._text else "''"

    def __str__(self) -> str:
        return "***" if self._text else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def size(low: int = 0, high: int = 1 << 60) -> Parser:
    """A number of bytes within bounds."""

    def parse(value: object) -> int:
        if isinstance(value, str):
            number = parse_size(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            number = value
        else:
            raise ValueError("is not a size: write 8GiB, 500MB or a number of bytes")
        _within(number, low, high, show_size)
        return number

    return parse


def duration(low: float, high: float) -> Parser:
    """A number of seconds within bounds."""

    def parse(value: object) -> float:
        if isinstance(value, str):
            number = parse_duration(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
        else:
            raise ValueError("is not a duration: write 250ms, 10s, 5m or a number of seconds")
        _within(number, low, high, lambda n: f"{n:g}s")
        return number

    return parse


def integer(low: int, high: int) -> Parser:
    """A whole number within bounds."""

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("is not a whole number")
        try:
            number = int(value)
        except ValueError:
            raise ValueError("is not a whole number") from None
        _within(number, low, high, str)
        return number

    return parse


def share(value: object) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is not a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("is not a number") from None
    _within(number, 0.0, 1.0, str)
    return number


def _within(number: float, low: float, high: float, write: Callable[[Any], str]) -> None:
    # Written so that a NaN from a file is outside.
    if not number >= low:
        raise ValueError(f"is less than {write(low)}")
    if not number <= high:
        raise ValueError(f"is more than {write(high)}")


def choice(*words: str) -> Parser:
    """One of some words; a single ``module:function`` stands for the words that it returns."""

    def parse(value: object) -> str:
        known = words
        if len(words) == 1 and ":" in words[0]:
            module, _, function = words[0].partition(":")
            known = tuple(getattr(importlib.import_module(module), function)())
        if value not in known:
            raise ValueError(f"is not one of {', '.join(known)}")
        return str(value)

    return parse


def switch(value: object) -> bool:
    """On or off."""
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word in ("true", "on", "yes", "1"):
        return True
    if word in ("false", "off", "no", "0"):
        return False
    raise ValueError("is neither true nor false")


def text(value: object) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise ValueError("is not a text")
    return value


def secret(shortest: int) -> Parser:
    """A secret of a least length, or none."""

    def parse(value: object) -> Secret:
        written = text(value)
        if written and len(written) < shortest:
            raise ValueError(f"has fewer than {shortest} characters")
        return Secret(written)

    return parse


def path(longest: int = 4095, optional: bool = False) -> Parser:
    """An absolute path, with ``~`` for the home directory; relative ones are below the current directory."""

    def parse(value: object) -> Path | None:
        written = text(value)
        if not written:
            if optional:
                return None
            raise ValueError("is not a path")
        if "\0" in written:
            raise ValueError("is not a path: it has a zero byte")
        try:
            full = Path(written).expanduser().absolute()
        except RuntimeError:
            raise ValueError("names a user without a home directory") from None
        if len(os.fsencode(full)) > longest:
            raise ValueError(f"is a path of more than {longest} bytes, the longest the system takes here")
        return full

    return parse


def uids(value: object) -> tuple[int, ...]:
    """User ids, as a list or separated by commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("is not a list of user ids such as 1000,1001")
    one = integer(0, (1 << 32) - 2)
    try:
        return tuple(dict.fromkeys(one(part) for part in parts))
    except ValueError:
        raise ValueError("is not a list of user ids such as 1000,1001") from None


def address() -> Parser:
    """``host:port`` or ``[ipv6]:port``, or nothing."""

    def parse(value: object) -> str:
        written = text(value)
        if not written:
            return ""
        split_address(written)
        return written

    return parse


def split_address(written: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:7070``, ``[::1]:7070`` or ``localhost:0``.

    Raises
    ------
    ValueError
        With the rule that is broken.
    """
    host, colon, port = written.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("is not an address: write an IPv6 address in brackets, [::1]:7070")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError("is not an address: write host:port, such as 127.0.0.1:7070")
    return host, int(port)


def is_loopback(written: str) -> bool:
    """Whether an address can only be reached from this machine. Names other than localhost count as beyond it."""
    host, _ = split_address(written)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def show_size(nbytes: int) -> str:
    """A size as a user would write it: in the largest unit that says it exactly."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes and nbytes % SIZE_UNITS[unit] == 0:
            return f"{nbytes // SIZE_UNITS[unit]}{unit}"
    return str(nbytes)


def show(value: object) -> str:
    """Any setting's value as text; secrets as stars."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)
