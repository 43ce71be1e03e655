"""Of very many values, some: runs of neighbours every so often, so that looking at them takes a bounded time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import compress, cycle
from typing import TypeVar

T = TypeVar("T")

MOST = 1 << 15
"""Values that are looked at, or twice as many: some milliseconds."""
_RUN = 1024
"""Values in a row that are looked at: more blocks than a prompt has, so that all parts of prompts are."""


def some(values: Collection[T]) -> tuple[Iterable[T], int]:
    """All values, or of very many so many in a row every so often; and how many each of them stands for."""
    stride = 1 + len(values) // MOST
    if stride == 1:
        return values, 1
    return compress(values, cycle([True] * _RUN + [False] * (_RUN * (stride - 1)))), stride
