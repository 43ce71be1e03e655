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
from kvstore.eviction.entries import BEHIND, BELOW, CLASSES, END, INNER, MOST, Entry
from kvstore.eviction.explorers import NEVER, Explorers, level_of
from kvstore.eviction.fates import BUCKET, FAR, OLDEST, Fates
from kvstore.eviction.heaps import InOrder, Place, counting, drop_first, drop_last
from kvstore.eviction.sampling import some

GHOSTS_PER_ITEM = 3
"""How many blocks that left are remembered for each that is held: the longest age at which a use can be counted."""
MAX_GHOSTS = 1 << 17
"""Beyond this only a sample is remembered, at about 200 bytes each; the statistics need no more."""
_BITS = CLASSES.bit_length()
_EXPLORES = -1
"""Ticket of an explorer: it has no place in a queue."""
_LEARN_EVERY = 1024
_LOOK_EVERY = 4
"""So many new blocks to one explorer that is looked at again: all of them in the time in which the room is filled."""
_CLEARLY = 1.25
"""By so much the latest block of a class must be worth less than the oldest to leave before it: less is chance. Where
more blocks are used in a circle than can be held, the oldest is the next to be used."""


class LHD(EvictionPolicy[Item], Generic[Item]):
    """Evict the block with the fewest hits to come per block and time. Blocks with a child that is held never leave."""

    name = "lhd"

    def __init__(self) -> None:
        self._held: dict[Item, Entry[Item]] = {}
        self._queues: list[list[Place[Item]]] = [[] for _ in range(CLASSES)]
        self._latest: list[list[Place[Item]]] = [[] for _ in range(CLASSES)]
        """The same places in the order in which they were given, the last of which may be worth least."""
        self._live = [0] * CLASSES
        """Places of each queue that still count."""
        self._orphans: dict[Item, int] = {}
        """Blocks that are not held to how many are that were computed behind them."""
        self._ghosts: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        """Class, time of the last use and number of uses of blocks that were evicted, by hash."""
        self._stride = 1
        """One in so many evicted blocks is remembered, and counts for all of them."""
        self._faded = 0
        """Ghosts that were never used again."""
        self._fates = Fates(CLASSES, BELOW)
        self._explorers: Explorers[Item] = Explorers()
        self._clock = 0
        self._stamp = 0
        self._tickets = 0
        self._bare: tuple[Item, Entry[Item]] | None = None
        """A block without children that has no place yet: the next call most often makes one unnecessary."""
        self._next = _LEARN_EVERY

    # -- the contract --------------------------------------------------------------------------------------------------

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._clock = clock = self._clock + 1
        self._stamp = stamp = self._stamp + 1
        count = 1
        before: Entry[Item] | None = None
        behind = False
        if parent is not None:
            if parent == item:
                parent = None
            elif (before := self._held.get(parent)) is not None:
                behind = before.behind or (before.count > 1 and before.parent is not None)
        if self._ghosts and (ghost := self._ghosts.pop(hash(item), None)) is not None:
            group, time, uses = ghost
            self._fates.used(group, clock - time, self._stride)
            count += uses
        children = self._orphans.pop(item, 0) if self._orphans else 0
        entry = Entry(clock, stamp, count, parent, behind, children)
        if count == 1 and not self._fates.proven[END[1]]:
            self._draw(item, entry, before)
        if self._explorers.waiting and not stamp % _LOOK_EVERY:
            self._look_again()
        bare = self._bare
        if bare is not None and bare[1] is not before:
            self._place(*bare)
        self._held[item] = entry
        self._bare = None if children else (item, entry)
        if parent is not None:
            if before is None:
                self._orphans[parent] = self._orphans.get(parent, 0) + 1
            else:
                if before.ticket:
                    self._displace(parent, before)
                before.children += 1
                if not before.parted:
                    before.parted = True
                    uses = before.count
                    before.group = BEHIND if uses == 1 and before.behind else INNER[uses if uses < MOST else MOST]
        if clock >= self._next:
            self._learn()

    def touch(self, items: list[Item]) -> None:
        self._place_bare()
        held, used, live = self._held, self._fates.used, self._live
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
            if entry.children:
                entry.group = (INNER if entry.parted else END)[count if count < MOST else MOST]
            else:
                if entry.ticket > 0:
                    live[entry.group] -= 1
                elif entry.ticket:
                    del self._explorers.waiting[item]
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
        if entry.children > entry.stays:
            self._orphans[item] = entry.children - entry.stays
        elif entry.ticket:
            self._displace(item, entry)
        if evicted:
            self._remember(item, entry)
        parent = entry.parent
        if parent is None:
            return
        if (before := self._held.get(parent)) is not None:
            before.children -= 1
            if not before.children:
                if self._bare is not None:
                    self._place(*self._bare)
                self._bare = parent, before
        elif self._orphans[parent] > 1:
            self._orphans[parent] -= 1
        else:
            del self._orphans[parent]

    def hold(self, item: Item) -> None:
        entry = self._held.get(item)
        if entry is None or entry.stays:
            return
        if self._bare is not None and self._bare[1] is entry:
            self._bare = None
        elif entry.ticket:
            self._displace(item, entry)
        entry.stays = True
        entry.children += 1

    def release(self, item: Item) -> None:
        entry = self._held.get(item)
        if entry is not None and entry.stays:
            entry.stays = False
            entry.children -= 1
            if not entry.children:
                self._place_bare()
                self._bare = item, entry

    def victims(self) -> Iterator[Item]:
        self._place_bare()
        held, clock, unit, densities = self._held, self._clock, self._fates.unit, self._fates.densities
        freed: dict[Item, int] = {}
        walks: dict[int, Iterator[Place[Item]]] = {}
        heads = self._heads(walks)
        place = heapq.heappop(heads) if heads else None
        while place is not None:
            _, _, group, item = place
            yield item
            if group >= 0 and (following := self._following(group, walks)) is not None:
                heapq.heappush(heads, following)
            parent = held[item].parent
            if parent is not None and (before := held.get(parent)) is not None:
                freed[parent] = gone = freed.get(parent, 0) + 1
                if gone == before.children:  # its last child would be gone: it could leave next
                    units = (clock - before.time) // unit
                    worth = densities[before.group][BUCKET[units] if units < FAR else OLDEST]
                    place = heapq.heappushpop(heads, (worth, before.stamp, -1, parent))
                    continue
            place = heapq.heappop(heads) if heads else None
        # What is left must stay, or are blocks whose headers name each other as parents, which no client needs, and
        # those before them.
        yield from (item for item, entry in reversed(held.items()) if entry.children > freed.get(item, 0))

    def __len__(self) -> int:
        return len(self._held)

    # -- order ---------------------------------------------------------------------------------------------------------

    def _place_bare(self) -> None:
        if self._bare is not None:
            (item, entry), self._bare = self._bare, None
            self._place(item, entry)

    def _heads(self, walks: dict[int, Iterator[Place[Item]]]) -> list[tuple[float, float, int, Item]]:
        """The block of each class that should leave first, with its worth and stamp, as a heap. Where that is not the
        oldest of its class, and where it is an explorer, it begins the walk to those that follow."""
        held, clock, unit = self._held, self._clock, self._fates.unit
        heads: list[tuple[float, float, int, Item]] = []
        for group, queue in enumerate(self._queues):
            if not queue:
                continue
            stamp, ticket, item = queue[0]
            entry = held.get(item)
            if entry is None or entry.ticket != ticket:
                if not drop_first(queue, held):
                    continue
                stamp, _, item = queue[0]
                entry = held[item]
            densities = self._fates.densities[group]
            units = (clock - entry.time) // unit
            worth = densities[BUCKET[units] if units < FAR else OLDEST]
            places = self._latest[group]
            _, ticket, latest = places[-1]
            newer = held.get(latest)
            if newer is None or newer.ticket != ticket:
                drop_last(places, held)
                latest = places[-1][2]
                newer = held[latest]
            units = (clock - newer.time) // unit
            less = densities[BUCKET[units] if units < FAR else OLDEST]
            if _CLEARLY * less < worth:
                worth, stamp, item = less, newer.stamp, latest
                walks[group] = reversed(places)
                next(walks[group])
            heads.append((worth, stamp, group, item))
        if waiting := self._explorers.waiting:  # they leave last: what they are worth is not known
            walks[CLASSES] = ((held[item].stamp, _EXPLORES, item) for item in waiting)
            stamp, _, item = next(walks[CLASSES])
            heads.append((math.inf, stamp, CLASSES, item))
        heapq.heapify(heads)
        return heads

    def _following(self, group: int, walks: dict[int, Iterator[Place[Item]]]) -> tuple[float, float, int, Item] | None:
        """The next block of a class behind those that were taken."""
        if group not in walks:
            walks[group] = InOrder(self._queues[group])
            next(walks[group])
        for stamp, ticket, item in walks[group]:
            entry = self._held.get(item)
            if entry is not None and entry.ticket == ticket:
                worth = math.inf if group == CLASSES else self._fates.density(group, self._clock - entry.time)
                return worth, stamp, group, item
        return None

    def _place(self, item: Item, entry: Entry[Item]) -> None:
        """Put a block without children into the queue of its class, or among the explorers."""
        entry.group = group = entry.classify()
        if entry.level >= self._explorers.level and self._explores(entry):
            self._explorers.waiting[item] = None
            entry.ticket = _EXPLORES
            return
        queue, latest = self._queues[group], self._latest[group]
        self._tickets = entry.ticket = ticket = self._tickets + 1
        place = entry.stamp, ticket, item
        heapq.heappush(queue, place)
        latest.append(place)
        self._live[group] = live = self._live[group] + 1
        most = 2 * live + 64
        if len(queue) > most:
            queue[:] = counting(queue, self._held)
            heapq.heapify(queue)
        if len(latest) > most:
            latest[:] = counting(latest, self._held)

    def _displace(self, item: Item, entry: Entry[Item]) -> None:
        """Take away its place; what stands in the queue, with a ticket of before, does not count any more."""
        if entry.ticket == _EXPLORES:
            del self._explorers.waiting[item]
        else:
            self._live[entry.group] -= 1
        entry.ticket = 0

    # -- explorers -----------------------------------------------------------------------------------------------------

    def _draw(self, item: Item, entry: Entry[Item], before: Entry[Item] | None) -> None:
        """Give a new block its level: that of the block before it, if that is new, too."""
        if before is not None and before.count == 1:
            entry.level, entry.stem = before.level, before.stem
        elif before is None or not self._fates.proven[INNER[1]]:
            entry.level, entry.stem = level_of(item), before
        if entry.level != NEVER:
            self._explorers.add(entry.level)

    def _forget_level(self, entry: Entry[Item]) -> None:
        """Note that a block leaves, or was used again and explores no more."""
        self._explorers.discard(entry.level)
        entry.level, entry.stem = NEVER, None

    def _explores(self, entry: Entry[Item]) -> bool:
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

    def _remember(self, item: Item, entry: Entry[Item]) -> None:
        mark, ghosts, stride = hash(item), self._ghosts, self._stride
        if stride > 1 and mark % stride:
            return
        ghosts[mark] = entry.group, entry.time, entry.count
        most = GHOSTS_PER_ITEM * len(self._held) // stride
        if most < 64:
            most = 64
        while len(ghosts) > most:
            group, time, _ = ghosts.popitem(False)[1]
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
            np.fromiter((entry.time << _BITS | entry.group for entry in held), np.int64),
            np.fromiter((time << _BITS | group for group, time, _ in left), np.int64),
        ]
        weights = np.repeat((held_by, left_by * self._stride), [len(each) for each in stamps])
        both = np.concatenate(stamps)
        return both & (1 << _BITS) - 1, self._clock - (both >> _BITS), weights
