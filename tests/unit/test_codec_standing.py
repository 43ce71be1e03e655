"""What the ladder knows of its blocks: sums by chain that follow every change, and who steps next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.standing import FEW, Standing
from kvstore.types import BlockId, Gone, Scope, TierCode

SCOPE = Scope("u0", bytes(32))
CHAINS = ("a", "b", "c")


def block(number: int) -> BlockId:
    return BlockId(SCOPE, number.to_bytes(32, "little"))


events = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(("set", "seen", "removed", "stay")), st.integers(0, 2)))


@given(events)
def test_sums_are_those_of_the_blocks_that_are_here(changes: list[tuple[int, str, int]]) -> None:
    standing, here = Standing(), {}
    for number, what, which in changes:
        if what == "set":
            standing.set(block(number), CHAINS[which], 10 + number, 100, which if which < 2 else None)
            here[number] = CHAINS[which]
        elif what == "seen":
            standing.seen(block(number), CHAINS[which])
            if number in here:
                here[number] = CHAINS[which]
        elif what == "removed":
            standing.removed(TierCode.DISK, block(number), Gone.EVICTED)
            here.pop(number, None)
        else:
            standing.stay(block(number))
            assert not standing.may_step(block(number))
    found = standing.by_rung()
    for chain in CHAINS:
        own = [number for number, name in here.items() if name == chain]
        counts = {"blocks": len(own), "stored_bytes": sum(10 + n for n in own), "logical_bytes": 100 * len(own)}
        assert found.get(chain, {"blocks": 0, "stored_bytes": 0, "logical_bytes": 0}) == counts
    assert len(standing) == len(here)


def test_the_highest_rung_steps_first_and_then_what_leaves_first() -> None:
    standing = Standing()
    for number in range(8):
        standing.set(block(number), "a", 10, 100, number % 2)
    order = [block(number) for number in (5, 2, 7, 0, 1, 3, 4, 6)]
    assert standing.stepping(order, lambda _: True, 4, 3) == [block(2), block(0), block(5)]
    assert standing.stepping(order, lambda b: b != block(2), 4, 2) == [block(0), block(5)]


def test_where_few_may_step_they_are_not_looked_for() -> None:
    standing = Standing()
    for number in range(2 * FEW):
        standing.set(block(number), "a", 10, 100, 0 if number == 9 else None)

    def order():
        raise AssertionError("looked for")
        yield block(0)

    assert standing.stepping(order(), lambda _: True, 100, 5) == [block(9)]
    standing.stay(block(9))
    assert standing.stepping(order(), lambda _: True, 100, 5) == []
