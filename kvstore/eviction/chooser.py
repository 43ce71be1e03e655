"""The chooser: runs small simulated caches of the other policies on a sample of the blocks, and follows the best.

After A. Waldspurger, N. Park, A. Garthwaite, I. Ahmad, "Efficient MRC Construction with SHARDS" (FAST 2015) for the
sample, and G. Einziger et al., "Adaptive Software Cache Management" (Middleware 2018) for choosing by small ghosts. A
block is in the sample by its hash; it stands behind the nearest of those before it that is in the sample too, so the
shape of the prompts is kept. Each ghost holds as many sampled blocks as are really held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic

from kvstore.eviction.arc import ARC
from kvstore.eviction.base import EvictionPolicy, Item
from kvstore.eviction.closed import PrefixClosed
from kvstore.eviction.gdsf import GDSF
from kvstore.eviction.lhd import LHD
from kvstore.eviction.lru import LRU
from kvstore.eviction.mq import MQ
from kvstore.eviction.s3fifo import S3FIFO

CANDIDATES: Mapping[str, Callable[[], EvictionPolicy[Any]]] = {
    "lhd": LHD,
    "mq": lambda: PrefixClosed(MQ()),
    "s3-fifo": lambda: PrefixClosed(S3FIFO()),
    "arc": lambda: PrefixClosed(ARC()),
    "gdsf": lambda: PrefixClosed(GDSF()),
    "lru": lambda: PrefixClosed(LRU()),
}
"""The first is followed until another is better."""

SAMPLE = 1 << 8
"""Sampled blocks that are held, at most twice; with fewer blocks all of them are the sample."""
WINDOW = 1 << 11
"""Sampled references between two comparisons."""
DECAY = 0.8
"""What a comparison keeps of those before it: the last five or so windows decide."""
BETTER = 1.02
"""Another policy must have so many times the hits before it is followed: a change costs its own warming up."""


class _Ghost(Generic[Item]):
    """A cache of sampled blocks that holds no data: a policy, what it holds, and its hits."""

    __slots__ = ("held", "hits", "policy", "score")

    def __init__(self, policy: EvictionPolicy[Item]) -> None:
        self.policy = policy
        self.held: set[Item] = set()
        self.hits = 0
        self.score = 0.0

    def use(self, item: Item, facts: tuple[int, float, Item | None]) -> None:
        if item in self.held:
            self.hits += 1
            self.policy.touch([item])
        else:
            nbytes, cost, parent = facts
            self.policy.insert(item, nbytes, cost=cost, parent=parent)
            self.held.add(item)

    def shrink(self, count: int) -> None:
        """Evict down to `count`, some at a time: asking a policy for victims costs more than taking one."""
        over = len(self.held) - count
        if over > count >> 5:
            victims = self.policy.victims()
            for item in [next(victims) for _ in range(over)]:
                self.policy.remove(item, evicted=True)
                self.held.discard(item)

    def forget(self, item: Item) -> None:
        if item in self.held:
            self.policy.remove(item)
            self.held.discard(item)


class Chooser(EvictionPolicy[Item]):
    """Follow the candidate whose ghost has the most hits.

    After a change, new and used blocks are ordered by the new policy; the others stay in the order of the old one and
    leave before them. So a change moves nothing at once.
    """

    name = "chooser"

    def __init__(self, candidates: Mapping[str, Callable[[], EvictionPolicy[Any]]] = CANDIDATES) -> None:
        self._make = dict(candidates)
        self.following = next(iter(self._make))
        """Name of the policy that is followed."""
        self._orders: list[EvictionPolicy[Item]] = [self._make[self.following]()]
        """Of what was followed before, oldest first, as far as blocks are left in it; then of what is followed now."""
        self._where: dict[Item, EvictionPolicy[Item]] = {}
        self._facts: dict[Item, tuple[int, float, Item | None]] = {}
        self._sampled_at: dict[Item, Item] = {}
        """Of each held block the nearest block before it, or itself, that is in the sample."""
        self._ghosts: dict[str, _Ghost[Item]] = {name: _Ghost(make()) for name, make in self._make.items()}
        self._stride = 1
        """One in so many blocks is in the sample."""
        self._sample = 0
        self._seen = 0

    # -- the contract --------------------------------------------------------------------------------------------------

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        order = self._orders[-1]
        order.insert(item, nbytes, cost=cost, parent=parent)
        self._where[item] = order
        self._facts[item] = nbytes, cost, parent
        before = None if parent is None else self._sampled_at.get(parent)
        if self._in_sample(item):
            self._sampled_at[item] = item
            self._sample += 1
            self._reference(item, (nbytes, cost, before))
        elif before is not None:
            self._sampled_at[item] = before

    def touch(self, items: list[Item]) -> None:
        order, where = self._orders[-1], self._where
        for item in items:
            if where[item] is not order:
                where[item].remove(item)
                nbytes, cost, parent = self._facts[item]
                order.insert(item, nbytes, cost=cost, parent=parent)
                where[item] = order
        order.touch(items)
        before: Item | None = None
        for item in items:
            if self._in_sample(item):
                nbytes, cost, _ = self._facts[item]
                self._reference(item, (nbytes, cost, before))
                before = item

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        self._where.pop(item).remove(item, evicted=evicted)
        del self._facts[item]
        self._sampled_at.pop(item, None)
        if self._in_sample(item):
            self._sample -= 1
            for ghost in self._ghosts.values():
                if not evicted:
                    ghost.forget(item)
        while len(self._orders) > 1 and not self._orders[0]:
            del self._orders[0]

    def victims(self) -> Iterator[Item]:
        for order in self._orders:
            yield from order.victims()

    def __len__(self) -> int:
        return len(self._facts)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _in_sample(self, item: Item) -> bool:
        return not hash(item) % self._stride

    def _reference(self, item: Item, facts: tuple[int, float, Item | None]) -> None:
        for ghost in self._ghosts.values():
            ghost.use(item, facts)
            ghost.shrink(self._sample)
        self._seen += 1
        if self._seen >= WINDOW:
            self._seen = 0
            self._compare()
        if self._sample > 2 * SAMPLE:
            self._thin_out()

    def _compare(self) -> None:
        for ghost in self._ghosts.values():
            ghost.score = DECAY * ghost.score + ghost.hits
            ghost.hits = 0
        best = max(self._ghosts, key=lambda name: self._ghosts[name].score)
        if self._ghosts[best].score > BETTER * self._ghosts[self.following].score:
            self.following = best
            if len(self._orders[-1]):
                self._orders.append(self._make[best]())
            else:
                self._orders[-1] = self._make[best]()

    def _thin_out(self) -> None:
        """Halve the sample."""
        self._stride *= 2
        out = [item for item, at in self._sampled_at.items() if item == at and not self._in_sample(item)]
        self._sample -= len(out)
        for item in out:
            del self._sampled_at[item]
        for ghost in self._ghosts.values():
            for item in [item for item in ghost.held if not self._in_sample(item)]:
                ghost.forget(item)


def scores(chooser: Chooser[Any]) -> Sequence[tuple[str, float]]:
    """Recent hits of each candidate's ghost, the best first."""
    found = [(name, ghost.score) for name, ghost in chooser._ghosts.items()]
    return sorted(found, key=lambda pair: -pair[1])
