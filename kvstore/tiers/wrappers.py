"""Behaviour around a tier, added by wrapping it.

Breaker(DiskTier(...))     answers at once, and asks the tier again later, when it fails or hangs
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from kvstore.tiers.base import Finding, Sized, Tier, Usage
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    LoadOutcome,
    Miss,
    MissReason,
    Scope,
    StoreOutcome,
)
from kvstore.watcher import Watcher

T = TypeVar("T")


class WrappedTier(Tier):
    """A tier that passes everything on to another. Base of wrappers, which change the verbs they are about.

    Parameters
    ----------
    inner : Tier
        The tier that does the work. Name, code and counters are its own.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.code = inner.code
        self.counters = inner.counters
        self.order = inner.order

    async def start(self) -> None:
        await self.inner.start()

    def size(self, block: BlockId) -> int | None:
        return self.inner.size(block)

    def contains(self, scope: Scope, key: bytes) -> bool:
        return self.inner.contains(scope, key)

    def chain(self, block: BlockId) -> str:
        return self.inner.chain(block)

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        return await self.inner.get(block, into)

    async def peek(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        return await self.inner.peek(block, into)

    async def header(self, block: BlockId) -> BlockHeader | None:
        return await self.inner.header(block)

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        return await self.inner.put(block, header, payload, nbytes, durable=durable)

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        return await self.inner.replace(block, header, payload, nbytes)

    async def oldest(self, most: int) -> list[BlockId]:
        return await self.inner.oldest(most)

    async def drop(self, block: BlockId) -> bool:
        return await self.inner.drop(block)

    async def expire(self) -> int:
        return await self.inner.expire()

    async def clear(self, scope: Scope) -> int:
        return await self.inner.clear(scope)

    def touch(self, blocks: Iterable[BlockId]) -> None:
        self.inner.touch(blocks)

    def pin(self, block: BlockId, until: float) -> bool:
        return self.inner.pin(block, until)

    def usage(self) -> Usage:
        return self.inner.usage()

    def pace(self) -> float | None:
        return self.inner.pace()

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        return self.inner.scopes()

    def held(self, scope: Scope) -> Mapping[bytes, Sized]:
        return self.inner.held(scope)

    def watch(self, watcher: Watcher) -> None:
        self.inner.watch(watcher)

    async def describe(self, scope: Scope, text: bytes) -> None:
        await self.inner.describe(scope, text)

    def descriptions(self) -> dict[Scope, bytes]:
        return self.inner.descriptions()

    def describe_state(self) -> dict[str, Any]:
        return self.inner.describe_state()

    async def check(self, fix: bool = False) -> list[Finding]:
        return await self.inner.check(fix)

    async def close(self) -> None:
        await self.inner.close()


class Breaker(WrappedTier):
    """Stop asking a tier that fails or hangs, and try it again after a while.

    Outcomes are counted, not only exceptions: ``Miss(TIER_DOWN)``, ``Dropped(IO_ERROR)``, anything raised, and any
    `get` or `put` that takes longer than the deadline. After `failures` of them in a row the breaker opens: blocks are
    not found, `get` and `put` answer ``TIER_DOWN`` at once. When the time is over one call is let through; if it does
    well the breaker closes, else it opens for twice as long.

    A call that hangs is not cut off, since a thread may still be using the caller's buffers: the caller waits or gives
    up by its own deadline. But it opens the breaker for everybody else.

    Parameters
    ----------
    inner : Tier
        The tier.
    failures : int
        Failures in a row that open it.
    deadline_s : float
        How long one `get` or `put` may take.
    open_s, max_open_s : float
        How long it is open at first, and at most.
    clock : callable
        Monotonic seconds.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        failures: int = 5,
        deadline_s: float = 10.0,
        open_s: float = 1.0,
        max_open_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._limit = failures
        self._deadline_s = deadline_s
        self._first_open_s = self._open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._numbers = itertools.count()
        self._in_flight: dict[int, float] = {}  # started at, oldest first; overdue calls are judged and taken out
        self._trial: int | None = None
        self._open = False
        self._until = 0.0
        self._since = clock()
        self._failures = 0
        self._reason = ""

    # -- what passes ---------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Payload bytes of the block if it is there and the tier is being asked."""
        return self.inner.size(block) if self._would_pass() else None

    def contains(self, scope: Scope, key: bytes) -> bool:
        """Whether the block is there and the tier is being asked."""
        return self._would_pass() and self.inner.contains(scope, key)

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """As the tier, or ``Miss(TIER_DOWN)`` at once."""
        if not self._would_pass():
            self.counters.misses += 1
            return Miss(MissReason.TIER_DOWN)
        return await self._judged("get", self.inner.get(block, into))

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """As the tier, or ``Dropped(TIER_DOWN)`` at once."""
        if not self._would_pass():
            self.counters.drop(DropReason.TIER_DOWN)
            return Dropped(DropReason.TIER_DOWN)
        return await self._judged("put", self.inner.put(block, header, payload, nbytes, durable=durable))

    def describe_state(self) -> dict[str, Any]:
        """State of the tier, and `breaker`: its state, seconds in it, why it opened last, failures in a row."""
        self._look_for_hangs()
        state = "closed" if not self._open else "half_open" if self._clock() >= self._until else "open"
        breaker = {
            "state": state,
            "since_s": round(self._clock() - self._since, 3),
            "reason": self._reason,
            "failures": self._failures,
        }
        return {**self.inner.describe_state(), "breaker": breaker}

    # -- judging -------------------------------------------------------------------------------------------------------

    def _would_pass(self) -> bool:
        self._look_for_hangs()
        return not self._open or (self._trial is None and self._clock() >= self._until)

    async def _judged(self, verb: str, call: Awaitable[T]) -> T:
        number = next(self._numbers)
        self._in_flight[number] = self._clock()
        if self._open:
            self._trial = number
        try:
            outcome = await call
        except asyncio.CancelledError:
            self._in_flight.pop(number, None)
            if self._trial == number:  # no verdict: the next call is the trial
                self._trial = None
            raise
        except Exception as error:
            self._ended(number, f"{verb} failed: {error}")
            raise
        self._ended(number, _failure(verb, outcome))
        return outcome

    def _ended(self, number: int, failure: str) -> None:
        began = self._in_flight.pop(number, None)
        if began is None:
            return  # it was overdue and has been judged
        took = self._clock() - began
        if not failure and took > self._deadline_s:
            failure = f"a call took {took:.1f} s"
        if failure:
            self._failed(failure, number == self._trial)
        elif number == self._trial:
            self._close()
        elif not self._open:
            self._failures = 0

    def _look_for_hangs(self) -> None:
        """Judge calls that are still running after their deadline."""
        late = self._clock() - self._deadline_s
        while self._in_flight:
            number, began = next(iter(self._in_flight.items()))
            if began >= late:
                return
            del self._in_flight[number]
            self._failures = max(self._failures, self._limit - 1)  # one that hangs is enough
            self._failed(f"a call has not ended for {self._deadline_s:g} s", number == self._trial)

    def _failed(self, reason: str, trial: bool) -> None:
        self._failures += 1
        if trial:
            self._trial = None
            self._open_s = min(2 * self._open_s, self._max_open_s)
        elif self._open or self._failures < self._limit:
            return
        else:
            self._since = self._clock()
        self._open = True
        self._reason = reason
        self._until = self._clock() + self._open_s

    def _close(self) -> None:
        self._open = False
        self._trial = None
        self._failures = 0
        self._open_s = self._first_open_s
        self._since = self._clock()


def _failure(verb: str, outcome: object) -> str:
    """What a failure says; empty for every outcome that means the tier does its work."""
    if isinstance(outcome, Miss) and outcome.reason == MissReason.TIER_DOWN:
        return f"{verb}: {outcome.reason}"
    if isinstance(outcome, Dropped) and outcome.reason in (DropReason.IO_ERROR, DropReason.TIER_DOWN):
        return f"{verb}: {outcome.reason}"
    return ""
