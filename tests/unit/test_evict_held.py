"""Blocks that may not leave do not stand in the way of those that may."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvstore.arena import PAGE_BYTES
from kvstore.disk.format import shape_of
from kvstore.disk.index import Index
from kvstore.eviction import make_policy
from kvstore.eviction.lhd import LHD
from kvstore.eviction.partitions import Partitions
from kvstore.quotas import Share
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock, encode_header
from kvstore.types import BlockHeader, BlockId, Scope

SCOPE = Scope("uid-1", b"a" * 32)
NBYTES = 4 * PAGE_BYTES


def block_id(number: int) -> BlockId:
    return BlockId(SCOPE, number.to_bytes(32, "big"))


def prompts(policy: LHD[int], count: int = 3, length: int = 3) -> None:
    """Prompts of blocks 0, 1, 2; 10, 11, 12; and so on."""
    for prompt in range(count):
        for depth in range(length):
            at = 10 * prompt + depth
            policy.insert(at, 1, parent=at - 1 if depth else None)


def test_what_is_held_leaves_last_and_what_stands_before_it_no_sooner() -> None:
    policy = LHD[int]()
    prompts(policy)
    policy.hold(2)
    assert list(policy.victims()) == [12, 11, 10, 22, 21, 20, 2, 1, 0]
    policy.release(2)
    assert list(policy.victims()) == [2, 1, 0, 12, 11, 10, 22, 21, 20]


def test_what_is_held_within_a_prompt_lets_those_behind_it_go() -> None:
    policy = LHD[int]()
    prompts(policy)
    policy.hold(1)
    assert list(policy.victims()) == [2, 12, 11, 10, 22, 21, 20, 1, 0]


def test_a_held_block_that_is_dropped_is_not_held_when_it_comes_back() -> None:
    policy = LHD[int]()
    prompts(policy)
    policy.hold(1)
    policy.remove(1)
    policy.insert(1, 1, parent=0)
    policy.insert(30, 1)
    assert list(policy.victims()) == [2, 12, 11, 10, 22, 21, 20, 1, 0, 30]


def test_use_counts_for_what_is_held() -> None:
    policy = LHD[int]()
    prompts(policy)
    policy.hold(2)
    policy.touch([0, 1, 2])
    policy.release(2)
    assert list(policy.victims()) == [12, 11, 10, 22, 21, 20, 2, 1, 0]


@pytest.fixture
def order() -> Partitions:
    return Partitions(make_policy("lhd"), lambda item: (1, 1.0, None))


def insert(order: Partitions, *numbers: int) -> None:
    for number in numbers:
        order.charge(SCOPE, 1)
        order.insert(block_id(number), 1, cost=1.0, parent=None)


def leaving(order: Partitions) -> list[int]:
    return [int.from_bytes(item.key, "big") for item, _ in order.victims(None, 0, lambda item: 1)]


def test_a_block_is_held_for_as_long_as_there_is_a_reason(order: Partitions) -> None:
    order.hold(block_id(1))  # before it is in the order
    insert(order, 1, 2, 3)
    order.hold(block_id(1))
    order.release(block_id(1))
    assert leaving(order) == [2, 3, 1]
    order.release(block_id(1))
    assert leaving(order) == [1, 2, 3]


def test_another_policy_and_another_rule_hold_what_was_held(order: Partitions) -> None:
    insert(order, 1, 2, 3)
    order.hold(block_id(1))
    order.switch("lhd")
    assert leaving(order) == [2, 3, 1]
    order.arrange({"some": Share(0, 0, 0, 0.0)}, lambda scope: "some")
    assert leaving(order) == [2, 3, 1]
    order.remove(block_id(1))
    insert(order, 1)
    assert leaving(order) == [2, 3, 1]
    order.release(block_id(1))  # a reason of before
    insert(order, 4)
    assert leaving(order) == [2, 3, 1, 4]


def stored(host: HostTier, number: int) -> HostBlock | None:
    header = BlockHeader()
    header_bytes = encode_header(header)
    extents = host.allocate(SCOPE.domain, NBYTES, len(header_bytes), SCOPE)
    if extents is None:
        return None
    block = HostBlock(block_id(number), header_bytes, header, NBYTES, extents)
    host.insert(block)
    return block


def looks(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[object]:
    """What a method is asked about from now on."""
    asked: list[object] = []
    method = getattr(owner, name)

    def look(block: object, now: float) -> bool:
        asked.append(block)
        return method(block, now)

    monkeypatch.setattr(owner, name, look)
    return asked


def test_room_is_found_without_looking_at_all_that_is_dirty_or_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostTier(4 << 20, make_policy("lhd"), 256 << 10, 0, pin_share=1.0)
    number = 0
    while host.arena.free(SCOPE.domain) >= NBYTES:
        block = stored(host, number)
        assert block is not None
        if number % 4 == 1:
            host.pin(block, time.monotonic() + 60)
        elif number % 4:
            host.soil(block)
        number += 1
    looked = looks(monkeypatch, host, "evictable")
    for extra in range(number // 5):
        assert stored(host, number + extra) is not None
    assert len(looked) == number // 5
    host.check()
    host.arena.close()


def test_a_disk_finds_room_without_looking_at_all_that_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(64 << 20, make_policy("lhd"))
    pinned = 0
    for number in range(200):
        block, shape = block_id(number), shape_of(block_id(number), BlockHeader(), 100_000)
        reservation = index.reserve(SCOPE, shape.cost)
        assert reservation is not None
        index.insert(block, shape)
        index.settle(reservation, shape.cost)
        pinned += index.pin(block, time.monotonic() + (60 if number % 2 else 0.01))
    assert pinned == 200
    time.sleep(0.02)
    looked = looks(monkeypatch, index, "_may_leave")
    gone = index.evict(20 * shape_of(block_id(0), BlockHeader(), 100_000).cost)
    assert gone is not None
    assert len(gone.blocks) == 20 == len(looked)
    assert all(not block.key[-1] % 2 for block, _ in gone.blocks), "pins that have ended keep nothing"
