"""What the daemon tells about itself. All of it reads the one snapshot that the daemon makes; nothing counts twice.

The functions below take numbers out of a snapshot, `metrics` is the table of Prometheus metrics, `history` the last
minutes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Snapshot = Mapping[str, Any]
"""State and counters of the daemon at one instant, as `/v1/stats` shows them. Every key may be missing."""


def part(tree: Any, *path: str) -> Mapping[str, Any]:
    """Follow `path` into nested mappings; empty where the way ends."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def number(tree: Any, *path: str) -> float | None:
    """Follow `path` to a number; None where there is none, or where it is not finite."""
    value = part(tree, *path[:-1]).get(path[-1])
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def count(tree: Any, *path: str) -> float:
    """Follow `path` to a number; 0 where there is none."""
    return number(tree, *path) or 0


def numbers(tree: Any, *path: str) -> dict[str, float]:
    """Follow `path` to a mapping and keep what is a number in it."""
    found = part(tree, *path)
    return {str(key): value for key in found if (value := number(found, key)) is not None}


def listed(tree: Any, name: str) -> list[Mapping[str, Any]]:
    """The mappings in a list of that name, whatever else was in it left out."""
    found = part(tree).get(name)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, (list, tuple)) else []


def namespaces(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """The namespaces of a snapshot."""
    return listed(snapshot, "namespaces")
