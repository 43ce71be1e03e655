"""Least hit density: evict what is least likely to be used again for the room and time it would go on taking.

After N. Beckmann, H. Chen, A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density" (NSDI 2018), with
classes made for prompts: how often a block was used, whether it is the end of a prompt, and whether it was computed
behind text that had been used before. For each class and age the policy counts what became of blocks, also of those it
evicted (its ghosts), and from that estimates hits to come per block and time. Blocks that come back after a long while
teach it to wait, a flood of blocks that never come back teaches it to let go of new ones early.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic

from kvstore.eviction.base import EvictionPolicy, Item
from kvstore.eviction.heaps import InOrder, Place

GHOSTS_PER_ITEM = 3
"""How many blocks that left are remembered for each that is held: the longest age at which a use can be counted."""
MAX_GHOSTS = 1 << 17
"""Beyond this only a sample is remembered, at about 200 bytes each; the statistics need no more."""

_AGES = 24
_COUNTS = 8
_CLASSES = 3 * _COUNTS
_LEARN_EVERY = 1024
_FORGET = 0.995
"""What has been counted is aged by this each time the estimates are made anew: half of it is 138 times old."""
_ENOUGH = 20.0
"""Uses and departures that a class must have seen; those with fewer take the mean of the others."""


class _Entry(Generic[Item]):
    """A block that is held: when it was last used (`stamp` also orders the blocks of one use), how often, and where it
    stands: the class of its queue, and the ticket that its place there carries."""

    __slots__ = ("behind", "children", "count", "group", "parent", "parted", "stamp", "ticket", "time")

    def __init__(self, time: int, stamp: int, count: int, parent: Item | None, behind: bool) -> None:
        self.time = time
        self.stamp = stamp
        self.count = count
        self.parent = parent
        self.behind = behind
        self.children = 0
        self.parted = False
        self.group = 0
        self.ticket = 0

    def classify(self) -> int:
        """Its class: the number of uses by powers of two, and what kind of place it has in prompts."""
        count = self.count
        level = count - 1 if count < 4 else min(_COUNTS - 1, count.bit_length())
        if not self.parted:
            return 3 * level + 2
        return 3 * level + (1 if count == 1 and self.behind else 0)


class LHD(EvictionPolicy[Item], Generic[Item]):
    """Evict the block with the fewest hits to come per block and time. Blocks with a child that is held never leave."""

    name = "lhd"

    def __init__(self) -> None:
        self._held: dict[Item, _Entry[Item]] = {}
        self._queues: list[list[Place[Item]]] = [[] for _ in range(_CLASSES)]
        self._live = [0] * _CLASSES
        self._orphans: dict[Item, int] = {}
        """Blocks that are not held to how many are that were computed behind them."""
        self._ghosts: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        self._clock = 0
        self._stamp = 0
        self._tickets = 0
        self._fresh: tuple[Item, _Entry[Item]] | None = None
        self._next = _LEARN_EVERY
        self._unit = 1
        self._hits = [[0.0] * _AGES for _ in range(_CLASSES)]
        self._ends = [[0.0] * _AGES for _ in range(_CLASSES)]
        self._density = [[float(_AGES - age) for age in range(_AGES)] for _ in range(_CLASSES)]

    # -- the contract --------------------------------------------------------------------------------------------------

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._clock += 1
        self._stamp += 1
        ghost = self._ghosts.pop(hash(item), None) if self._ghosts else None
        count = 1
        if ghost is not None:
            group, time, count = ghost
            self._hits[group][self._age(self._clock - time)] += 1
            count += 1
        before = None if parent is None else self._held.get(parent)
        behind = before is not None and (before.behind or (before.count > 1 and before.parent is not None))
        entry = _Entry(self._clock, self._stamp, count, parent, behind)
        entry.children = self._orphans.pop(item, 0) if self._orphans else 0
        entry.parted = entry.children > 0
        entry.group = entry.classify()
        if self._fresh is not None and self._fresh[1] is not before:
            self._queue_fresh()
        self._held[item] = entry
        self._fresh = (item, entry)
        if before is not None:
            if not before.children and before.ticket:
                self._live[before.group] -= 1
            before.children += 1
            if not before.parted:
                before.parted = True
                before.group = before.classify()
        elif parent is not None:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        if self._clock >= self._next:
            self._learn()

    def touch(self, items: list[Item]) -> None:
        self._queue_fresh()
        held, hits = self._held, self._hits
        self._clock += len(items)
        clock, stamp, time, age = self._clock, self._stamp, -1, 0
        for item in reversed(items):
            entry = held[item]
            stamp += 1
            if entry.time != time:  # most blocks of a prompt were last used together
                time = entry.time
                age = self._age(clock - time)
            hits[entry.group][age] += 1
            entry.count += 1
            entry.time = clock
            entry.stamp = stamp
            if entry.children:
                entry.group = entry.classify()
            else:
                self._live[entry.group] -= 1
                self._offer(item, entry)
        self._stamp = stamp
        if clock >= self._next:
            self._learn()

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        self._queue_fresh()
        entry = self._held.pop(item)
        if entry.children:
            self._orphans[item] = entry.children
        else:
            self._live[entry.group] -= 1
            self._trim(entry.group)
        if evicted:
            self._remember(item, entry)
        if entry.parent is not None:
            self._part(entry.parent)

    def victims(self) -> Iterator[Item]:
        self._queue_fresh()
        freed: dict[Item, int] = {}
        walks = {group: InOrder(queue) for group, queue in enumerate(self._queues) if queue}
        heads: list[tuple[float, float, int, Item]] = []
        for group, walk in walks.items():
            self._head(group, walk, freed, heads)
        while heads:
            _, _, group, item = heapq.heappop(heads)
            yield item
            parent = self._held[item].parent
            before = None if parent is None else self._held.get(parent)
            if parent is not None and before is not None:
                freed[parent] = freed.get(parent, 0) + 1
                if freed[parent] == before.children:  # its last child would be gone: it could leave next
                    density = self._density[before.group][self._age(self._clock - before.time)]
                    heapq.heappush(heads, (density, before.stamp, -1, parent))
            if group >= 0:
                self._head(group, walks[group], freed, heads)

    def __len__(self) -> int:
        return len(self._held)

    # -- order ---------------------------------------------------------------------------------------------------------

    def _queue_fresh(self) -> None:
        """Queue the block that was inserted last. While a prompt is stored each is the parent of the next, and may not
        leave: only the last of them needs a place."""
        if self._fresh is not None:
            (item, entry), self._fresh = self._fresh, None
            if not entry.children:
                self._offer(item, entry)

    def _part(self, parent: Item) -> None:
        """Note that a block behind this one is gone."""
        before = self._held.get(parent)
        if before is not None:
            before.children -= 1
            if not before.children:
                self._offer(parent, before)
        elif self._orphans[parent] > 1:
            self._orphans[parent] -= 1
        else:
            del self._orphans[parent]

    def _offer(self, item: Item, entry: _Entry[Item]) -> None:
        """Put a block without children into the queue of its class."""
        entry.group = group = entry.classify()
        queue = self._queues[group]
        self._tickets += 1
        entry.ticket = self._tickets
        heapq.heappush(queue, (entry.stamp, entry.ticket, item))
        self._live[group] += 1
        if len(queue) > 2 * self._live[group] + 64:
            queue[:] = filter(self._valid, queue)
            heapq.heapify(queue)

    def _valid(self, place: Place[Item]) -> bool:
        """Whether a place in a queue still counts: its block may have been used, extended or removed since."""
        _, ticket, item = place
        entry = self._held.get(item)
        return entry is not None and entry.ticket == ticket and not entry.children

    def _trim(self, group: int) -> None:
        queue = self._queues[group]
        while queue and not self._valid(queue[0]):
            heapq.heappop(queue)

    def _head(
        self,
        group: int,
        walk: InOrder[Item],
        freed: dict[Item, int],
        heads: list[tuple[float, float, int, Item]],
    ) -> None:
        """Add the next block of a class to those that are compared."""
        for place in walk:
            if self._valid(place):
                stamp, _, item = place
                density = self._density[group][self._age(self._clock - self._held[item].time)]
                heapq.heappush(heads, (density, stamp, group, item))
                return

    # -- learning ------------------------------------------------------------------------------------------------------

    def _age(self, age: int) -> int:
        """Bucket of an age: 4 even ones, then two for each doubling."""
        units = age // self._unit
        if units < 4:
            return units
        bits = units.bit_length()
        return min(_AGES - 1, 2 * bits + (units >> (bits - 2) & 1) - 2)

    def _width(self, bucket: int) -> int:
        """Uses between the ends of a bucket."""
        return self._unit * (1 if bucket < 4 else 1 << (bucket // 2 - 1))

    def _remember(self, item: Item, entry: _Entry[Item]) -> None:
        stride = 1 + GHOSTS_PER_ITEM * len(self._held) // MAX_GHOSTS
        mark = hash(item)
        if mark % stride:
            return
        self._ghosts[mark] = (entry.group, entry.time, entry.count)
        while len(self._ghosts) > max(64, GHOSTS_PER_ITEM * len(self._held) // stride):
            _, (group, time, _) = self._ghosts.popitem(last=False)
            self._ends[group][self._age(self._clock - time)] += 1

    def _learn(self) -> None:
        """Make the estimates anew from what was counted, and age the counts."""
        self._next = self._clock + _LEARN_EVERY
        known: list[list[float]] = []
        unknown: list[int] = []
        for group in range(_CLASSES):
            if (density := self._estimate(self._hits[group], self._ends[group])) is None:
                unknown.append(group)
            else:
                self._density[group] = density
                known.append(density)
        if known:
            mean = [sum(column) / len(known) for column in zip(*known, strict=True)]
            for group in unknown:
                self._density[group] = mean
        for counts in (*self._hits, *self._ends):
            for bucket, count in enumerate(counts):
                counts[bucket] = count * _FORGET
        unit = max(1, len(self._held) // 64)
        if not self._unit <= unit < 2 * self._unit:
            self._rescale(unit)

    def _estimate(self, hits: list[float], ends: list[float]) -> list[float] | None:
        """Hits to come per block and use, for each age; None where too little was seen."""
        density = [0.0] * _AGES
        to_come = room = left = 0.0
        for bucket in range(_AGES - 1, -1, -1):
            here, width = hits[bucket] + ends[bucket], self._width(bucket)
            room += (0.5 * here + left) * width
            left += here
            to_come += hits[bucket]
            density[bucket] = (to_come + 0.02) / (room + 0.5 * self._unit + 1) if left else 0.0
        return density if left >= _ENOUGH else None

    def _rescale(self, unit: int) -> None:
        """Another unit of age: counts move to the bucket that now holds the middle of theirs."""
        middles: list[int] = []
        start = 0
        for bucket in range(_AGES):
            middles.append(start + self._width(bucket) // 2)
            start += self._width(bucket)
        self._unit = unit
        for table in (self._hits, self._ends):
            for group, counts in enumerate(table):
                moved = [0.0] * _AGES
                for middle, count in zip(middles, counts, strict=True):
                    moved[self._age(middle)] += count
                table[group] = moved
