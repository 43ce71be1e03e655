"""What every command prints with: one console for results, one for errors, and plain JSON."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text


@functools.cache
def console() -> Console:
    """Results, on stdout."""
    return Console(highlight=False, soft_wrap=False)


def error(cause: str, remedy: str = "") -> None:
    """Print one line on stderr: the cause in red, the remedy after it."""
    line = Text.assemble((clean(cause), "bold red"), " " if remedy else "", clean(remedy))
    Console(stderr=True, highlight=False, soft_wrap=True).print(line)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout, bytes as hex."""
    raw = msgspec.json.format(msgspec.json.encode(plain(value)), indent=2)
    sys.stdout.write(raw.decode() + "\n")


def progress(text: str) -> None:
    """A line of progress on a terminal's stderr, in place of the last one."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def clean(text: object) -> str:
    """One line of printable characters: what clients sent must not steer the operator's terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text).replace("\n", " ").strip())


def plain(value: Any) -> Any:
    """A value as JSON can say it: bytes as hexadecimal digits."""
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return bytes(value).hex() if isinstance(value, (bytes, bytearray, memoryview)) else value
