"""How much of what is wanted was wanted before, and how large a store would have kept it: sampled reuse distances.

A block is wanted when it is handed out, or when an engine offers it because it had to compute it. Its reuse distance is
the bytes of all distinct blocks wanted since it was wanted last, its own included: a store of that size that forgets
the least recently used would still have had it. From the distances follow the hit rate of any size, and the ceiling:
what a store without bounds would have served.

Only keys below a threshold are looked at. Keys are digests, so that is a fair sample of blocks, and a distance among
the sampled ones, divided by the share that is sampled, estimates the true one (SHARDS: Waldspurger et al., "Efficient
MRC Construction with SHARDS", FAST 2015). The threshold falls as soon as there are too many, so memory and time are
bounded. Accesses are gathered and worked off by the second; repeats within one are taken as that second's distance.
That is done in steps, between which others may have their turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

MAX_KEYS = 8192
MAX_A_TICK = 1024
"""Distinct keys worked off at once; each takes a few microseconds."""
STEP = 32
"""Of these so many before others have their turn: tenths of a millisecond."""
MAX_PENDING = 65_536
_SPACE = 1 << 64
_STEPS = 4
"""Buckets of distances for each doubling."""


class ByteSums:
    """Bytes at numbered places, and their sum after any place, in logarithmic time (Fenwick 1994)."""

    def __init__(self, length: int) -> None:
        self._tree = [0] * (length + 1)
        self.length = length
        self.total = 0

    def fill(self, values: Sequence[int]) -> None:
        """Have bytes at the first places, and nowhere else, in linear time."""
        tree = self._tree = [0, *values, *[0] * (self.length - len(values))]
        for at in range(1, self.length + 1):
            above = at + (at & -at)
            if above <= self.length:
                tree[above] += tree[at]
        self.total = sum(values)

    def add(self, place: int, nbytes: int) -> None:
        """Add bytes at a place, counted from 0."""
        self.total += nbytes
        tree, at = self._tree, place + 1
        while at <= self.length:
            tree[at] += nbytes
            at += at & -at

    def after(self, place: int) -> int:
        """Bytes at all later places."""
        tree, at, before = self._tree, place + 1, 0
        while at > 0:
            before += tree[at]
            at -= at & -at
        return self.total - before


class ReuseSampler:
    """Estimates of reuse from a sample of the blocks wanted.

    Parameters
    ----------
    max_keys : int
        Sampled blocks that are remembered.
    max_a_tick : int
        Distinct sampled blocks that are worked off in one `tick`.

    Attributes
    ----------
    wanted : int
        Blocks wanted; exact.
    reusable : float
        Estimate of how many of them had been wanted before.
    """

    def __init__(self, max_keys: int = MAX_KEYS, max_a_tick: int = MAX_A_TICK) -> None:
        self._max_keys = max_keys
        self._max_a_tick = max_a_tick
        self._below = _SPACE
        self._limit = b"\xff" * 33
        self._pending: list[tuple[bytes, int]] = []
        self._under_way = 0
        """Accesses that are being worked off."""
        self._last: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Place and bytes of each sampled key, least recently wanted first."""
        self._sums = ByteSums(2 * max_keys)
        self._next = 0
        self._histogram: defaultdict[int, float] = defaultdict(float)
        self._weighed = 0.0
        self.wanted = 0
        self.reusable = 0.0

    @property
    def share(self) -> float:
        """The share of all keys that is sampled."""
        return self._below / _SPACE

    def __len__(self) -> int:
        return len(self._last)

    def note(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Blocks are wanted: key and bytes of each."""
        self.wanted += len(blocks)
        limit = self._limit
        self._pending += [block for block in blocks if block[0] < limit]
        if len(self._pending) >= MAX_PENDING:
            self.tick()

    def tick(self) -> None:
        """Work off what was noted since the last time."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """As `tick`, step by step; more may be noted in between."""
        seen = Counter(self._pending)
        self._pending.clear()
        while len(seen) > self._max_a_tick:
            self._lower()
            seen = Counter({block: times for block, times in seen.items() if block[0] < self._limit})
        near = sum(nbytes for _, nbytes in seen)
        self._under_way += seen.total()
        for number, ((key, nbytes), times) in enumerate(seen.items(), 1):
            self._under_way -= times
            if key < self._limit:  # it may have been lowered meanwhile
                self._access(key, nbytes)
                if times > 1:
                    self._count(near, times - 1)
            if not number % STEP:
                yield
        while len(self._last) > self._max_keys:
            self._lower()

    def _access(self, key: bytes, nbytes: int) -> None:
        if self._next == self._sums.length:
            self._renumber()
        known = self._last.get(key)
        if known is None:
            self._weighed += 1 / self.share
        else:
            place, old = known
            self._count(self._sums.after(place) + nbytes)
            self._sums.add(place, -old)
        self._sums.add(self._next, nbytes)
        self._last[key] = (self._next, nbytes)
        self._last.move_to_end(key)
        self._next += 1
        if len(self._last) == self._sums.length:  # more than twice what is kept: not even a tick may overfill it
            self._lower()

    def _count(self, distance: int, times: int = 1) -> None:
        weight = times / self.share
        self._weighed += weight
        self.reusable += weight
        self._histogram[_bucket(int(distance / self.share))] += weight

    def _renumber(self) -> None:
        """Put the keys on places from 0 again, in their order."""
        for place, (key, (_, nbytes)) in enumerate(self._last.items()):
            self._last[key] = (place, nbytes)
        self._next = len(self._last)
        self._sums.fill([nbytes for _, nbytes in self._last.values()])

    def _lower(self) -> None:
        """Sample half as many keys from now on, and forget the others."""
        self._below //= 2
        self._limit = self._below.to_bytes(8, "big")
        limit = self._limit
        self._last = OrderedDict((key, known) for key, known in self._last.items() if key < limit)
        self._renumber()

    def curve(self, sizes: Iterable[int]) -> list[float]:
        """Hit rates of stores of these sizes in bytes that forget the least recently used; 0 while nothing was wanted.

        What the sample has too much or too little of, as it happens with a few hot blocks, is put at distance zero,
        as SHARDS does.
        """
        if self.wanted <= 0:
            return [0.0 for _ in sizes]
        missing = self.wanted - (len(self._pending) + self._under_way) / self.share - self._weighed
        buckets = sorted(self._histogram)
        below = [0.0, *accumulate(self._histogram[bucket] for bucket in buckets)]
        rates: list[float] = []
        for size in sizes:
            last = _bucket(size)
            hits = max(0.0, missing) + below[bisect_left(buckets, last)]
            hits += self._histogram.get(last, 0.0) * _part(last, size)
            rates.append(min(1.0, max(0.0, hits / max(self.wanted, self._weighed))))
        return rates

    def ceiling(self) -> float:
        """The hit rate of a store without bounds."""
        return self.curve([_SPACE])[0]


def _bucket(distance: int) -> int:
    """Bucket of a distance in bytes: `_STEPS` for each doubling."""
    bits = max(0, distance.bit_length() - 1)
    shift = max(0, bits - 2)
    return _STEPS * bits + ((distance >> shift) & (_STEPS - 1) if bits >= 2 else 0)


def _part(bucket: int, size: int) -> float:
    """How far into its bucket a size lies."""
    bits, step = divmod(bucket, _STEPS)
    low = (1 << bits) + step * (1 << bits) // _STEPS
    return min(1.0, max(0.0, (size - low) / max(1, (1 << bits) // _STEPS)))
