"""Whose turn it is: importance overtakes within bounds, parents stay ahead, nobody starves, durable blocks go first."""

from __future__ import annotations

import asyncio

import pytest
import torch
from houses import NBYTES, FakeTier, Gate, Houses, block_id, key, payload
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs import importance
from kvstore.copies import MOST, Copies
from kvstore.eviction.cost import WEIGHTS
from kvstore.tiers.host_block import HostBlock, encode_header
from kvstore.turns import Turns
from kvstore.types import BlockHeader, BlockId, Scope

REACH = 1000


def drained(turns: Turns[int]) -> list[int]:
    return [turns.take() for _ in range(len(turns))]


def test_what_matters_more_goes_ahead_but_only_so_far() -> None:
    turns: Turns[int] = Turns(REACH)
    for number in range(20):
        turns.add(block_id(number), None, 100, 1.0, number)
    turns.add(block_id(20), None, 100, 1.5, 20)  # ahead of what came up to 500 bytes before it
    turns.add(block_id(21), None, 100, 0.5, 21)
    turns.add(block_id(22), None, 100, 1.0, 22)
    order = drained(turns)
    assert order[14:18] == [14, 15, 20, 16]
    assert order[-2:] == [22, 21]
    assert [n for n in order if n < 20] == list(range(20)), "among equals, first come, first served"


def test_a_parent_that_waits_is_not_overtaken_by_its_child() -> None:
    turns: Turns[int] = Turns(REACH)
    turns.add(block_id(0), None, 100, 0.5, 0)
    for number in range(1, 5):  # each more important than the one before it
        turns.add(block_id(number), block_id(number - 1), 100, 0.5 + number / 4, number)
    turns.add(block_id(9), None, 100, 2.0, 9)
    assert drained(turns) == [9, 0, 1, 2, 3, 4]
    turns.add(block_id(4), block_id(3), 100, 2.0, 4)  # its parent has gone already
    turns.add(block_id(5), None, 100, 1.0, 5)
    assert drained(turns) == [4, 5]


def test_a_block_that_is_queued_twice_comes_twice() -> None:
    turns: Turns[int] = Turns(REACH)
    for number in range(2):
        turns.add(block_id(0), None, 100, 1.0, number)
    turns.add(block_id(1), block_id(0), 100, 2.0, 2)
    assert drained(turns) == [0, 1, 2]
    assert turns._places == {}
    with pytest.raises(IndexError):
        turns.take()


@given(st.lists(st.tuples(st.floats(*WEIGHTS), st.integers(1, 400), st.integers(0, 40)), max_size=60))
def test_nobody_waits_for_more_than_a_bounded_number_of_bytes_of_later_ones(
    blocks: list[tuple[float, int, int]],
) -> None:
    """Whatever others send, and in whatever namespace: the bound is the spread of weights times the reach."""
    turns: Turns[int] = Turns(REACH)
    for number, (weight, nbytes, back) in enumerate(blocks):
        parent = block_id(number - back) if 0 < back <= number else None
        turns.add(block_id(number), parent, nbytes, weight, number)
    order = drained(turns)
    place = {number: at for at, number in enumerate(order)}
    assert sorted(order) == list(range(len(blocks)))
    for number, (_, _, back) in enumerate(blocks):
        overtaken_by = [other for other in order[: place[number]] if other > number]
        assert sum(blocks[other][1] for other in overtaken_by) <= (WEIGHTS[1] - WEIGHTS[0]) * REACH + 400
        if 0 < back <= number:
            assert place[number - back] < place[number]


# -- in the daemon's queues --------------------------------------------------------------------------------------------


def weighed(share: float, parent: bytes = b"") -> BlockHeader:
    return BlockHeader(parent=parent, importance=importance.pack(torch.full((16,), share)))


async def test_what_gets_more_attention_is_written_first_and_durable_before_all(houses: Houses) -> None:
    gate = Gate("put")
    order: list[BlockId] = []

    def note(verb: str, block: BlockId) -> object:
        order.append(block)
        return gate(verb, block)

    house = houses(FakeTier(note), parallel=1)
    shares = {0: 1.0, 1: 0.6, 2: 1.0, 3: 1.8, 4: 0.6}
    headers = {number: weighed(share) for number, share in shares.items()} | {5: weighed(2.0, parent=key(4))}
    for number, header in headers.items():
        raw = encode_header(header)
        extents = house.host.allocate("uid-1", NBYTES, len(raw))
        assert extents is not None
        content = payload(key(number))
        for view in house.host.arena.views(extents):
            view[:], content = content[: len(view)], content[len(view) :]
        house.chain.admit(HostBlock(block_id(number), raw, header, NBYTES, extents), False)
        await asyncio.sleep(0)  # the first is being written from now on
    await gate.waiting.wait()
    house.admit(9, durable=True)
    gate.open.set()
    await house.settle()
    assert order == [block_id(n) for n in (0, 9, 3, 2, 1, 4, 5)]


class Worse(FakeTier):
    """Its copies have lost more than those of any other tier."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[BlockId] = []

    def outdone(self, scope: Scope, key: bytes, other: object) -> bool:
        return True

    async def take_over(self, block: BlockId, other: object) -> bool:
        self.taken.append(block)
        return True


async def test_better_copies_of_what_matters_are_fetched_first_and_forgotten_last() -> None:
    near, far = Worse(), FakeTier()
    copies = Copies([near, far], lambda: False)
    copies.was_read(block_id(0), far, 0.5)
    for number in range(1, MOST + 1):
        copies.was_read(block_id(number), far, 1.0 + number % 2)
    while copies._task is not None:
        await asyncio.sleep(0)
    assert len(near.taken) == MOST
    assert block_id(0) not in near.taken, "the least important made room"
    odd, even = [[block_id(n) for n in range(MOST, 0, -1) if n % 2 == side] for side in (1, 0)]
    assert near.taken == odd + even
