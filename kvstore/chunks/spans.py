"""Spans of a prompt that may be chunks: as a request names them, or between separator tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidParams
from kvstore.types import MAX_CHUNK_TOKENS


def check_spans(spans: Sequence[tuple[int, int]], length: int) -> None:
    """Half-open ranges inside a prompt, in order and apart, none longer than a chunk may be.

    Raises
    ------
    InvalidParams
    """
    end = 0
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise InvalidParams(f"spans: {start}..{stop} is empty or leaves the prompt of {length} tokens.", "")
        if start < end:
            raise InvalidParams(f"spans: {start}..{stop} overlaps the span before it, or stands out of order.", "")
        if stop - start > MAX_CHUNK_TOKENS:
            raise InvalidParams(f"spans: {start}..{stop} has more than {MAX_CHUNK_TOKENS} tokens.", "Split it.")
        end = stop


def between(tokens: NDArray[np.int32], separator: NDArray[np.int32]) -> list[tuple[int, int]]:
    """What stands between occurrences of a separator: what is before the first and behind the last is no chunk.

    Separators themselves belong to no span; pieces longer than a chunk may be are left out.
    """
    width = len(separator)
    if not width or len(tokens) < 2 * width:
        return []
    hits = np.ones(len(tokens) - width + 1, dtype=bool)
    for offset, wanted in enumerate(separator):
        hits &= tokens[offset : len(tokens) - width + 1 + offset] == wanted
    spans: list[tuple[int, int]] = []
    behind = -1
    for place in np.flatnonzero(hits).tolist():
        if place < behind:  # a separator that overlaps the one before
            continue
        if behind >= 0 and 0 < place - behind <= MAX_CHUNK_TOKENS:
            spans.append((behind, place))
        behind = place + width
    return spans
