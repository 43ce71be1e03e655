"""Blocks in the index and their values together: written, written anew, taken out.

Room is reserved in the index before anything is written; everybody is told of a block when all of its values are there.
What ends in between leaves an entry that nobody was told of, and values that expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from kvstore.remote import index as ix
from kvstore.remote import record as rec
from kvstore.remote.follower import Follower
from kvstore.remote.link import FAILURES, Link, kind_of
from kvstore.remote.uses import Uses
from kvstore.remote.values import Values
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Exists, Scope, Stored, StoreOutcome

LIMITED_S = 60.0
"""How long less is kept than the budget allows, once the server had no memory for that."""


class Blocks:
    """What changes which blocks there are.

    Parameters
    ----------
    link : Link
    names : Names
    index : Follower
    values : Values
    uses : Uses
    capacity : int
        Bytes that the deployment keeps.
    ttl_s : int
        How long a block stays after its last use.

    Attributes
    ----------
    evicted : int
        Blocks that left for others.
    """

    def __init__(
        self,
        link: Link,
        names: ix.Names,
        index: Follower,
        values: Values,
        uses: Uses,
        capacity: int,
        ttl_s: int,
    ) -> None:
        self._link = link
        self._names = names
        self._index = index
        self._values = values
        self._uses = uses
        self._capacity = capacity
        self._ttl_s = ttl_s
        self.evicted = 0
        self._limit, self._limited_until = capacity, 0.0
        self._wanted: dict[BlockId, bool] = {}
        """Blocks that are being written, and whether they still are to be there afterwards."""
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def capacity(self) -> int:
        """Bytes that the deployment keeps: the budget, or less, if the server has no memory for as much."""
        return self._limit if time.monotonic() < self._limited_until else self._capacity

    def _found_full(self, cost: int) -> None:
        """The server had no memory for a block of this cost: from now on old blocks leave for new ones."""
        self._limit = max(0, min(self.capacity, self._index.mirror.used) - cost)
        self._limited_until = time.monotonic() + LIMITED_S

    def writing(self, block: BlockId) -> bool:
        """Whether a block is being written now; it is not found meanwhile."""
        return block in self._wanted

    async def close(self) -> None:
        """Finish what was accepted."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, durable: bool
    ) -> StoreOutcome:
        """Write a block that is neither known nor being written."""
        return await self._to_the_end(block, self._write(block, header, payload, nbytes, durable))

    async def replace(
        self, block: BlockId, place: ix.Place, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        """Write a block anew, unless it is pinned or somebody else does."""
        return await self._to_the_end(block, self._write_anew(block, place, header, payload, nbytes))

    async def _write_anew(
        self, block: BlockId, place: ix.Place, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        member = self._index.member(block)
        taken = await self._index.script(ix.TAKE, member, place.pack())
        if not taken:
            return Dropped(DropReason.IN_FLIGHT)
        value, used = taken
        await self._unlink([member, value])
        return await self._write(block, header, payload, nbytes, False, used)

    async def _write(
        self,
        block: BlockId,
        header: BlockHeader,
        payload: Sequence[memoryview],
        nbytes: int,
        durable: bool,
        used: bytes = b"",
    ) -> StoreOutcome:
        """Reserve, write, tell; `used` is when the block was last used, as the index says it, if that was not now."""
        await self._uses.flush()
        known, member = self._index.known(block), self._index.member(block)
        place = ix.Place(ix.cost_of(nbytes), nbytes, rec.new_write())
        try:
            room = member, place.cost, self.capacity, place.pack(), self._ttl_s, ix.WRITING_S
            reply = await self._index.script(ix.RESERVE, *room)
            if reply[0] != b"room":
                return Exists() if reply[0] == b"exists" else Dropped(DropReason.TIER_FULL)
            self._index.mirror.add(block, place)
            await self._unlink(reply[1:], evicted=True)
            values = () if self._link.is_cluster else self._values.names(member, place)
            tell = self._index.command(ix.COMMIT, member, place.pack(), used, values=values)
            told = await self._values.write(known, member, place, header, payload, tell)
            if not told:  # values that went elsewhere are one reason: to the server that the address led to before
                await self._link.renew()
            if not told or not self._wanted[block]:
                await self.remove([block], place)
                return Dropped(DropReason.ABORTED)
        except FAILURES as error:
            self._index.mirror.remove(block, place.write)
            if kind_of(error)[0] == "full":
                self._found_full(place.cost)
            await self._link.quietly(self.remove([block], place))
            raise
        if durable and not await self.synced_to_disk():
            return Dropped(DropReason.NOT_DURABLE)
        return Stored()

    async def synced_to_disk(self) -> bool:
        """Whether the server has synced all that was written so far to its append-only file."""
        return await self._link.synced_to_disk(self._names.sum)

    async def _to_the_end(self, block: BlockId, work: Coroutine[Any, Any, StoreOutcome]) -> StoreOutcome:
        """Run to the end even if the caller is cancelled: nothing half-written may stay, and its buffers are in use."""
        self._wanted[block] = True
        task = asyncio.get_running_loop().create_task(self._watched(block, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.give_up(block)
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            raise

    async def _watched(self, block: BlockId, work: Coroutine[Any, Any, StoreOutcome]) -> StoreOutcome:
        try:
            return await work
        except FAILURES as error:
            self._link.note(error)
            return Dropped(DropReason.TIER_FULL if kind_of(error)[0] == "full" else DropReason.TIER_DOWN)
        finally:
            del self._wanted[block]

    # -- forgetting ----------------------------------------------------------------------------------------------------

    def give_up(self, block: BlockId) -> bool:
        """Have a block that is being written not be there afterwards; whether it is being written."""
        if block not in self._wanted:
            return False
        self._wanted[block] = False
        return True

    def give_up_all(self, scope: Scope) -> None:
        """As `give_up`, for all blocks of a scope."""
        for block in self._wanted:
            if block.scope == scope:
                self._wanted[block] = False

    async def remove(self, blocks: Iterable[BlockId], only: ix.Place | None = None) -> int:
        """Take blocks out of the index, with `only` just that write, and delete their values; how many there were."""
        known = [(block, only or self._index.mirror.find(block)) for block in blocks]
        which = b"" if only is None else only.pack()
        gone = await self._index.script(ix.REMOVE, which, *(self._index.member(block) for block, _ in known))
        for block, place in known:
            if place is not None:
                self._index.mirror.remove(block, place.write)
        await self._unlink(gone)
        return len(gone) // 2

    async def _unlink(self, gone: list[bytes], evicted: bool = False) -> None:
        """Delete the values of blocks that a script took out: member and value in turn."""
        names: list[str] = []
        for member, value in zip(gone[::2], gone[1::2], strict=True):
            place, block = self._index.place(value), self._index.block(member)
            if place is None or block is None:
                continue
            self._index.mirror.remove(block, place.write)
            self._uses.forget(block)
            self.evicted += evicted
            names += self._values.names(member, place)
        await self._values.unlink(names)
