"""Least hit density: evict what is least likely to be used again for the room and time it would go on taking.

After N. Beckmann, H. Chen, A. Cidon, "LHD: Improving Cache Hit Rate by Maximizing Hit Density" (NSDI 2018), with
classes made for prompts: how often a block was used, whether it is the end of a prompt, and whether it was computed
behind text that had been used before. A block need not be kept to the end of its life: its density is that of the
time for which it pays most to keep it, the index of J. C. Gittins, "Bandit Processes and Dynamic Allocation Indices"
(Journal of the Royal Statistical Society B 41, 1979). What became of blocks, also of those that were evicted, says for
each class and age how many uses are to come (`kvstore.eviction.fates`). Blocks that come back after a long while teach
it to wait, a flood of blocks that never come back teaches it to let go of new ones early. Of classes that taught it
nothing the oldest leaves, but for a sample that explores (`kvstore.eviction.explorers`).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from kvstore.eviction.base import EvictionPolicy, Item
from kvstore.eviction.explorers import NEVER, Explorers, level_of
from kvstore.eviction.fates import Fates
from kvstore.eviction.heaps import InOrder, Place
from kvstore.eviction.sampling import some

GHOSTS_PER_ITEM = 3
"""How many blocks that left are remembered for each that is held: the longest age at which a use can be counted."""
MAX_GHOSTS = 1 << 17
"""Beyond this only a sample is remembered, at about 200 bytes each; the statistics need no more."""
_LEVELS = 8
_LEVEL = tuple(0 if n < 1 else n - 1 if n < 4 else min(_LEVELS - 1, n.bit_length()) for n in range(1 << _LEVELS))
"""Level of a number of uses: each of the first three, then powers of two."""
_CLASSES = 3 * _LEVELS
_CLASS_BITS = _CLASSES.bit_length()
_END = tuple(3 * level + 2 for level in _LEVEL)
_INNER = tuple(3 * level for level in _LEVEL)
"""Class of a block by its number of uses: at the end of a prompt, and within one."""
_MOST = len(_LEVEL) - 1
_EXPLORES = -1
"""Ticket of an explorer: it has no place in a queue."""
_LEARN_EVERY = 1024
_LOOK_EVERY = 4
"""So many new blocks to one explorer that is looked at again: all of them in the time in which the room is filled."""
_CLEARLY = 1.25
"""By so much the latest block of a class must be worth less than the oldest to leave before it: less is chance. Where
more blocks are used in a circle than can be held, the oldest is the next to be used."""


class _Entry(Generic[Item]):
    """A block that is held: when it was last used (`stamp` also orders the blocks of one use), how often, its class,
    and the ticket of its place in the queue of that class; 0 if it has none, since a block behind it is held. While it
    is new also its level as an explorer, and the block that the first new one of its prompt stands behind (`stem`)."""

    __slots__ = ("behind", "children", "count", "group", "level", "parent", "parted", "stamp", "stem", "ticket", "time")

    def __init__(self, time: int, stamp: int, count: int, parent: Item | None, behind: bool, children: int) -> None:
        self.time = time
        self.stamp = stamp
        self.count = count
        self.parent = parent
        self.behind = behind
        self.children = children
        self.parted = children > 0
        self.group = 0
        self.ticket = 0
        self.level = NEVER
        self.stem: _Entry[Item] | None = None

    def classify(self) -> int:
        """Its class: the number of uses by powers of two, and what kind of place it has in prompts."""
        count = self.count
        if count > _MOST:
            count = _MOST
        if not self.parted:
            return _END[count]
        return 1 if count == 1 and self.behind else _INNER[count]


class LHD(EvictionPolicy[Item], Generic[Item]):
    """Evict the block with the fewest hits to come per block and time. Blocks with a child that is held never leave."""

    name = "lhd"

    def __init__(self) -> None:
        self._held: dict[Item, _Entry[Item]] = {}
        self._queues: list[list[Place[Item]]] = [[] for _ in range(_CLASSES)]
        self._latest: list[list[Place[Item]]] = [[] for _ in range(_CLASSES)]
        """The same places in the order in which they were given, the last of which may be worth least."""
        self._live = [0] * _CLASSES
        """Places of each queue that still count."""
        self._orphans: dict[Item, int] = {}
        """Blocks that are not held to how many are that were computed behind them."""
        self._ghosts: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        """Class, time of the last use and number of uses of blocks that were evicted, by hash."""
        self._stride = 1
        """One in so many evicted blocks is remembered, and counts for all of them."""
        self._faded = 0
        """Ghosts that were never used again."""
        self._fates = Fates(_CLASSES, below=3)
        self._explorers: Explorers[Item] = Explorers()
        self._clock = 0
        self._stamp = 0
        self._tickets = 0
        self._bare: tuple[Item, _Entry[Item]] | None = None
        """A block without children that has no place yet: the next call most often makes one unnecessary."""
        self._next = _LEARN_EVERY

    # -- the contract --------------------------------------------------------------------------------------------------

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        held = self._held
        self._clock = clock = self._clock + 1
        self._stamp = stamp = self._stamp + 1
        count = 1
        parent = None if parent == item else parent
        if self._ghosts and (ghost := self._ghosts.pop(hash(item), None)) is not None:
            group, time, uses = ghost
            self._fates.used(group, clock - time, self._stride)
            count += uses
        before = None if parent is None else held.get(parent)
        behind = before is not None and (before.behind or (before.count > 1 and before.parent is not None))
        children = self._orphans.pop(item, 0) if self._orphans else 0
        entry = _Entry(clock, stamp, count, parent, behind, children)
        entry.group = entry.classify()
        if count == 1 and not self._fates.proven[_END[1]]:
            self._draw(item, entry, before)
        if self._explorers.waiting and not stamp % _LOOK_EVERY:
            self._look_again()
        bare = self._bare
        if bare is not None and bare[1] is not before:
            self._place(*bare)
        held[item] = entry
        self._bare = None if children else (item, entry)
        if before is not None:
            if parent is not None and before.ticket:
                self._displace(parent, before)
            before.children += 1
            if not before.parted:
                before.parted = True
                before.group = before.classify()
        elif parent is not None:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        if clock >= self._next:
            self._learn()

    def touch(self, items: list[Item]) -> None:
        self._place_bare()
        held, used = self._held, self._fates.used
        self._clock = clock = self._clock + len(items)
        stamp = self._stamp
        for item in reversed(items):
            entry = held[item]
            used(entry.group, clock - entry.time)
            stamp += 1
            if entry.level != NEVER:
                self._forget_level(entry)
            entry.count = count = entry.count + 1
            entry.time = clock
            entry.stamp = stamp
            if entry.ticket:
                self._displace(item, entry)
            if entry.children:
                entry.group = _INNER[count] if count < _MOST else _INNER[_MOST]
            else:
                self._place(item, entry)
        self._stamp = stamp
        if clock >= self._next:
            self._learn()

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        entry = self._held.pop(item)
        if self._bare is not None and self._bare[1] is entry:
            self._bare = None
        if entry.level != NEVER:
            self._forget_level(entry)
        if entry.children:
            self._orphans[item] = entry.children
        elif entry.ticket:
            self._displace(item, entry)
            self._first(self._queues[entry.group])
        if evicted:
            self._remember(item, entry)
        if entry.parent is not None:
            self._part(entry.parent)

    def victims(self) -> Iterator[Item]:
        self._place_bare()
        held, clock, density = self._held, self._clock, self._fates.density
        freed: dict[Item, int] = {}
        walks: dict[int, Iterator[Place[Item]]] = {}
        backwards: set[int] = set()
        heads: list[tuple[float, float, int, Item]] = []
        for group, queue in enumerate(self._queues):
            if queue and (entry := self._first(queue)) is not None:
                stamp, _, item = queue[0]
                worth = density(group, clock - entry.time)
                latest = self._last(self._latest[group])
                newer = held[latest[2]]
                less = density(group, clock - newer.time)
                if _CLEARLY * less < worth:
                    backwards.add(group)
                    worth, stamp, item = less, newer.stamp, latest[2]
                heads.append((worth, stamp, group, item))
        if waiting := self._explorers.waiting:  # they leave last: what they are worth is not known
            walks[_CLASSES] = ((held[item].stamp, _EXPLORES, item) for item in waiting)
            stamp, _, item = next(walks[_CLASSES])
            heads.append((math.inf, stamp, _CLASSES, item))
        heapq.heapify(heads)
        while heads:
            _, _, group, item = heapq.heappop(heads)
            yield item
            parent = held[item].parent
            before = None if parent is None else held.get(parent)
            if parent is not None and before is not None:
                freed[parent] = freed.get(parent, 0) + 1
                if freed[parent] == before.children:  # its last child would be gone: it could leave next
                    heapq.heappush(heads, (density(before.group, clock - before.time), before.stamp, -1, parent))
            if group >= 0:
                if group not in walks:
                    back = group in backwards
                    walks[group] = reversed(self._latest[group]) if back else InOrder(self._queues[group])
                    next(walks[group])
                for place in walks[group]:
                    entry = held.get(place[2])
                    if entry is not None and entry.ticket == place[1]:
                        worth = math.inf if group == _CLASSES else density(group, clock - entry.time)
                        heapq.heappush(heads, (worth, place[0], group, place[2]))
                        break
        # What is left are blocks whose headers name each other as parents, and those before them: no client needs them.
        yield from (item for item, entry in held.items() if entry.children > freed.get(item, 0))

    def __len__(self) -> int:
        return len(self._held)

    # -- order ---------------------------------------------------------------------------------------------------------

    def _place_bare(self) -> None:
        if self._bare is not None:
            (item, entry), self._bare = self._bare, None
            self._place(item, entry)

    def _part(self, parent: Item) -> None:
        """Note that a block behind this one is gone."""
        before = self._held.get(parent)
        if before is not None:
            before.children -= 1
            if not before.children:
                self._place_bare()
                self._bare = parent, before
        elif self._orphans[parent] > 1:
            self._orphans[parent] -= 1
        else:
            del self._orphans[parent]

    def _place(self, item: Item, entry: _Entry[Item]) -> None:
        """Put a block without children into the queue of its class, or among the explorers."""
        entry.group = group = entry.classify()
        if self._explores(entry):
            self._explorers.waiting[item] = None
            entry.ticket = _EXPLORES
            return
        queue = self._queues[group]
        self._tickets = entry.ticket = self._tickets + 1
        place = entry.stamp, entry.ticket, item
        heapq.heappush(queue, place)
        latest = self._latest[group]
        latest.append(place)
        self._live[group] += 1
        if len(queue) > 2 * self._live[group] + 64:
            queue[:] = self._counting(queue)
            heapq.heapify(queue)
        if len(latest) > 2 * self._live[group] + 64:
            latest[:] = self._counting(latest)

    def _counting(self, places: list[Place[Item]]) -> list[Place[Item]]:
        """Those that still count."""
        held = self._held
        return [p for p in places if (seen := held.get(p[2])) is not None and seen.ticket == p[1]]

    def _displace(self, item: Item, entry: _Entry[Item]) -> None:
        """Take away its place; what stands in the queue, with a ticket of before, does not count any more."""
        if entry.ticket == _EXPLORES:
            del self._explorers.waiting[item]
        else:
            self._live[entry.group] -= 1
        entry.ticket = 0

    def _first(self, queue: list[Place[Item]]) -> _Entry[Item] | None:
        """The block whose place is first, once places in front of it that do not count any more are gone."""
        held = self._held
        while queue:
            _, ticket, item = queue[0]
            entry = held.get(item)
            if entry is not None and entry.ticket == ticket:
                return entry
            heapq.heappop(queue)
        return None

    def _last(self, places: list[Place[Item]]) -> Place[Item]:
        """The last place, once those behind it that do not count any more are gone. There is one that counts."""
        held = self._held
        while (entry := held.get(places[-1][2])) is None or entry.ticket != places[-1][1]:
            places.pop()
        return places[-1]

    # -- explorers -----------------------------------------------------------------------------------------------------

    def _draw(self, item: Item, entry: _Entry[Item], before: _Entry[Item] | None) -> None:
        """Give a new block its level: that of the block before it, if that is new, too."""
        if before is not None and before.count == 1:
            entry.level, entry.stem = before.level, before.stem
        elif before is None or not self._fates.proven[_INNER[1]]:
            entry.level, entry.stem = level_of(item), before
        if entry.level != NEVER:
            self._explorers.add(entry.level)

    def _forget_level(self, entry: _Entry[Item]) -> None:
        """Note that a block leaves, or was used again and explores no more."""
        self._explorers.discard(entry.level)
        entry.level, entry.stem = NEVER, None

    def _explores(self, entry: _Entry[Item]) -> bool:
        """Whether a block without children is an explorer. What is known to be of use, or not to be, is none; and what
        stands before it must not stay for its sake alone."""
        if entry.level < self._explorers.level or self._fates.proven[entry.group]:
            return False
        stem, before = entry.stem, None if entry.parent is None else self._held.get(entry.parent)
        if before is not None and before is not stem and self._fates.proven[before.group]:
            return False
        if stem is not None and self._clock - stem.time > len(self._held):
            return False
        return self._clock - entry.time < self._fates.reach

    def _look_again(self) -> None:
        """Let an explorer be one further, or give it its place."""
        item = next(iter(self._explorers.waiting))
        entry = self._held[item]
        if self._explores(entry):
            self._explorers.waiting.move_to_end(item)
        else:
            del self._explorers.waiting[item]
            self._place(item, entry)

    # -- learning ------------------------------------------------------------------------------------------------------

    def _remember(self, item: Item, entry: _Entry[Item]) -> None:
        mark, ghosts, stride = hash(item), self._ghosts, self._stride
        if mark % stride:
            return
        ghosts[mark] = (entry.group, entry.time, entry.count)
        most = max(64, GHOSTS_PER_ITEM * len(self._held) // stride)
        while len(ghosts) > most:
            _, (group, time, _) = ghosts.popitem(last=False)
            self._fates.faded(group, self._clock - time, stride)
            self._faded += stride
        if len(ghosts) > MAX_GHOSTS:
            self._stride *= 2
            self._ghosts = OrderedDict((m, ghost) for m, ghost in ghosts.items() if not m % self._stride)

    def _learn(self) -> None:
        """Make the estimates anew.

        Until as many ghosts have faded as blocks are held, what was counted so far says too little of blocks that are
        not used again: those whose fate is open are counted too, each at its age.
        """
        self._fates.scale(len(self._held))
        self._explorers.widen()
        clock = self._clock
        if self._faded > len(self._held):
            self._fates.learn()
            self._next = clock + _LEARN_EVERY
            return
        self._fates.learn(self._still_open())
        self._next = clock + max(_LEARN_EVERY, (len(self._held) + len(self._ghosts)) // 4)

    def _still_open(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Class, age and weight of the blocks that are held or remembered; of very many, those in some runs of them."""
        held, held_by = some(self._held.values())
        left, left_by = some(self._ghosts.values())
        stamps = [
            np.fromiter((entry.time << _CLASS_BITS | entry.group for entry in held), np.int64),
            np.fromiter((time << _CLASS_BITS | group for group, time, _ in left), np.int64),
        ]
        weights = np.repeat((held_by, left_by * self._stride), [len(each) for each in stamps])
        both = np.concatenate(stamps)
        return both & (1 << _CLASS_BITS) - 1, self._clock - (both >> _CLASS_BITS), weights
