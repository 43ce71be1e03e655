"""Answers subscribers: events after the number they name, or a snapshot first where those are not known any more.

A subscriber asks, and asks again; nothing is pushed. So one that is slow, or gone, costs nothing: his place in the log
is a number that he keeps himself. Only a snapshot under way is kept here, one a subscriber, and of it just the keys of
the namespace that is being listed.

A snapshot is read while the world goes on. That is right in the end: it begins at the number of the latest event, the
events after that number follow it, and whatever they are about they set right.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from weakref import WeakKeyDictionary

from kvstore.chain import Holdings
from kvstore.events import HELD, DomainLog, EventLog, merge
from kvstore.namespaces import NamespaceRegistry
from kvstore.types import Scope, TierCode
from kvstore.wire import messages as m


class Snapshot:
    """What a domain has where, in pages.

    Attributes
    ----------
    id : int
        By which its next page is asked for.
    after : int
        Number of the latest event when it began.
    """

    def __init__(self, domain: str, holdings: Holdings, after: int, tokens: Callable[[Scope], int]) -> None:
        self.id = secrets.randbits(62) + 1
        self.after = after
        self._tokens = tokens
        self._sources = [
            (tier, scope, held)
            for tier, (scopes, held) in holdings.items()
            for scope in list(scopes())
            if scope.domain == domain
        ]
        self._keys: Iterator[bytes] | None = None

    def page(self, limit: int) -> list[m.Event]:
        """The next blocks, at most so many; none if that was all."""
        events: list[m.Event] = []
        while limit and self._sources:
            tier, scope, held = self._sources[-1]
            now = held(scope)
            if self._keys is None:
                self._keys = iter(list(now))
            keys = list(islice(self._keys, limit))
            there = [(key, now[key].nbytes) for key in keys if key in now]  # the log tells what became of the others
            if there:
                events.append(self._event(tier, scope, there))
            if len(keys) < limit:
                self._sources.pop()
                self._keys = None
            limit -= len(keys)
        return events

    @property
    def done(self) -> bool:
        """Whether there are no more pages."""
        return not self._sources

    def _event(self, tier: TierCode, scope: Scope, blocks: list[tuple[bytes, int]]) -> m.Event:
        keys = b"".join([key for key, _ in blocks])
        sizes = [nbytes for _, nbytes in blocks]
        return m.Event(self.after, HELD, scope.ns, int(tier), keys, sizes, b"", False, self._tokens(scope))


class Feed:
    """The verb `events`.

    Parameters
    ----------
    log : EventLog
        Where the tiers write.
    holdings : Holdings
        What is where now.
    namespaces : NamespaceRegistry
        Says how many tokens a block has.
    boot : bytes
        Which life of the daemon this is: numbers of another mean nothing here.
    """

    def __init__(self, log: EventLog, holdings: Holdings, namespaces: NamespaceRegistry, boot: bytes) -> None:
        self._log = log
        self._holdings = holdings
        self._namespaces = namespaces
        self.boot = boot
        self._snapshots: WeakKeyDictionary[object, Snapshot] = WeakKeyDictionary()
        self._gaps = self._begun = self._sent = 0

    def answer(self, subscriber: object, domain: str, p: m.Events) -> m.EventsReply | Awaitable[m.EventsReply]:
        """The reply to a subscriber; where there is nothing to tell yet and he would wait, an awaitable one."""
        log = self._log.of(domain)
        if p.snapshot:
            under_way = self._snapshots.get(subscriber)
            if under_way is not None and under_way.id == p.snapshot and p.boot == self.boot:
                return self._page(subscriber, under_way, p.limit, reset=False)
            return self._begin(subscriber, domain, log, p.limit)
        if p.boot != self.boot or not log.holds(p.after):
            self._gaps += p.boot == self.boot
            return self._begin(subscriber, domain, log, p.limit)
        if p.after == log.last and p.wait_s > 0:
            return self._later(subscriber, domain, log, p)
        return self._events(log, p)

    async def _later(self, subscriber: object, domain: str, log: DomainLog, p: m.Events) -> m.EventsReply:
        await log.wait(p.after, p.wait_s)
        if not log.holds(p.after):  # so much happened before this could go on
            self._gaps += 1
            return self._begin(subscriber, domain, log, p.limit)
        return self._events(log, p)

    def _events(self, log: DomainLog, p: m.Events) -> m.EventsReply:
        entries = log.read(p.after, p.limit)
        self._sent += len(entries)
        tokens = {scope: self._tokens(scope) for scope in {entry.block.scope for entry in entries}}
        events = merge(entries, p.after + 1, tokens)
        return m.EventsReply(self.boot, p.after + len(entries), False, 0, events)

    def _begin(self, subscriber: object, domain: str, log: DomainLog, limit: int) -> m.EventsReply:
        self._begun += 1
        snapshot = Snapshot(domain, self._holdings, log.last, self._tokens)
        return self._page(subscriber, snapshot, limit, reset=True)

    def _page(self, subscriber: object, snapshot: Snapshot, limit: int, *, reset: bool) -> m.EventsReply:
        events = snapshot.page(limit)
        if snapshot.done:
            self._snapshots.pop(subscriber, None)
        else:
            self._snapshots[subscriber] = snapshot
        return m.EventsReply(self.boot, snapshot.after, reset, 0 if snapshot.done else snapshot.id, events)

    def _tokens(self, scope: Scope) -> int:
        fields = self._namespaces.fields(scope)
        return 0 if fields is None else fields.block_tokens

    def state(self) -> dict[str, int]:
        """What subscribers cost and get."""
        return self._log.state() | {"sent": self._sent, "gaps": self._gaps, "snapshots": self._begun}
