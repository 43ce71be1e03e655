"""What became of blocks, by class and age, and what that says of the uses to come.

A block's life begins with a use and ends with the next one, or fades: it was not used again while it was remembered.
From lives that ended, and from those that are still open, follows for each class and age the chance of a use, the room
and time a block takes until then, and up to when it pays most to keep it. An age is a number of uses of any blocks;
buckets of ages are relative to how many blocks are held.
"""

from __future__ import annotations

from itertools import accumulate
from operator import add, mul

import numpy as np
from numpy.typing import NDArray

_AGES = 24
OLDEST = _AGES - 1
"""The bucket of all ages beyond those that are told apart."""
_BUCKETS_HELD = 64
"""Parts of the time in which as many blocks are used as are held; a part is the width of the first buckets."""
_FORGET = 0.995
"""What has been counted is aged by this each time the estimates are made anew: half of it is 138 times old."""
_FALL = 4
"""How steeply what is to come is believed to fall behind the oldest age at which a block was used: by this power."""
_ENOUGH = 20.0
"""Lives that a class must have seen, and so many it is lent by the class below: what was used eight times is believed
to go on like what was used four times, until it shows otherwise. With fewer and none below it takes the mean."""
_RARE = 0.001
"""Uses among the lives of a class, or of an age among its uses: fewer are chance and prove nothing."""

_WIDTHS = tuple(1 if bucket < 4 else 1 << (bucket // 2 - 1) for bucket in range(_AGES))
"""Units between the ends of each bucket: 4 even ones, then two for each doubling."""
_STARTS = np.cumsum((0, *_WIDTHS[:-1]))
"""Units at which each bucket begins."""
FAR = int(_STARTS[-1])
BUCKET = tuple(bucket for bucket in range(OLDEST) for _ in range(_WIDTHS[bucket]))
"""Bucket of each number of units below `FAR`; from there on it is `OLDEST`."""
_NONE = [0.0] * _AGES
_MIDDLES = tuple(sum(_WIDTHS[:bucket]) + _WIDTHS[bucket] // 2 for bucket in range(_AGES))
_FALLEN = [[((here + 1) / (there + 1)) ** _FALL for there in _MIDDLES] for here in _MIDDLES]
"""What is left at a bucket of what is believed at another."""


class Fates:
    """Counts of ended lives, and the hits to come per block and use of any block that they say.

    Parameters
    ----------
    classes : int
        How many classes there are.
    below : int, optional
        The class below a class is that of so much lower a number, if there is one. Without it none has one.
    """

    def __init__(self, classes: int, below: int | None = None) -> None:
        self._below = classes if below is None else below
        self.proven = [False] * classes
        """Whether blocks of a class are known to be used again. If not, all its ages are worth the same."""
        self.unit = 1
        """Width of the first buckets, in uses."""
        self._uses = [[0.0] * _AGES for _ in range(classes)]
        self._ends = [[0.0] * _AGES for _ in range(classes)]
        self.densities = [[float(_AGES - age) for age in range(_AGES)] for _ in range(classes)]
        """Until something is known, what was used longest ago is worth least."""

    def _age(self, age: int) -> int:
        units = age // self.unit
        return BUCKET[units] if units < FAR else OLDEST

    def used(self, group: int, age: int, weight: int = 1) -> None:
        """Count a block of a class that was used at this age."""
        units = age // self.unit
        self._uses[group][BUCKET[units] if units < FAR else OLDEST] += weight

    def faded(self, group: int, age: int, weight: int = 1) -> None:
        """Count a block of a class that had not been used until this age, and is now forgotten."""
        units = age // self.unit
        self._ends[group][BUCKET[units] if units < FAR else OLDEST] += weight

    def density(self, group: int, age: int) -> float:
        """Hits to come per block and use, of a block of a class that has this age."""
        units = age // self.unit
        return self.densities[group][BUCKET[units] if units < FAR else OLDEST]

    @property
    def reach(self) -> int:
        """An age in the midst of those that are all one to the estimates: nothing is learnt from waiting longer."""
        return 4 * FAR * self.unit

    def scale(self, held: int) -> None:
        """Fit the buckets to how many blocks are held; counts move to the bucket that now has the middle of theirs."""
        unit = max(1, held // _BUCKETS_HELD)
        if self.unit <= unit < 2 * self.unit:
            return
        middles = [middle * self.unit for middle in _MIDDLES]
        self.unit = unit
        for table in (self._uses, self._ends):
            for group, counts in enumerate(table):
                moved = [0.0] * _AGES
                for middle, count in zip(middles, counts, strict=True):
                    moved[self._age(middle)] += count
                table[group] = moved

    def learn(self, still_open: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None) -> None:
        """Make the estimates anew, and age the counts.

        Parameters
        ----------
        still_open : (classes, ages, weights), optional
            Lives that have not ended, three arrays of one length. With them nothing is aged: too little was seen yet.
        """
        tally = self._tally(*still_open) if still_open else [_NONE] * len(self._uses)
        telling = self._telling() if still_open else _NONE
        known: list[list[float]] = []
        unknown: list[int] = []
        lent: dict[int, tuple[list[float], list[float]]] = {}
        """Uses and ends of `_ENOUGH` lives, by the class they were seen in."""
        for group, (uses, ends, unended) in enumerate(zip(self._uses, self._ends, tally, strict=True)):
            seen, lives = sum(uses), sum(uses) + sum(ends)
            self.proven[group] = seen > max(0.5, _RARE * (lives + sum(unended)))
            below = lent.get(group - self._below)
            if below is not None and not lives and not any(unended):
                lent[group], self.densities[group] = below, self.densities[group - self._below]
                continue
            if below is not None:
                uses, ends = ([*map(add, *pair)] for pair in zip((uses, ends), below, strict=True))
                lives += _ENOUGH
            elif lives + sum(map(mul, unended, telling)) < _ENOUGH:
                unknown.append(group)
                continue
            found = self._estimate(uses, ends, unended)
            if below is None and not self.proven[group]:
                found = [*accumulate(found, min)]
            if lives:
                share = _ENOUGH / lives
                lent[group] = [share * n for n in uses], [share * n for n in ends]
            self.densities[group] = found
            known.append(found)
        if known:
            mean = [sum(column) / len(known) for column in zip(*known, strict=True)]
            for group in unknown:
                self.densities[group] = mean
        if still_open is None:
            for counts in (*self._uses, *self._ends):
                if any(counts):
                    counts[:] = [count * _FORGET for count in counts]

    def _telling(self) -> list[float]:
        """What a life that is still open tells: by its age, so many of those that end with a use would have ended."""
        pooled = [sum(column) for column in zip(*self._uses, strict=True)]
        total = sum(pooled)
        return [share / total for share in accumulate(pooled)] if total else [1.0] * _AGES

    def _tally(
        self, groups: NDArray[np.int64], ages: NDArray[np.int64], weights: NDArray[np.int64]
    ) -> list[list[float]]:
        """Sum of the weights by class and bucket."""
        buckets = np.searchsorted(_STARTS, ages // self.unit, side="right") - 1
        classes = len(self._uses)
        counts = np.bincount(groups * _AGES + buckets, weights, classes * _AGES)
        return [[*map(float, row)] for row in counts.reshape(classes, _AGES)]

    def _estimate(self, uses: list[float], ends: list[float], unended: list[float]) -> list[float]:
        """Hits to come per block and use, for each age, over the time for which it pays most to keep a block of it.

        From the oldest age down: of those that reached a bucket some were used in it, some faded, some are in it now
        and stand for half a bucket, and the others went on to the next. A block is kept into the buckets behind its own
        as long as that raises the uses found per room taken. An age at which none was used yet says that a use takes
        longer, not that none will come: when a flood begins, all blocks get older between two uses. But the older, the
        less is believed of it.
        """
        density = [0.0] * _AGES
        oldest = latest = -1
        chance = _RARE * sum(uses)
        reached = 0.0
        later: list[tuple[float, float]] = []
        """Hits and room of the times behind this bucket, for each block that reaches it: the nearest last, which is the
        densest of them."""
        for bucket in range(_AGES - 1, -1, -1):
            reached += uses[bucket] + ends[bucket] + unended[bucket]
            if not reached:
                continue
            oldest = max(oldest, bucket)
            if latest < 0 and uses[bucket] > chance:
                latest = bucket
            at_risk = reached - 0.5 * unended[bucket]
            hits, gone = uses[bucket] / at_risk, (uses[bucket] + ends[bucket]) / at_risk
            room = _WIDTHS[bucket] * (1.0 - 0.5 * gone)
            stay = 1.0 - gone
            later = [(found * stay, taken * stay) for found, taken in later]
            while later and later[-1][0] * room >= hits * later[-1][1]:
                found, taken = later.pop()
                hits += found
                room += taken
            later.append((hits, room))
            density[bucket] = (hits * reached + 0.02) / ((room * reached + 0.5) * self.unit + 1.0)
        last = oldest if latest < 0 else latest
        for bucket in range(last + 1, _AGES if last >= 0 else 0):
            far = density[last] * _FALLEN[last][bucket]
            density[bucket] = far if bucket > oldest else min(far, density[bucket])
        return density
