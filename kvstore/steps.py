"""Blocks of an encoded tier on their way down the ladder, and up again: the least valuable become smaller for room, one
that was used takes over a better copy from a tier further down.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

from kvstore.encoding import Encoded, Encoding, Form, pages
from kvstore.errors import CodecError, ConfigError, CorruptBlock
from kvstore.standing import Standing
from kvstore.tiers.base import Tier
from kvstore.types import BlockId, Dropped, DropReason, Exists, Hit, Scope, Stored

NEARLY_FULL = 0.95
"""Share of the capacity from which blocks step down."""
STEPS_A_PUT = 8
"""Most blocks that step down for one that comes in."""
STEP_S = 2.0
"""How long one that comes in waits for others to step down: slow chains must not hold up what is stored."""
LOOK = 1024
"""Blocks, in the order of eviction, among which the next to step down are looked for."""
MOST = 64
"""Blocks that are chosen at a time to step down."""
FEW = 16
"""The same in a tier that others share."""
REST_S = 5.0
"""How long it is not looked again in a tier that others share, after nothing was found there."""
MOST_LOWEST = 1 << 16
"""Blocks of such a tier that are remembered to stand on their last rung."""
MARGIN = 16
"""A copy that is larger by less than one part in so many is taken to stand on the same rung."""
HEADER_ROOM = 64 << 10
"""Bytes that a file may have beside the payload."""
SPARE = 64


class Note(Protocol):
    """Told how a block was stored."""

    def __call__(self, block: BlockId, encoded: Encoded, form: Form, *, may_step: bool) -> None: ...


class Steps:
    """The steps of one tier's blocks.

    Parameters
    ----------
    tier : Tier
        What keeps the encoded blocks, and counts their bytes.
    encoding : Encoding
    standing : Standing
        Which blocks stand where.
    form : callable
        Form of the blocks of a scope, if they are of a layout that codecs know.
    work : callable
        Runs a function in a codec thread.
    note : Note
    """

    def __init__(
        self,
        tier: Tier,
        encoding: Encoding,
        standing: Standing,
        form: Callable[[Scope], Form | None],
        work: Callable[..., Awaitable[Any]],
        note: Note,
    ) -> None:
        self._tier = tier
        self._encoding = encoding
        self._standing = standing
        self._form = form
        self._work = work
        self._note = note
        self._lock = asyncio.Lock()
        self._next: list[BlockId] = []
        self._shared = tier.order is None
        self._rest = 0.0
        self._coming = self._storing = 0
        self._stored = asyncio.Event()
        self._lowest: dict[BlockId, int] = {}
        self.pins: dict[BlockId, float] = {}
        self.down = self.lost = self.freed = self.up = 0

    def pin(self, block: BlockId, until: float) -> None:
        """Leave a block where it stands until a monotonic time."""
        self.pins.pop(block, None)
        if until and self._standing.may_step(block):  # no other block is ever changed
            if len(self.pins) > 2 * self._standing.can_step + SPARE:
                self._forget_pins()
            self.pins[block] = until

    def _forget_pins(self) -> None:
        """Drop pins that are over, or of blocks that left."""
        now, standing = time.monotonic(), self._standing
        self.pins = {b: until for b, until in self.pins.items() if until > now and standing.may_step(b)}

    # -- down ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def room_for(self, nbytes: int, *, may_step: bool) -> AsyncIterator[None]:
        """Make room for a block, and count it until it is stored: many come in at once, and all see the same room."""
        self._coming += nbytes
        try:
            await self._make_room(0)
            self._storing += may_step
            try:
                yield
            finally:
                self._storing -= may_step
                self._stored.set()
        finally:
            self._coming -= nbytes

    async def _make_room(self, nbytes: int) -> None:
        """Have the least valuable lossy blocks step down, until there is room or all are on the last rung."""
        may = time.monotonic() > self._rest if self._shared else self._standing.can_step or self._storing
        if not may or not self._is_tight(nbytes):
            return
        async with self._lock:
            self._forget_pins()
            until = time.monotonic() + STEP_S
            for _ in range(STEPS_A_PUT):
                if not self._next:  # looking is far dearer than stepping
                    self._next = await self._of_all() if self._shared else self._of_own()
                left = until - time.monotonic()
                if not self._is_tight(nbytes) or left <= 0:
                    return
                if self._next:
                    await self.step(self._next.pop(0))
                elif self._storing and not self._shared:  # what is being stored now can step when it is here
                    self._stored.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stored.wait(), left)
                else:
                    return

    def _of_own(self) -> list[BlockId]:
        """Blocks to step down next, of a tier that is this daemon's alone."""
        order = self._tier.order
        victims = (block for block, _ in order.victims(None, 0, lambda _: 1)) if order is not None else iter(())
        return self._standing.stepping(victims, lambda block: block not in self.pins, LOOK, MOST)

    async def _of_all(self) -> list[BlockId]:
        """Blocks to step down next, of a tier that others share: of those unused for longest, the least compressed.

        A few, in no order, so that daemons seldom take the same one.
        """
        found: list[tuple[float, BlockId]] = []
        for block in await self._tier.oldest(LOOK):
            form, stored = self._form(block.scope), self._tier.size(block)
            if form is None or stored is None or not form.lossy or form.is_raw(stored):
                continue
            if self._lowest.get(block) != stored:
                found.append((stored / form.whole, block))
        if not found:
            self._rest = time.monotonic() + REST_S
        found.sort(key=lambda each: each[0], reverse=True)
        chosen = [block for _, block in found[:FEW]]
        random.shuffle(chosen)
        return chosen

    def _stays(self, block: BlockId, stored: int) -> None:
        """A block cannot step further down."""
        self._standing.stay(block)
        if self._shared:
            if len(self._lowest) >= MOST_LOWEST:
                self._lowest.clear()
            self._lowest[block] = stored

    def _is_tight(self, nbytes: int) -> bool:
        usage = self._tier.usage()
        return usage.used + self._coming + nbytes > NEARLY_FULL * usage.capacity

    async def step(self, block: BlockId) -> None:
        """Put a block one rung down. If it cannot be put back it is lost, and counted."""
        stored, form = self._tier.size(block), self._form(block.scope)
        if stored is None or form is None:
            return
        if not self._shared and (not self._standing.may_step(block) or block in self.pins):
            return
        buffer = pages(stored)
        outcome = await self._tier.peek(block, [buffer])
        if not isinstance(outcome, Hit):
            self._standing.stay(block)
            return
        try:
            lower = await self._work(partial(self._encoding.lower, form, outcome.header, buffer, shared=self._shared))
        except (CodecError, CorruptBlock, ConfigError) as error:
            if self._shared and not isinstance(error, CorruptBlock):
                self._stays(block, stored)  # another daemon may be able to read it
            else:
                self.lost += await self._tier.drop(block)
            return
        if lower is None:
            self._stays(block, stored)
        elif await self._put(block, form, outcome, lower, stored):
            self.down += 1
            self.freed += stored - lower.data.nbytes
            if lower.rung + 1 == len(self._encoding.rungs(form)[0]):
                self._stays(block, lower.data.nbytes)

    async def _put(self, block: BlockId, form: Form, read: Hit, encoded: Encoded, stored: int) -> bool:
        """Put other bytes of a block in the place of those that were read here, if they still are; the header stays."""
        if self._tier.size(block) != stored:  # dropped meanwhile: it must not come back
            return False
        again = await self._tier.replace(block, read.header, [encoded.data], encoded.data.nbytes)
        if not isinstance(again, Stored):
            elsewhere = isinstance(again, Exists) or again == Dropped(DropReason.IN_FLIGHT)  # others store it just now
            self.lost += not elsewhere and not self._tier.contains(*block)
            return False
        self._note(block, encoded, form, may_step=encoded.rung >= 0)
        return True

    # -- up ------------------------------------------------------------------------------------------------------------

    def outdone(self, block: BlockId, form: Form, stored: int, theirs: int) -> bool:
        """Whether another copy of a lossy block, of so many bytes, should have more precision than the one here.

        Each step makes a block smaller, so that this can be told from sizes, without reading.
        """
        if not form.lossy or form.is_raw(stored) or self._standing.is_whole(block):
            return False
        return stored + stored // MARGIN < theirs <= form.whole

    async def take_over(self, block: BlockId, other: Tier) -> bool:
        """Replace a block by another tier's copy, if that lost less, and has room where nothing leaves for it.

        Parameters
        ----------
        block : BlockId
        other : Tier
            Keeps encoded blocks as the tier here does, with the same rungs.
        """
        stored, theirs, form = self._tier.size(block), other.size(block), self._form(block.scope)
        if stored is None or theirs is None or form is None or self._shared:
            return False
        if not self.outdone(block, form, stored, theirs):
            return False
        copies = pages(stored), pages(theirs)
        own = await self._tier.peek(block, [copies[0]])
        read = await other.peek(block, [copies[1]])
        if not isinstance(own, Hit) or not isinstance(read, Hit) or own.header.position != read.header.position:
            return False
        try:
            worse = await self._work(self._encoding.kept, form, own.header, copies[0])
            better = await self._work(self._encoding.kept, form, own.header, copies[1])
        except (CodecError, CorruptBlock, ConfigError):  # who reads it for somebody will see to that
            return False
        self._standing.seen(block, worse.name)
        if better.rung >= worse.rung:
            return False
        await self._make_room(theirs)
        async with self._lock:
            if self._has_room(block, theirs) and await self._put(block, form, own, better, stored):
                self.up += 1
                return True
        return False

    def _has_room(self, block: BlockId, nbytes: int) -> bool:
        """Whether a new file of a block has room beside the old one, in the tier and in its namespace's quota."""
        order = self._tier.order
        return order is not None and not self._is_tight(nbytes) and order.over(block.scope, nbytes + HEADER_ROOM) <= 0
