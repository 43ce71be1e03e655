"""The host tier: it evicts when memory is asked for, never what somebody needs, and stays within its budget."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.arena import PAGE_BYTES
from kvstore.errors import InternalError
from kvstore.eviction import make_policy
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import INDEX_BYTES, HostBlock, encode_header
from kvstore.types import BlockHeader, BlockId, Scope

CAPACITY = 1 << 20
SLAB = 256 * 1024
A, B = Scope("uid-1", b"a" * 32), Scope("uid-2", b"b" * 32)


def tier(capacity: int = CAPACITY) -> HostTier:
    return HostTier(capacity, make_policy("lru"), SLAB, 0, pin_share=1.0)


@pytest.fixture
def host() -> Iterator[HostTier]:
    made = tier()
    yield made
    made.check()
    made.arena.close()


def block_id(number: int, scope: Scope = A) -> BlockId:
    return BlockId(scope, hashlib.sha256(str(number).encode()).digest())


def put(
    host: HostTier, number: int, nbytes: int = PAGE_BYTES, scope: Scope = A, header: BlockHeader | None = None
) -> HostBlock | None:
    """Store a block, or not if there is no room."""
    header_bytes = encode_header(header or BlockHeader())
    extents = host.allocate(scope.domain, nbytes, len(header_bytes))
    if extents is None:
        return None
    block = HostBlock(block_id(number, scope), header_bytes, header or BlockHeader(), nbytes, extents)
    host.insert(block)
    return block


def fill(host: HostTier, nbytes: int = PAGE_BYTES) -> list[HostBlock]:
    """Store until the first eviction would be needed."""
    blocks: list[HostBlock] = []
    while host.arena.free("uid-1") >= nbytes and host.index_bytes + INDEX_BYTES + 1 <= host.index_capacity:
        block = put(host, len(blocks), nbytes)
        assert block is not None
        blocks.append(block)
    return blocks


def numbers(host: HostTier, count: int = 200) -> list[int]:
    """Which of the first blocks are there."""
    return [number for number in range(count) if host.get(block_id(number)) is not None]


def test_it_evicts_on_demand_and_the_oldest_first(host: HostTier) -> None:
    blocks = fill(host, 2 * PAGE_BYTES)
    assert len(blocks) == host.arena.capacity // (2 * PAGE_BYTES)
    assert host.counters.evicted == 0
    assert put(host, 1000, 5 * PAGE_BYTES) is not None
    assert host.counters.evicted == 3
    assert numbers(host) == list(range(3, len(blocks)))


def test_it_evicts_all_it_needs_or_nothing(host: HostTier) -> None:
    blocks = fill(host, 2 * PAGE_BYTES)
    for block in blocks[2:]:
        host.acquire([block])
    assert put(host, 1000, 5 * PAGE_BYTES) is None
    assert numbers(host) == list(range(len(blocks)))
    assert put(host, 1000, 4 * PAGE_BYTES) is not None
    assert numbers(host) == list(range(2, len(blocks)))


@pytest.mark.parametrize("why", ["leased", "dirty", "pinned"])
def test_what_is_needed_stays(host: HostTier, why: str) -> None:
    blocks = fill(host, 2 * PAGE_BYTES)
    kept, rest = blocks[:5], blocks[5:]
    for block in kept:
        if why == "leased":
            host.acquire([block])
        elif why == "dirty":
            host.soil(block)
        else:
            host.pin(block, time.monotonic() + 60)
    stored = 0
    for number in range(1000, 1100):
        stored += put(host, number, 2 * PAGE_BYTES) is not None
    assert stored == 100
    assert all(not block.gone for block in kept)
    assert all(block.gone for block in rest)
    for block in kept:
        if why == "leased":
            host.unacquire([block])
        elif why == "dirty":
            host.clean(block)
        else:
            host.pin(block, 0.0)
    for number in range(2000, 2100):
        put(host, number, 2 * PAGE_BYTES)
    assert all(block.gone for block in kept)


def test_a_pin_ends_by_itself(host: HostTier) -> None:
    blocks = fill(host, 2 * PAGE_BYTES)
    for block in blocks:
        host.pin(block, time.monotonic() + 0.05)
    assert put(host, 1000, 2 * PAGE_BYTES) is None
    time.sleep(0.06)
    assert put(host, 1000, 2 * PAGE_BYTES) is not None


def test_pins_are_bounded_and_make_room_when_they_end() -> None:
    host = HostTier(CAPACITY, make_policy("lru"), SLAB, 0, pin_share=0.5)
    blocks = fill(host, 2 * PAGE_BYTES)
    granted = [block for block in blocks if host.pin(block, time.monotonic() + 0.1)]
    assert 0 < sum(block.footprint for block in granted) <= host.arena.capacity // 2
    assert host.pins.refused == len(blocks) - len(granted) > 0
    assert put(host, 1000, 2 * PAGE_BYTES) is not None, "the other half still works"
    assert host.pin(granted[0], time.monotonic() + 0.1), "one that is pinned may be pinned for longer"
    assert host.pin(granted[1], 0.0)
    assert host.pin(next(host.all_blocks()), time.monotonic() + 0.1), "what was unpinned made room"
    time.sleep(0.11)
    assert host.pin(max(host.all_blocks(), key=lambda block: host.pins.until(block.id) == 0), time.monotonic() + 1)
    host.check()
    host.arena.close()


def test_a_pinned_block_that_is_dropped_is_forgotten(host: HostTier) -> None:
    """With all it takes, also if nobody ever asks how much is pinned."""
    for number in range(10):
        block = put(host, number)
        assert block is not None
        host.pin(block, time.monotonic() + 60)
        assert host.breakdown()["pinned_bytes"] == PAGE_BYTES
        host.remove(block)
    assert not len(host.pins)


def test_a_dropped_block_keeps_its_memory_while_it_is_read(host: HostTier) -> None:
    block = put(host, 1, 3 * PAGE_BYTES)
    assert block is not None
    for view in host.arena.views(block.extents):
        view[:] = bytes([7]) * len(view)
    host.acquire([block])
    host.acquire([block])
    host.soil(block)
    host.remove(block)
    assert host.get(block.id) is None
    host.check()
    fill(host)
    assert all(bytes(view) == bytes([7]) * len(view) for view in host.arena.views(block.extents))
    host.unacquire([block])
    host.clean(block)
    host.check()
    assert block.extents
    host.unacquire([block])
    assert block.extents == ()


def test_tail_before_head(host: HostTier) -> None:
    """The blocks of a prompt are of no use once the one before them is gone."""
    blocks = fill(host, 2 * PAGE_BYTES)
    prompt = blocks[:6]
    host.touch(prompt)
    for block in blocks[6:]:
        host.acquire([block])
    for left in range(5, -1, -1):
        assert put(host, 1000 + left, 2 * PAGE_BYTES) is not None
        for block in blocks[6:]:
            assert not block.gone
        host.acquire([host.get(block_id(1000 + left))])  # type: ignore[list-item]
        assert [block.gone for block in prompt] == [n >= left for n in range(6)]


def test_the_index_has_a_budget_of_its_own(host: HostTier) -> None:
    """Many tiny blocks are bounded by what their entries cost, long before their bytes fill memory."""
    host.index_capacity = 10 * (INDEX_BYTES + 1)
    for number in range(50):
        assert put(host, number, 1) is not None
        assert host.index_bytes <= host.index_capacity
        host.check()
    assert numbers(host) == list(range(40, 50))


def test_headers_count(host: HostTier) -> None:
    header = BlockHeader(tokens=b"t" * 4096)
    cost = INDEX_BYTES + len(encode_header(header))
    for number in range(50):
        put(host, number, 1, header=header)
        assert host.index_bytes <= host.index_capacity
    assert len(numbers(host)) == host.index_capacity // cost
    assert put(host, 99, 1, header=BlockHeader(tokens=b"t" * host.index_capacity)) is None


def test_a_header_that_becomes_known_late_is_charged(host: HostTier) -> None:
    extents = host.allocate("uid-1", 1)
    assert extents is not None
    assert not host.charge_header(host.index_capacity)
    assert host.charge_header(100)
    host.free(extents, 100)
    assert host.index_bytes == 0


def test_a_block_larger_than_the_tier_is_not_worth_evicting_for(host: HostTier) -> None:
    blocks = fill(host)
    assert host.allocate("uid-1", host.arena.capacity + 1) is None
    assert len(numbers(host)) == len(blocks)
    extents = host.allocate("uid-1", host.arena.capacity)
    assert extents is not None
    assert numbers(host) == []
    host.free(extents)


def test_one_domain_evicts_the_other_only_where_slabs_can_move(host: HostTier) -> None:
    for number in range(31):
        assert put(host, number, 2 * PAGE_BYTES) is not None
    slabs = {extent.slab for block in host.all_blocks() for extent in block.extents}
    for slab in slabs:
        host.arena.hold(slab, session=1)
    assert put(host, 500, PAGE_BYTES, B) is None
    assert host.counters.evicted == 31 - len(numbers(host))
    before = len(numbers(host))
    host.arena.unhold(session=1)
    assert put(host, 500, PAGE_BYTES, B) is not None
    assert len(numbers(host)) < before


def test_a_key_is_there_once(host: HostTier) -> None:
    assert put(host, 1) is not None
    with pytest.raises(InternalError, match="twice"):
        put(host, 1)


def test_check_finds_a_wrong_count(host: HostTier) -> None:
    block = put(host, 1)
    assert block is not None
    for field, wrong in (("used_bytes", 1), ("leased_bytes", PAGE_BYTES), ("dirty_bytes", -1)):
        setattr(host, field, getattr(host, field) + wrong)
        with pytest.raises(InternalError):
            host.check()
        setattr(host, field, getattr(host, field) - wrong)
    block.refs = -1
    with pytest.raises(InternalError):
        host.check()
    block.refs = 0
    host.order.remove(block.id)
    with pytest.raises(InternalError, match="policy"):
        host.check()
    host.order.insert(block.id, block.nbytes, cost=1.0, parent=None)


@given(st.integers(1, 1 << 22), st.integers(1 << 14, 1 << 20))
def test_the_budget_covers_index_and_arena(capacity: int, slab: int) -> None:
    if capacity - capacity // 32 < PAGE_BYTES:
        return
    host = HostTier(capacity, make_policy("lru"), slab, 0)
    assert host.arena.capacity + host.index_capacity <= capacity
    host.arena.close()


class HostMachine(RuleBasedStateMachine):
    """Any order of what the service does to the host tier, of two domains."""

    @initialize()
    def make(self) -> None:
        self.host = tier()
        self.next = 0
        self.leased: list[HostBlock] = []
        self.dirty: list[HostBlock] = []
        self.lent: list[tuple[Scope, tuple, int]] = []

    @rule(scope=st.sampled_from([A, B]), nbytes=st.integers(1, 400_000), header=st.integers(0, 3000))
    def allocate(self, scope: Scope, nbytes: int, header: int) -> None:
        held = [block for block in (*self.leased, *self.dirty) if not block.gone]
        extents = self.host.allocate(scope.domain, nbytes, header)
        assert all(not block.gone for block in held)
        if extents is not None:
            self.lent.append((scope, extents, header))

    @precondition(lambda self: self.lent)
    @rule(commit=st.booleans(), dirty=st.booleans())
    def settle(self, commit: bool, dirty: bool) -> None:
        scope, extents, header = self.lent.pop()
        if not commit:
            self.host.free(extents, header)
            return
        self.next += 1
        nbytes = sum(e.nbytes for e in extents)
        block = HostBlock(block_id(self.next, scope), bytes(header), BlockHeader(), nbytes, extents)
        self.host.insert(block)
        if dirty:
            self.host.soil(block)
            self.dirty.append(block)

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        blocks = list(self.host.all_blocks())
        if blocks:
            block = data.draw(st.sampled_from(range(len(blocks))))
            self.host.acquire([blocks[block]])
            self.host.touch([blocks[block]])
            self.leased.append(blocks[block])

    @precondition(lambda self: self.leased)
    @rule()
    def release(self) -> None:
        self.host.unacquire([self.leased.pop(0)])

    @precondition(lambda self: self.dirty)
    @rule()
    def clean(self) -> None:
        self.host.clean(self.dirty.pop(0))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        blocks = list(self.host.all_blocks())
        if blocks:
            self.host.remove(blocks[data.draw(st.integers(0, len(blocks) - 1))])

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "host"):
            self.host.check()
            assert self.host.usage().used <= CAPACITY
            assert sum(count for count, _ in self.host.scopes().values()) == len(self.host.order)

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.arena.close()


TestHostMachine = HostMachine.TestCase
