"""Hashes of every window of a token sequence at once, and of any other span of it in constant time.

A span's hash is a polynomial in its tokens, modulo 2**64: with the running sums ``P[i]`` of ``m(t) * B**i`` it is
``(P[stop] - P[start]) * B**-start``, since an odd base has an inverse. It only proposes; token ids decide.
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mixed(values: Hashes) -> Hashes:
    """Every bit of the result depends on every bit of the value (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def _mixed_one(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


class Roller:
    """Base and seed of one process; random, so that nobody can prepare tokens that collide.

    Parameters
    ----------
    seed : int, optional
        For tests that want the same hashes again.
    """

    def __init__(self, seed: int | None = None) -> None:
        seed = secrets.randbits(64) if seed is None else seed
        self._salt = np.uint64(_mixed_one(seed & _MASK))
        self._base = _mixed_one((seed + 1) & _MASK) | 1
        self._inverse = pow(self._base, -1, 1 << 64)
        self._powers = np.ones(1, dtype=np.uint64)
        self._inverses = np.ones(1, dtype=np.uint64)

    def roll(self, tokens: NDArray[np.int32]) -> Rolled:
        """Take in a sequence of n tokens: O(n) once."""
        self._grow(len(tokens) + 1)
        sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
        terms = _mixed(tokens.astype(np.uint64) ^ self._salt) * self._powers[: len(tokens)]
        np.cumsum(terms, out=sums[1:])
        return Rolled(sums, self._inverses)

    def _grow(self, count: int) -> None:
        """Powers of the base and of its inverse, doubled until there are enough."""
        while len(self._powers) < count:
            step = len(self._powers)
            for name, base in (("_powers", self._base), ("_inverses", self._inverse)):
                known = getattr(self, name)
                setattr(self, name, np.concatenate([known, known * np.uint64(pow(base, step, 1 << 64))]))


class Rolled:
    """The running sums of one sequence."""

    def __init__(self, sums: Hashes, inverses: Hashes) -> None:
        self._sums = sums
        self._inverses = inverses

    def windows(self, width: int) -> Hashes:
        """Hash of each window of `width` tokens ``[n - width + 1]``; empty if the sequence is shorter."""
        count = len(self._sums) - width
        if count <= 0:
            return np.empty(0, dtype=np.uint64)
        return _mixed((self._sums[width:] - self._sums[:count]) * self._inverses[:count])

    def span(self, start: int, stop: int) -> int:
        """Hash of one span."""
        difference = (int(self._sums[stop]) - int(self._sums[start])) & _MASK
        return _mixed_one((difference * int(self._inverses[start])) & _MASK)
