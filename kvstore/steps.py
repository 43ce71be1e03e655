"""Blocks of an encoded tier on their way down the ladder, and up again: the least valuable become smaller for room, one
that was used takes over a better copy from a tier further down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from kvstore.encoding import Encoded, Encoding, Form, pages
from kvstore.errors import CodecError, ConfigError, CorruptBlock
from kvstore.standing import Standing
from kvstore.tiers.base import Tier
from kvstore.types import BlockId, Hit, Scope, Stored

NEARLY_FULL = 0.95
"""Share of the capacity from which blocks step down."""
STEPS_A_PUT = 8
"""Most blocks that step down for one that comes in."""
STEP_S = 2.0
"""How long one that comes in waits for others to step down: slow chains must not hold up what is stored."""
LOOK = 1024
"""Blocks, in the order of eviction, among which the next to step down are looked for."""
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

    async def make_room(self, nbytes: int) -> None:
        """Have the least valuable lossy blocks step down, until there is room or all are on the last rung."""
        order = self._tier.order
        if order is None or not self._standing.can_step or not self._is_tight(nbytes):
            return
        async with self._lock:
            self._forget_pins()
            until = time.monotonic() + STEP_S
            for _ in range(STEPS_A_PUT):
                if not self._next:  # looking is far dearer than stepping
                    victims = (block for block, _ in order.victims(None, 0, lambda _: 1))
                    self._next = self._standing.stepping(victims, lambda b: b not in self.pins, LOOK, LOOK // 16)
                if not self._next or not self._is_tight(nbytes) or time.monotonic() > until:
                    return
                await self.step(self._next.pop(0))

    def _is_tight(self, nbytes: int) -> bool:
        usage = self._tier.usage()
        return usage.used + nbytes > NEARLY_FULL * usage.capacity

    async def step(self, block: BlockId) -> None:
        """Put a block one rung down. If it cannot be put back it is lost, and counted."""
        stored, form = self._tier.size(block), self._form(block.scope)
        if stored is None or form is None or not self._standing.may_step(block) or block in self.pins:
            return
        buffer = pages(stored)
        outcome = await self._tier.peek(block, [buffer])
        if not isinstance(outcome, Hit):
            self._standing.stay(block)
            return
        try:
            lower = await self._work(self._encoding.lower, form, outcome.header, buffer)
        except (CodecError, CorruptBlock, ConfigError):
            self.lost += await self._tier.drop(block)
            return
        if lower is None:
            self._standing.stay(block)
        elif await self._put(block, form, outcome, lower, stored):
            self.down += 1
            self.freed += stored - lower.data.nbytes

    async def _put(self, block: BlockId, form: Form, read: Hit, encoded: Encoded, stored: int) -> bool:
        """Put other bytes of a block in the place of those that were read, if they still are what is there."""
        if self._tier.size(block) != stored:  # dropped meanwhile: it must not come back
            return False
        again = await self._tier.replace(block, read.header, [encoded.data], encoded.data.nbytes)
        if not isinstance(again, Stored):
            self.lost += not self._tier.contains(*block)
            return False
        self._note(block, encoded, form, may_step=encoded.rung >= 0)
        return True

    # -- up ------------------------------------------------------------------------------------------------------------

    def outdone(self, block: BlockId, stored: int, theirs: int) -> bool:
        """Whether another copy of a lossy block, of so many bytes, should have more precision than the one here.

        Each step makes a block smaller, so that this can be told from sizes, without reading.
        """
        form = self._form(block.scope)
        if form is None or not form.lossy or form.is_raw(stored) or self._standing.is_whole(block):
            return False
        return form.is_raw(theirs) or theirs > stored + stored // MARGIN

    async def take_over(self, block: BlockId, other: Tier) -> bool:
        """Replace a block by another tier's copy, if that lost less, and has room where nothing leaves for it.

        Parameters
        ----------
        block : BlockId
        other : Tier
            Keeps encoded blocks as the tier here does, with the same rungs.
        """
        stored, theirs, form = self._tier.size(block), other.size(block), self._form(block.scope)
        if stored is None or theirs is None or form is None or not self.outdone(block, stored, theirs):
            return False
        copies = pages(stored), pages(theirs)
        own = await self._tier.peek(block, [copies[0]])
        read = await other.peek(block, [copies[1]])
        if not isinstance(own, Hit) or not isinstance(read, Hit):
            return False
        try:
            worse = await self._work(self._encoding.kept, form, own.header, copies[0])
            better = await self._work(self._encoding.kept, form, read.header, copies[1])
        except (CodecError, CorruptBlock, ConfigError):  # who reads it for somebody will see to that
            return False
        self._standing.seen(block, worse.chain)
        if better.rung >= worse.rung:
            return False
        await self.make_room(theirs)
        async with self._lock:
            if self._has_room(block, theirs) and await self._put(block, form, read, better, stored):
                self.up += 1
                return True
        return False

    def _has_room(self, block: BlockId, nbytes: int) -> bool:
        """Whether a new file of a block has room beside the old one, in the tier and in its namespace's quota."""
        order = self._tier.order
        return order is not None and not self._is_tight(nbytes) and order.over(block.scope, nbytes + HEADER_ROOM) <= 0
