"""Partitions: nobody is pushed below its guarantee by others, nor grows beyond its limit, nor keeps what is too old."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import make_policy
from kvstore.eviction.partitions import Facts, Partitions
from kvstore.quotas import Share
from kvstore.types import BlockId, Scope

A, B, C = (Scope("uid-1", name * 32) for name in (b"a", b"b", b"c"))
NAMES = {A: "a", B: "b", C: ""}


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """The smallest thing that uses partitions as a tier does: items of some size, and a capacity."""

    def __init__(self, capacity: int, policy: str = "lru") -> None:
        self.capacity = capacity
        self.items: dict[BlockId, int] = {}
        self.pinned: set[BlockId] = set()
        self.clock = Clock()
        self.order = Partitions(make_policy(policy), self._facts, clock=self.clock)

    def _facts(self, item: BlockId) -> Facts:
        return self.items[item], 1.0, None

    def rules(self, **shares: Share) -> None:
        self.order.arrange(shares, lambda scope: NAMES[scope] if NAMES[scope] in shares else "")

    def put(self, scope: Scope, number: int, nbytes: int = 1) -> bool:
        """Store an item; whether there was room."""
        item = BlockId(scope, number.to_bytes(32, "big"))
        if item in self.items:
            self.order.touch([item])
            return True
        need, over = self.used() + nbytes - self.capacity, self.order.over(scope, nbytes)
        leaving: list[BlockId] = []
        candidates = self.order.victims(scope, over, lambda item: 0 if item in self.pinned else self.items[item])
        while need > 0 or over > 0:
            found = next(candidates, None)
            if found is None:
                return False
            leaving.append(found[0])
            need, over = need - found[1], over - found[1]
        self.order.count_evicted(scope, leaving)
        for victim in leaving:
            self.drop(victim, evicted=True)
        self.order.charge(scope, nbytes)
        self.items[item] = nbytes
        self.order.insert(item, nbytes, cost=1.0, parent=None)
        return True

    def drop(self, item: BlockId, *, evicted: bool = False) -> None:
        self.order.remove(item, evicted=evicted)
        self.order.discharge(item.scope, self.items.pop(item))

    def used(self, scope: Scope | None = None) -> int:
        return sum(nbytes for item, nbytes in self.items.items() if scope in (None, item.scope))

    def check(self) -> None:
        assert self.order.check() == ""
        assert len(self.order) == len(self.items)
        assert self.used() <= self.capacity


@pytest.fixture
def cache() -> Iterator[Cache]:
    made = Cache(100)
    yield made
    made.check()


def flood(cache: Cache, scope: Scope, count: int = 300, start: int = 0) -> int:
    """Store many items; how many had room."""
    return sum(cache.put(scope, number) for number in range(start, start + count))


def test_without_rules_the_oldest_leaves_whoever_owns_it(cache: Cache) -> None:
    flood(cache, A, 100)
    assert flood(cache, B, 100) == 100
    assert cache.used(A) == 0


def test_a_flood_takes_all_but_the_guarantee(cache: Cache) -> None:
    cache.rules(a=Share(guarantee=30))
    flood(cache, A, 100)
    assert flood(cache, C) == 300
    # Both are taken from by how much they have above their guarantees, so the room above them is shared evenly.
    assert cache.used(A) == pytest.approx(30 + 35, abs=1)
    assert all(BlockId(A, number.to_bytes(32, "big")) in cache.items for number in range(60, 100)), "its newest stay"


def test_nobody_is_taken_below_its_guarantee_but_by_itself(cache: Cache) -> None:
    cache.rules(a=Share(guarantee=30, priority=-1), b=Share(guarantee=20))
    flood(cache, A, 40)
    flood(cache, B, 20)
    assert flood(cache, C) == 300
    assert (cache.used(A), cache.used(B)) == (30, 20)
    assert flood(cache, A, 10, start=1000) == 10
    assert cache.used(B) == 20


def test_an_item_larger_than_what_is_above_the_guarantee_stays(cache: Cache) -> None:
    cache.rules(a=Share(guarantee=30, priority=-1))
    for number in range(4):
        assert cache.put(A, number, 9)
    flood(cache, C)
    assert cache.used(A) == 36, "without one of 9 it would be 27"


def test_a_limit_makes_a_partition_evict_its_own(cache: Cache) -> None:
    cache.rules(a=Share(limit=25))
    flood(cache, C, 50)
    assert flood(cache, A) == 300
    assert (cache.used(A), cache.used(C)) == (25, 50)
    assert not cache.put(A, 5000, 26)


def test_the_lower_priority_gives_way_first(cache: Cache) -> None:
    cache.rules(a=Share(priority=1), b=Share(priority=-1))
    flood(cache, A, 40)
    flood(cache, B, 30)
    flood(cache, C, 30)
    flood(cache, A, 30, start=500)
    assert (cache.used(A), cache.used(B), cache.used(C)) == (70, 0, 30)
    flood(cache, C, 100, start=500)
    assert (cache.used(A), cache.used(C)) == (70, 30), "everybody's room is not taken from who comes before them"


def test_what_may_not_leave_is_passed_over(cache: Cache) -> None:
    cache.rules(a=Share(guarantee=10))
    flood(cache, A, 100)
    cache.pinned = set(list(cache.items)[:50])
    assert flood(cache, C, 40) == 40
    assert cache.pinned <= cache.items.keys()


def test_who_made_whom_give_way_is_counted(cache: Cache) -> None:
    cache.rules(a=Share(guarantee=30), b=Share(limit=20))
    flood(cache, A, 100)
    flood(cache, B, 40)
    flood(cache, C, 5)
    assert dict(cache.order.evicted) == {("b", "a"): 20, ("b", "b"): 20, ("", "a"): 5}


def test_what_is_unused_for_too_long_is_dead_and_listed(cache: Cache) -> None:
    cache.rules(a=Share(ttl_s=10))
    flood(cache, A, 3)
    flood(cache, C, 3)
    first, second, third = (BlockId(A, number.to_bytes(32, "big")) for number in range(3))
    cache.clock.now += 6
    cache.order.touch([first])
    cache.clock.now += 5
    assert cache.order.expired() == cache.order.expired(A) == [second, third]
    assert cache.order.expired(C) == []
    assert [cache.order.alive(item) for item in (first, second)] == [True, False]
    assert cache.order.alive(BlockId(C, bytes(32)))


def test_rules_that_come_and_go_take_their_blocks_along(cache: Cache) -> None:
    flood(cache, A, 50)
    flood(cache, C, 50)
    cache.rules(a=Share(guarantee=40, ttl_s=10))
    cache.check()
    assert cache.order.of(A).used == 50
    assert cache.order.alive(BlockId(A, bytes(32))), "its time runs from when the rule came"
    flood(cache, C, 100, start=500)
    assert cache.used(A) == 50
    flood(cache, A, 30, start=500)
    old, young = (BlockId(A, number.to_bytes(32, "big")) for number in (0, 49))
    assert old not in cache.items, "it was the oldest, and still is"
    assert young in cache.items
    cache.rules()
    cache.check()
    flood(cache, C, 200, start=2000)
    assert cache.used(A) == 0
    assert cache.order.state() == {}


STEPS = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.integers(0, 40), st.integers(1, 9), st.sampled_from("prtd")),
    max_size=120,
)


@settings(deadline=None, max_examples=60)
@given(
    STEPS, st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 45]), st.sampled_from(["lru", "lhd", "s3-fifo"])
)
def test_the_guarantee_holds_whatever_happens(
    steps: list[tuple[Scope, int, int, str]], first: int, second: int, limit: int, policy: str
) -> None:
    cache = Cache(100, policy)
    shares = {"a": Share(guarantee=first, priority=-5), "b": Share(guarantee=second, limit=limit)}
    cache.rules(**shares)
    ruled = True
    for scope, number, nbytes, action in steps:
        before = {each: cache.used(each) for each in (A, B)}
        if action in "pt":
            cache.put(scope, number, nbytes)
            for each, share in ((A, shares["a"]), (B, shares["b"])):
                if ruled and each != scope:
                    assert cache.used(each) >= min(before[each], share.guarantee)
            if ruled and limit and scope == B:
                assert cache.used(B) <= max(limit, before[B])
        elif action == "r":
            ruled = not ruled
            cache.rules(**shares if ruled else {})
        else:
            for item in [item for item in cache.items if item.scope == scope][:2]:
                cache.drop(item)
        cache.check()
