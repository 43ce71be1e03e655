"""Contents of one namespace, found at any offset of a prompt.

A content enters with the hash of its first `WINDOW` tokens. For a prompt the hashes of all its windows are made at once
and passed through a filter, one byte a slot, that only few of those without a match get through; for these a dict says
which lengths of content begin so, the hash of each such span which content it would be, and the token ids whether it
is. Entering and leaving take constant time, and slots are used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvstore.chunks.rolling import Rolled, Roller
from kvstore.chunks.variants import Variant

WINDOW = 32
"""Tokens that must agree before a content is looked at; shorter ones are found where a span names them only."""

MAX_PROBES = 1 << 14
"""Spans that one search looks up at most, so that prompts and chunks made to agree nearly everywhere cost no more."""

_SLOTS_PER_ENTRY = 16
_LEAST_BITS = 12
_FULL = 255


@dataclass(slots=True, eq=False)
class Content:
    """The tokens of a chunk, and the KV there is of it.

    Attributes
    ----------
    key : bytes
        Content key.
    tokens : bytes
        int32, little-endian.
    variants : dict
        By context digest.
    """

    key: bytes
    tokens: bytes
    variants: dict[bytes, Variant] = field(default_factory=dict)
    fingerprint: int = 0
    whole: int = 0

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens) // 4


Accept = Callable[[Content, int], bool]
"""Whether a content may be used at an offset: some have no variant that this caller may read, or that is whole."""


class ContentTable:
    """The contents of one namespace.

    Parameters
    ----------
    roller : Roller
        Of this process.
    """

    def __init__(self, roller: Roller) -> None:
        self._roller = roller
        self._by_hash: dict[tuple[int, int], Content] = {}
        self._lengths: dict[int, dict[int, int]] = {}
        """Of each fingerprint: how many contents of each length begin with it."""
        self._make_filter(_LEAST_BITS)

    def __len__(self) -> int:
        return len(self._by_hash)

    def __iter__(self) -> Iterator[Content]:
        return iter(self._by_hash.values())

    def find(self, tokens: bytes) -> Content | None:
        """The content with exactly these tokens."""
        return self._verified(self._roll(tokens), tokens, 0, len(tokens) // 4)

    def add(self, content: Content) -> bool:
        """Enter a content that is not here. False if another one has its hash: the new one is not findable then."""
        rolled = self._roll(content.tokens)
        content.whole = rolled.span(0, content.length)
        if (content.length, content.whole) in self._by_hash:
            return False
        self._by_hash[content.length, content.whole] = content
        if content.length >= WINDOW:
            content.fingerprint = rolled.span(0, WINDOW)
            lengths = self._lengths.get(content.fingerprint)
            if lengths is None:
                lengths = self._lengths[content.fingerprint] = {}
                self._mark(content.fingerprint)
            lengths[content.length] = lengths.get(content.length, 0) + 1
        return True

    def remove(self, content: Content) -> None:
        """Take a content out."""
        del self._by_hash[content.length, content.whole]
        if content.length < WINDOW:
            return
        lengths = self._lengths[content.fingerprint]
        lengths[content.length] -= 1
        if not lengths[content.length]:
            del lengths[content.length]
        if not lengths:
            del self._lengths[content.fingerprint]
            slot = content.fingerprint >> self._shift
            if self._filter[slot] != _FULL:  # a full slot has lost count, and stays until the filter is made anew
                self._filter[slot] -= 1

    # -- searching -----------------------------------------------------------------------------------------------------

    def roll(self, tokens: NDArray[np.int32]) -> Rolled:
        """Hashes of a prompt, for `at` and `search`."""
        return self._roller.roll(tokens)

    def at(self, rolled: Rolled, tokens: bytes, start: int, stop: int) -> Content | None:
        """The content that is exactly this span of a prompt (`tokens`: its bytes)."""
        return self._verified(rolled, tokens, start, stop)

    def search(
        self, rolled: Rolled, tokens: bytes, gaps: list[tuple[int, int]], accept: Accept
    ) -> Iterator[tuple[int, Content]]:
        """Contents at any offset inside the gaps of a prompt, none overlapping: from the left, longest first."""
        if not self._lengths:
            return
        windows = rolled.windows(WINDOW)
        places = np.flatnonzero(self._filter[windows >> np.uint64(self._shift)])
        probes = MAX_PROBES
        gap = iter(gaps)
        free, end = next(gap, (0, 0))
        for place, fingerprint in zip(places.tolist(), windows[places].tolist(), strict=True):
            while place >= end and end:
                free, end = next(gap, (0, 0))
            if not end or probes <= 0:
                return
            lengths = self._lengths.get(fingerprint) if place >= free else None
            for length in sorted(lengths, reverse=True) if lengths else ():
                if place + length > end:
                    continue
                probes -= 1
                found = self._verified(rolled, tokens, place, place + length)
                if found is not None and accept(found, place):
                    yield place, found
                    free = place + length
                    break

    def _verified(self, rolled: Rolled, tokens: bytes, start: int, stop: int) -> Content | None:
        found = self._by_hash.get((stop - start, rolled.span(start, stop)))
        return found if found is not None and tokens[4 * start : 4 * stop] == found.tokens else None

    def _roll(self, tokens: bytes) -> Rolled:
        return self._roller.roll(np.frombuffer(tokens, dtype="<i4"))

    # -- filter --------------------------------------------------------------------------------------------------------

    def _make_filter(self, bits: int) -> None:
        self._shift = 64 - bits
        self._filter = np.zeros(1 << bits, dtype=np.uint8)
        for fingerprint in self._lengths:
            self._count(fingerprint)

    def _mark(self, fingerprint: int) -> None:
        if len(self._lengths) * _SLOTS_PER_ENTRY > len(self._filter):
            self._make_filter(64 - self._shift + 1)
        else:
            self._count(fingerprint)

    def _count(self, fingerprint: int) -> None:
        slot = fingerprint >> self._shift
        if self._filter[slot] != _FULL:
            self._filter[slot] += 1

    def check(self) -> str:
        """What is wrong with the table; empty if nothing is."""
        lengths: dict[int, dict[int, int]] = {}
        for content in self:
            if content.length >= WINDOW:
                mine = lengths.setdefault(content.fingerprint, {})
                mine[content.length] = mine.get(content.length, 0) + 1
        if lengths != self._lengths:
            return "the fingerprints are not those of the contents"
        for fingerprint in self._lengths:
            if not self._filter[fingerprint >> self._shift]:
                return "a fingerprint is missing in the filter"
        return ""
