"""Carry out a plan: pin each shared prefix before its first use, and unpin it after its last."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from kvstore.client.core import Core
from kvstore.client.effects import Call, Flow
from kvstore.client.replies import join_keys
from kvstore.plan import Plan, Step
from kvstore.types import Namespace
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.client.aio import AsyncKVStoreClient
    from kvstore.client.sync import KVStoreClient


class _Pins:
    """Which pins a plan needs now. Written once for both faces.

    A block can be pinned only once it is stored. So those of a prompt are pinned before it runs, as far as they are
    there, and again after it, and with each later prompt that has them until the daemon says it found them all.
    """

    def __init__(self, core: Core, plan: Plan, namespace: Namespace | None, ttl_s: float) -> None:
        self._core = core
        self._namespace = namespace
        self._ttl_s = ttl_s
        self.plan = plan
        self._pinned: dict[bytes, float] = {}
        """Keys pinned, or meant to be, with the time when the daemon said so; minus infinity if it did not."""
        self._ended: set[int] = set()
        self._through = 0
        """Steps before this one have all ended."""

    def begin(self, number: int) -> Flow[None]:
        step = self.plan.steps[number]
        yield from self._pin(self.plan.keys[step.prompt][: step.shared])

    def end(self, number: int) -> Flow[None]:
        step = self.plan.steps[number]
        self._ended.add(number)
        yield from self._pin(step.begins)
        done: list[bytes] = []
        while self._through in self._ended:
            self._ended.discard(self._through)
            done += self.plan.steps[self._through].ends
            self._through += 1
        yield from self._unpin(done)

    def close(self) -> Flow[None]:
        yield from self._unpin(list(self._pinned))

    def _pin(self, keys: Sequence[bytes]) -> Flow[None]:
        now = time.monotonic()
        wanted = [key for key in keys if now - self._pinned.get(key, -math.inf) > self._ttl_s / 2]
        for some in _batches(wanted):
            joined = join_keys(some)
            self._pinned |= dict.fromkeys(some, -math.inf)
            found = yield from self._core.count(
                self._namespace, lambda ns, joined=joined: Call("pin", m.Pin(ns, joined, self._ttl_s))
            )
            if found == len(some):
                self._pinned |= dict.fromkeys(some, now)

    def _unpin(self, keys: list[bytes]) -> Flow[None]:
        for some in _batches(keys):
            joined = join_keys(some)
            for key in some:
                self._pinned.pop(key, None)
            yield from self._core.count(self._namespace, lambda ns, joined=joined: Call("unpin", m.Unpin(ns, joined)))


def _batches(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[at : at + m.MAX_KEYS] for at in range(0, len(keys), m.MAX_KEYS))


class PlanRun:
    """A plan under way. Iterate over its steps, one after the other; or `begin` and `end` them, several at a time.

    Leaving the ``with`` block unpins whatever is pinned still.
    """

    def __init__(self, client: KVStoreClient, plan: Plan, namespace: Namespace | None, ttl_s: float) -> None:
        self._client = client
        self._pins = _Pins(client.core, plan, namespace, ttl_s)
        self.plan = plan

    def begin(self, number: int) -> Step:
        """Pin what a step shares with others, as far as it is there. Steps must be begun in order."""
        self._client.drive(self._pins.begin(number), None)
        return self.plan.steps[number]

    def end(self, number: int) -> None:
        """A step is done, its blocks are stored: pin those that others need, unpin those that nobody does.

        Steps may end in any order; what one needed is unpinned when all before it have ended, too.
        """
        self._client.drive(self._pins.end(number), None)

    def __iter__(self) -> Iterator[Step]:
        for number in range(len(self.plan.steps)):
            yield self.begin(number)
            self.end(number)

    def close(self) -> None:
        """Unpin everything."""
        self._client.drive(self._pins.close(), None)

    def __enter__(self) -> PlanRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncPlanRun:
    """A plan under way, for asyncio; see `PlanRun`."""

    def __init__(self, client: AsyncKVStoreClient, plan: Plan, namespace: Namespace | None, ttl_s: float) -> None:
        self._client = client
        self._pins = _Pins(client.core, plan, namespace, ttl_s)
        self.plan = plan

    async def begin(self, number: int) -> Step:
        """See `PlanRun.begin`."""
        await self._client.drive(self._pins.begin(number), None)
        return self.plan.steps[number]

    async def end(self, number: int) -> None:
        """See `PlanRun.end`."""
        await self._client.drive(self._pins.end(number), None)

    async def __aiter__(self) -> AsyncIterator[Step]:
        for number in range(len(self.plan.steps)):
            yield await self.begin(number)
            await self.end(number)

    async def close(self) -> None:
        """Unpin everything."""
        await self._client.drive(self._pins.close(), None)

    async def __aenter__(self) -> AsyncPlanRun:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
