"""Leases and reservations that end while something waits, expire, or are too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from daemons import NS, SMALL, key, payload
from service_kit import House, at

from kvstore.errors import ForeignHandle, HandshakeRequired, LeaseExpired, LimitExceeded, TierDown
from kvstore.leases import Session
from kvstore.service import MAX_HANDLES, MAX_LENT
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.types import BlockHeader, BlockId, Dropped, Hit, LoadOutcome, Scope, Stored, TierCode
from kvstore.wire import messages as m


class Gate(Tier):
    """A lower tier that takes as long as it is told for what it is given, and keeps none of that."""

    name = "gate"
    code = TierCode.DISK

    def __init__(self) -> None:
        self.counters = TierCounters()
        self.open = asyncio.Event()
        self.drop_error: Exception | None = None
        self.asked: list[BlockId] = []
        self.here: dict[BlockId, bytes] = {}

    def size(self, block: BlockId) -> int | None:
        return len(self.here[block]) if block in self.here else None

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        content = memoryview(self.here[block])
        for view in into:
            view[:], content = content[: len(view)], content[len(view) :]
        return Hit(BlockHeader(), len(self.here[block]))

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> Stored | Dropped:
        self.asked.append(block)
        await self.open.wait()
        return Stored()

    async def drop(self, block: BlockId) -> bool:
        if self.drop_error is not None and block in self.asked:
            raise self.drop_error
        return False

    async def clear(self, scope: Scope) -> int:
        return 0

    def touch(self, blocks: Iterable[BlockId]) -> None: ...

    def pin(self, block: BlockId, until: float) -> bool:
        return False

    def usage(self) -> Usage:
        return Usage(0, 0, 0)

    async def check(self, fix: bool = False) -> list[Finding]:
        return []

    async def close(self) -> None: ...


async def fill(house: House, session: Session) -> int:
    """Store until memory is full of blocks that the lower tier has yet to be told of; how many there are."""
    stored = 0
    while await house.put(session, key(stored, "filling")) == ["stored"]:
        stored += 1
    return stored


@pytest.mark.parametrize("ending", ["abort", "commit", "close", "nothing"])
async def test_a_reservation_that_ends_while_it_waits_leaks_nothing(ending: str) -> None:
    """Ids can be guessed, so a client can end its own reservation before it was told of it."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    stored = await fill(house, a)
    assert stored >= 16
    waiting = asyncio.ensure_future(house.reserve(a, *[m.Offer(key(n), SMALL) for n in range(3)], wait_s=20))
    while not a.reservations:
        await asyncio.sleep(0)
    (reservation,) = a.reservations
    endings: dict[str, Callable[[], Any]] = {
        "abort": lambda: house.ask(a, m.Abort(reservation)),
        "commit": lambda: house.ask(a, m.Commit(reservation, [])),
        "close": lambda: house.service.ledger.close(a),
        "nothing": lambda: None,
    }
    endings[ending]()
    gate.open.set()
    reply = await waiting
    if ending == "nothing":
        assert [room.index for room in reply.rooms] == [0, 1, 2]
        house.ask(a, m.Abort(reservation))
    else:
        assert reply.rooms == []
    assert await house.chain.drain(5) == 0
    assert house.service.ledger.in_flight == {}
    assert house.service.ledger.reservations == {}
    assert house.host.arena.used() == house.host.used_bytes
    house.check()


async def test_a_store_refused_in_a_burst_costs_no_walk_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be evicted nobody looks for it, or a burst would hold up everybody else."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    stored = await fill(house, a)
    walks: list[int] = []
    order = house.host.order.victims
    monkeypatch.setattr(house.host.order, "victims", lambda *args: walks.append(1) or order(*args))
    reply = await house.reserve(a, *[m.Offer(key(n, "burst"), SMALL) for n in range(100)])
    assert {other.status for other in reply.others} == {"host_full"}
    assert len(reply.others) == 100
    assert walks == []
    gate.open.set()
    assert await house.chain.drain(5) == 0
    reply = await house.reserve(a, *[m.Offer(key(n, "burst"), SMALL) for n in range(stored)])
    assert len(reply.rooms) == stored
    assert walks
    house.check()


async def test_what_is_below_can_be_had_while_memory_waits_to_be_written() -> None:
    """A block that was acknowledged and has gone down is readable also in the middle of a burst."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    scope = house.service.namespaces.find("uid-1", NS).scope
    gate.here[BlockId(scope, key(1, "below"))] = payload(key(1, "below"))
    await fill(house, a)
    lease = house.ask(a, m.Lease(NS, key(1, "below")))
    assert (lease.granted, lease.refused, lease.pending) == ([], [], 1)
    for _ in range(20):
        await asyncio.sleep(0)
    assert house.told == []
    gate.open.set()
    async with asyncio.timeout(5):
        while not house.told:
            await asyncio.sleep(0)
    ((method, notice),) = house.told
    assert method == "leased"
    assert isinstance(notice, m.LeaseNotice)
    assert notice.refused == []
    (view,) = house.host.arena.views(at(notice.granted[0].extents))
    assert bytes(view) == payload(key(1, "below"))
    assert await house.chain.drain(5) == 0
    house.check()


async def test_waiting_for_room_while_the_last_write_ends() -> None:
    """The write may end between the refusal and the wait for it."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    await fill(house, a)
    made: Any = house.service.call(a, "reserve", m.Reserve(NS, [m.Offer(key(1), SMALL)], 30.0, 20.0))
    gate.open.set()
    assert await house.chain.drain(5) == 0
    reply = await made
    assert [room.index for room in reply.rooms] == [0]
    house.check()


async def test_a_lower_tier_that_cannot_forget_does_not_hold_memory() -> None:
    """A block dropped while it was being written is to be dropped below as well; if that fails memory still returns."""
    gate = Gate()
    house = House(1 << 20, [gate])
    a = house.session("uid-1")
    reply = await house.reserve(a, m.Offer(key(1), SMALL))
    committed: Any = house.service.call(a, "commit", m.Commit(reply.reservation, [0], True))
    waiting = asyncio.ensure_future(committed)
    while not gate.asked:
        await asyncio.sleep(0)
    gate.drop_error = TierDown("the gate does not forget.")
    with pytest.raises(TierDown):
        await house.service.drop(a, m.Drop(NS, key(1)))
    gate.open.set()
    async with asyncio.timeout(5):
        assert (await waiting).outcomes == [m.Outcome(0, "not_durable")]
    assert await house.chain.drain(5) == 0
    assert house.host.arena.used() == 0
    house.check()


async def test_a_lease_that_has_expired_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    a = house.session("uid-1")
    far = house.session("uid-1", remote=True)
    await house.put(a, key(1), key(2))
    far.greeted = True
    lease = house.ask(far, m.Lease(NS, key(1), 0.5))
    assert len(house.service.payload(far, m.Fetch(lease.lease, 0))[1]) == 1
    late = time.monotonic() + 0.5 + 1.1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    with pytest.raises(LeaseExpired):
        house.service.payload(far, m.Fetch(lease.lease, 0))
    house.service.ledger.expire()
    assert house.service.ledger.leases == {}
    with pytest.raises(ForeignHandle):
        house.service.payload(far, m.Fetch(lease.lease, 0))
    house.check()


async def test_an_expired_reservation_stores_nothing_and_its_memory_waits_for_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that is still running must not land in somebody else's block."""
    house = House()
    a, b = house.session("uid-1"), house.session("uid-1")
    reply = await house.reserve(a, m.Offer(key(1), SMALL))
    late = time.monotonic() + 30 + 1.1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    house.service.ledger.expire()
    used = house.host.arena.used()
    assert used == SMALL
    assert await house.put(b, key(1)) == ["stored"]  # others may store it meanwhile, elsewhere
    assert house.host.arena.used() == 2 * SMALL
    with pytest.raises(LeaseExpired):
        house.ask(a, m.Commit(reply.reservation, [0]))
    assert house.host.arena.used() == SMALL
    house.check()


async def test_limits_of_one_session() -> None:
    house = House()
    a = house.session("uid-1")
    for _ in range(MAX_HANDLES):
        house.ask(a, m.Lease(NS, b""))
    with pytest.raises(LimitExceeded):
        house.ask(a, m.Lease(NS, b""))
    house.ask(a, m.Release(list(a.leases)))
    house.ask(a, m.Lease(NS, b""))


async def test_blocks_lent_to_one_session_are_bounded() -> None:
    """A block may be leased many times over, but what the daemon remembers of that is bounded."""
    house = House()
    a, b = house.session("uid-1"), house.session("uid-1")
    await house.put(a, key(1))
    many = m.Lease(NS, key(1) * m.MAX_KEYS)
    leases = [house.ask(a, many).lease for _ in range(MAX_LENT // m.MAX_KEYS)]
    for too_many in (many, m.Lease(NS, key(1))):
        with pytest.raises(LimitExceeded):
            house.ask(a, too_many)
    assert len(house.ask(b, many).granted) == m.MAX_KEYS
    house.ask(a, m.Release(leases[:1]))
    assert len(house.ask(a, many).granted) == m.MAX_KEYS
    house.service.ledger.close(a)
    house.service.ledger.close(b)
    assert (a.lent, b.lent) == (0, 0)
    house.check()


async def test_nothing_before_hello() -> None:
    house = House()
    session = house.service.ledger.open("uid-1", False, lambda *_: None)
    for method in m.METHODS:
        if method != "hello":
            with pytest.raises(HandshakeRequired):
                house.service.call(session, method, m.Empty())


async def test_a_dropped_block_is_readable_by_who_leased_it_and_by_nobody_else() -> None:
    house = House()
    a = house.session("uid-1")
    await house.put(a, key(1))
    lease = house.ask(a, m.Lease(NS, key(1)))
    assert await house.service.drop(a, m.Drop(NS, key(1))) == m.CountReply(1)
    assert house.ask(a, m.Lookup(NS, key(1))).tiers == b""
    (view,) = house.host.arena.views(at(lease.granted[0].extents))
    assert bytes(view) == payload(key(1))
    house.check()
    view.release()
    house.ask(a, m.Release([lease.lease]))
    assert house.host.arena.used() == 0
    house.check()
