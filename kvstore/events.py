"""The event log: what came into a tier of this daemon and what left it, numbered, in a ring of bounded length.

Each trust domain has a log of its own, so that nobody learns of the blocks of others, not even how many there are. A
log begins when somebody first asks for it: until then an event costs one look into an empty dict. Numbers have no
hole, one for each block; whoever finds that the ring no longer holds the number after his own has fallen behind
(`kvstore.feed` then gives him a snapshot).

What the Redis tier holds is in no log: it belongs to all daemons, and has a log of its own there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvstore.types import DIGEST_BYTES, BlockId, Gone, Scope, TierCode
from kvstore.watcher import Watcher
from kvstore.wire import messages as m

STORED, REMOVED, HELD = "stored", "removed", "held"


class Entry(NamedTuple):
    """One event. `reason` is None for a block that came."""

    tier: TierCode
    block: BlockId
    nbytes: int
    parent: bytes
    reason: Gone | None


class DomainLog:
    """The events of one trust domain.

    Parameters
    ----------
    capacity : int
        Events kept.

    Attributes
    ----------
    last : int
        Number of the latest event; the first one is 1.
    """

    __slots__ = ("_capacity", "_ring", "_waiters", "last")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ring: list[Entry | None] = [None] * capacity
        self._waiters: list[asyncio.Future[None]] = []
        self.last = 0

    def add(self, entry: Entry) -> None:
        """Number an event and wake those who wait."""
        self.last += 1
        self._ring[self.last % self._capacity] = entry
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def holds(self, after: int) -> bool:
        """Whether every event after that number is still here (or yet to come)."""
        return self.last - self._capacity <= after <= self.last

    def read(self, after: int, limit: int) -> list[Entry]:
        """The events that follow a number, at most so many. Only where `holds` says so."""
        numbers = range(after + 1, min(self.last, after + limit) + 1)
        entries = (self._ring[number % self._capacity] for number in numbers)
        return [entry for entry in entries if entry is not None]

    async def wait(self, after: int, timeout_s: float) -> None:
        """Return once there is an event after that number, or the time is over."""
        if self.last != after or timeout_s <= 0:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            waiter.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    @property
    def waiting(self) -> int:
        """Those who wait for the next event."""
        return len(self._waiters)


class EventLog(Watcher):
    """The logs of all trust domains; tiers tell it of every block.

    Parameters
    ----------
    capacity : int
        Events kept for each domain.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._logs: dict[str, DomainLog] = {}

    def of(self, domain: str) -> DomainLog:
        """The log of a domain. It begins now if it has not yet."""
        log = self._logs.get(domain)
        if log is None:
            log = self._logs[domain] = DomainLog(self._capacity)
        return log

    def stored(self, tier: TierCode, block: BlockId, nbytes: int, parent: bytes) -> None:
        """Note a block that came."""
        log = self._logs.get(block.scope.domain)
        if log is not None:
            log.add(Entry(tier, block, nbytes, parent, None))

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """Note a block that left."""
        log = self._logs.get(block.scope.domain)
        if log is not None:
            log.add(Entry(tier, block, 0, b"", reason))

    def state(self) -> dict[str, int]:
        """Events so far, and who waits for more."""
        logs = self._logs.values()
        return {"logged": sum(log.last for log in logs), "waiting": sum(log.waiting for log in logs)}


def merge(entries: Iterable[Entry], first: int, block_tokens: dict[Scope, int]) -> list[m.Event]:
    """Entries as events on the wire, consecutive ones of one kind joined into one.

    Stored blocks are joined along a chain (each one's parent is the one before), or where no parent is known.

    Parameters
    ----------
    entries : iterable of Entry
        The events.
    first : int
        Number of the first.
    block_tokens : dict
        Tokens in a block of each scope, as far as known.
    """
    return [_event(run, number, block_tokens) for number, run in _runs(entries, first)]


def _runs(entries: Iterable[Entry], first: int) -> Iterator[tuple[int, list[Entry]]]:
    run: list[Entry] = []
    number = first
    for entry in entries:
        if run and (len(run) == m.MAX_KEYS or not _joins(run, entry)):
            yield number, run
            number, run = number + len(run), []
        run.append(entry)
    if run:
        yield number, run


def _joins(run: list[Entry], entry: Entry) -> bool:
    last = run[-1]
    if (entry.tier, entry.reason, entry.block.scope) != (last.tier, last.reason, last.block.scope):
        return False
    if entry.parent == last.block.key:
        return len(run) == 1 or bool(last.parent)
    return not entry.parent and not last.parent


def _event(run: list[Entry], number: int, block_tokens: dict[Scope, int]) -> m.Event:
    head = run[0]
    scope, stored = head.block.scope, head.reason is None
    return m.Event(
        number,
        STORED if stored else REMOVED,
        scope.ns,
        int(head.tier),
        b"".join([entry.block.key for entry in run]),
        [entry.nbytes for entry in run] if stored else [],
        head.parent,
        stored and bool(run[-1].parent),
        block_tokens.get(scope, 0) if stored else 0,
        "" if head.reason is None else head.reason.value,
    )


def count_blocks(event: m.Event) -> int:
    """Blocks that an event is about."""
    return len(event.keys) // DIGEST_BYTES
