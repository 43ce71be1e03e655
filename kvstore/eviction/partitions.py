"""Partitions of a tier: who gives way to whom, between the policies of those that have a rule and of all the others.

Each rule has a policy of its own; blocks of everybody else share one. Who stores takes room from the partition of the
lowest priority that has most above its guarantee, be it the own one. Nobody is taken below its guarantee but by itself.
A partition at its limit makes room for itself alone. Without rules there is one policy and nothing to decide.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from kvstore.eviction import make_policy
from kvstore.eviction.base import EvictionPolicy
from kvstore.quotas import Share
from kvstore.types import BlockId, Scope

Facts = tuple[int, float, BlockId | None]
"""Bytes, cost and parent of a block, as a policy wants them."""


class Partition:
    """Those who are under one rule, or under none."""

    __slots__ = ("expired", "name", "policy", "share", "used", "uses")

    def __init__(self, name: str, share: Share, policy: EvictionPolicy[BlockId]) -> None:
        self.name = name
        self.share = share
        self.policy = policy
        self.used = 0
        self.expired = 0
        self.uses: OrderedDict[BlockId, float] = OrderedDict()
        """When each block was last used, oldest first; kept only where blocks expire."""


class _Account:
    """What one namespace holds, and where."""

    __slots__ = ("nbytes", "partition")

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.nbytes = 0


class Partitions:
    """The eviction order of one tier.

    `charge` and `discharge` account for bytes; `insert`, `touch` and `remove` are those of a policy. The two are apart
    because a tier charges before a block exists, and may hold blocks that are not in any order yet.

    Parameters
    ----------
    policy : EvictionPolicy
        Empty policy of those without a rule; those with one get a policy of the same name.
    facts : callable
        What is known of a block that has to change partitions.
    loose : callable
        Blocks that are charged but in no order, the first to leave first; they go before their partition's others.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        policy: EvictionPolicy[BlockId],
        facts: Callable[[BlockId], Facts],
        loose: Callable[[], Iterable[BlockId]] = lambda: (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared = Partition("", Share(), policy)
        self._by_name = {"": self._shared}
        self._accounts: dict[Scope, _Account] = {}
        self._assign: Callable[[Scope], str] = lambda scope: ""
        self._facts = facts
        self._loose = loose
        self._clock = clock
        self._held: dict[BlockId, int] = {}
        """Blocks that may not leave, whether or not they are in an order yet, and for how many reasons."""
        self.ruled = False
        self.expiring = False
        self.on_arranged: Callable[[], None] = lambda: None
        """Called after blocks may have come under another rule."""
        self.evicted: Counter[tuple[str, str]] = Counter()
        """Evicted blocks by (partition that made room, partition that gave it)."""

    # -- rules ---------------------------------------------------------------------------------------------------------

    def arrange(self, shares: dict[str, Share], assign: Callable[[Scope], str]) -> None:
        """Set the rules: the share of each name, and the name each namespace falls under (empty for none).

        Blocks change partitions in the order in which they would have left. Where they begin to expire, their time
        runs from now.
        """
        self._assign = assign
        old = self._by_name
        self._by_name = {"": self._shared}
        for name, share in shares.items():
            partition = old.get(name) or Partition(name, share, make_policy(self._shared.policy.name))
            if share.ttl_s and not partition.share.ttl_s:
                self._start_clock(partition)
            elif not share.ttl_s:
                partition.uses.clear()
            partition.share = share
            self._by_name[name] = partition
        self.ruled = bool(shares)
        self.expiring = any(share.ttl_s for share in shares.values())
        for name in old.keys() - self._by_name.keys():
            self.evicted = Counter({pair: n for pair, n in self.evicted.items() if name not in pair})
        self._settle(list(self._accounts))

    @property
    def policy(self) -> str:
        """Name of the policy of every partition."""
        return self._shared.policy.name

    def switch(self, policy: str) -> None:
        """Give every partition another policy. Blocks enter it in the order in which they would have left."""
        for partition in self._by_name.values():
            old, partition.policy = partition.policy, make_policy(policy)
            for item in list(old.victims()):
                nbytes, cost, parent = self._facts(item)
                partition.policy.insert(item, nbytes, cost=cost, parent=parent)
                if item in self._held:
                    partition.policy.hold(item)

    def reassign(self, scope: Scope) -> None:
        """Find out anew which rule a namespace falls under: more is known of it now."""
        if self.ruled and scope in self._accounts:
            self._settle([scope])

    def _settle(self, scopes: list[Scope]) -> None:
        """Bring what these namespaces hold to where it belongs."""
        moving: dict[Scope, Partition] = {}
        sources: set[Partition] = set()
        for scope in scopes:
            account, to = self._accounts[scope], self._by_name[self._assign(scope)]
            if account.partition is not to:
                sources.add(account.partition)
                account.partition.used -= account.nbytes
                to.used += account.nbytes
                account.partition = moving[scope] = to
        for source in sources:
            for item in [item for item in source.policy.victims() if item.scope in moving]:
                source.policy.remove(item)
                used = source.uses.pop(item, None)
                self._enter(moving[item.scope], item, *self._facts(item), used_at=used)
        self.on_arranged()
        self.sort_uses()

    def sort_uses(self) -> None:
        """Bring last uses into order again, after blocks came in that were used before others here."""
        for partition in self._by_name.values():
            if partition.uses:
                partition.uses = OrderedDict(sorted(partition.uses.items(), key=lambda use: use[1]))

    def _start_clock(self, partition: Partition) -> None:
        now = self._clock()
        for item in partition.policy.victims():
            partition.uses[item] = now

    def of(self, scope: Scope) -> Partition:
        """The partition of a namespace."""
        if not self.ruled:
            return self._shared
        account = self._accounts.get(scope)
        return self._by_name[self._assign(scope)] if account is None else account.partition

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def charge(self, scope: Scope, nbytes: int) -> None:
        """Count bytes that a namespace takes."""
        account = self._accounts.get(scope)
        if account is None:
            account = self._accounts[scope] = _Account(self.of(scope))
        account.nbytes += nbytes
        account.partition.used += nbytes

    def discharge(self, scope: Scope, nbytes: int) -> None:
        """Count bytes that a namespace has given back."""
        account = self._accounts[scope]
        account.nbytes -= nbytes
        account.partition.used -= nbytes
        if not account.nbytes:
            del self._accounts[scope]

    def over(self, scope: Scope, nbytes: int) -> int:
        """Bytes by which so many more would exceed the limit of a namespace; 0 or less if they would not."""
        if not self.ruled:
            return 0
        partition = self.of(scope)
        return partition.used + nbytes - partition.share.limit if partition.share.limit else 0

    # -- order ---------------------------------------------------------------------------------------------------------

    def insert(
        self, item: BlockId, nbytes: int, *, cost: float, parent: BlockId | None, used_at: float | None = None
    ) -> None:
        """Put a block in order; `used_at` (monotonic) if that was not now."""
        self._enter(self.of(item.scope), item, nbytes, cost, parent, used_at)

    def _enter(
        self,
        partition: Partition,
        item: BlockId,
        nbytes: int,
        cost: float,
        parent: BlockId | None,
        used_at: float | None = None,
    ) -> None:
        partition.policy.insert(item, nbytes, cost=cost, parent=parent)
        if item in self._held:
            partition.policy.hold(item)
        if partition.share.ttl_s:
            partition.uses[item] = self._clock() if used_at is None else used_at

    def touch(self, items: list[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        if not items:
            return
        partition = self.of(items[0].scope)
        partition.policy.touch(items)
        if partition.share.ttl_s:
            now = self._clock()
            for item in items:
                partition.uses[item] = now
                partition.uses.move_to_end(item)

    def hold(self, item: BlockId) -> None:
        """Give a reason why a block may not leave; it need not be in an order."""
        self._held[item] = self._held.get(item, 0) + 1
        self.of(item.scope).policy.hold(item)

    def release(self, item: BlockId) -> None:
        """Take a reason back, unless the block was removed."""
        reasons = self._held.pop(item, 0) - 1
        if reasons > 0:
            self._held[item] = reasons
        else:
            self.of(item.scope).policy.release(item)

    def remove(self, item: BlockId, *, evicted: bool = False) -> None:
        """Take a block out of the order."""
        partition = self.of(item.scope)
        self._held.pop(item, None)
        partition.policy.remove(item, evicted=evicted)
        partition.uses.pop(item, None)

    def count_evicted(self, by: Scope | None, victims: Iterable[BlockId]) -> None:
        """Count who made whom give way."""
        if self.ruled:
            name = "" if by is None else self.of(by).name
            self.evicted.update((name, self.of(item.scope).name) for item in victims)

    def __len__(self) -> int:
        return sum(len(partition.policy) for partition in self._by_name.values())

    # -- who leaves ----------------------------------------------------------------------------------------------------

    def victims(self, scope: Scope | None, over: int, size: Callable[[BlockId], int]) -> Iterator[tuple[BlockId, int]]:
        """Blocks that should leave for one of `scope`, with their bytes. Everything that is yielded is taken to leave.

        Parameters
        ----------
        scope : Scope or None
            Who needs the room; None if nobody in particular.
        over : int
            Bytes that must come from the partition of `scope`, which is at its limit. They come first.
        size : callable
            Bytes that a block gives back, as they were charged; 0 if it may not leave now.
        """
        if not self.ruled:
            for item in chain(self._loose(), self._shared.policy.victims()):
                if nbytes := size(item):
                    yield item, nbytes
            return
        own = None if scope is None else self.of(scope)
        loose = list(self._loose())
        walks = {
            partition: _leaving(chain(_within(loose, self, partition), partition.policy.victims()), size)
            for partition in self._by_name.values()
        }
        freed: dict[Partition, int] = dict.fromkeys(walks, 0)
        while own is not None and over > 0:
            if (found := next(walks[own], None)) is None:
                return
            over -= found[1]
            freed[own] += found[1]
            yield found
        yield from _fair(walks, freed, own)

    # -- what is too old -----------------------------------------------------------------------------------------------

    def alive(self, item: BlockId) -> bool:
        """Whether a block is young enough to be handed out. One whose last use is not known yet is not."""
        partition = self.of(item.scope)
        if not partition.share.ttl_s:
            return True
        return partition.uses.get(item, float("-inf")) > self._clock() - partition.share.ttl_s

    def expired(self, scope: Scope | None = None) -> list[BlockId]:
        """Blocks that are too old, of the partition of a namespace or of all."""
        found: list[BlockId] = []
        for partition in self._by_name.values() if scope is None else (self.of(scope),):
            if not partition.share.ttl_s:
                continue
            latest = self._clock() - partition.share.ttl_s
            for item, used_at in partition.uses.items():
                if used_at > latest:
                    break
                found.append(item)
        return found

    def count_expired(self, item: BlockId) -> None:
        """Count a block that left because it was too old."""
        self.of(item.scope).expired += 1

    # -- what is to be seen --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, float]]:
        """Bytes, blocks, guarantee, limit and expired blocks of each partition; nothing where there are no rules."""
        if not self.ruled:
            return {}
        return {
            partition.name: {
                "bytes": partition.used,
                "blocks": len(partition.policy),
                "guarantee": partition.share.guarantee,
                "limit": partition.share.limit,
                "expired": partition.expired,
            }
            for partition in self._by_name.values()
        }

    def check(self) -> str:
        """What does not add up; empty if everything does."""
        used = dict.fromkeys(self._by_name.values(), 0)
        for account in self._accounts.values():
            used[account.partition] += account.nbytes
        for partition, nbytes in used.items():
            if nbytes != partition.used or nbytes < 0:
                return f"partition {partition.name!r} counts {partition.used} bytes, its namespaces {nbytes}"
            if partition.share.ttl_s and len(partition.uses) != len(partition.policy):
                return f"partition {partition.name!r} does not know the last use of each of its blocks"
        return ""


Walk = Iterator[tuple[BlockId, int]]


def _leaving(items: Iterable[BlockId], size: Callable[[BlockId], int]) -> Walk:
    for item in items:
        if nbytes := size(item):
            yield item, nbytes


def _within(loose: list[BlockId], order: Partitions, partition: Partition) -> Iterator[BlockId]:
    return (item for item in loose if order.of(item.scope) is partition)


def _fair(walks: dict[Partition, Walk], freed: dict[Partition, int], own: Partition | None) -> Walk:
    """Victims in turns: lowest priority first, then whoever has most above its guarantee; last the own guaranteed."""

    def place(number: int, partition: Partition) -> tuple[bool, int, int, bool, int, Partition]:
        surplus = partition.used - freed[partition] - partition.share.guarantee
        return surplus <= 0, partition.share.priority, -surplus, partition is not own, number, partition

    heap = [place(number, partition) for number, partition in enumerate(walks)]
    heapq.heapify(heap)
    while heap:
        guaranteed, _, minus_surplus, foreign, number, partition = heapq.heappop(heap)
        if foreign and guaranteed:
            continue
        found = next(walks[partition], None)
        if found is None or (foreign and found[1] > -minus_surplus):
            continue
        yield found
        freed[partition] += found[1]
        heapq.heappush(heap, place(number, partition))
