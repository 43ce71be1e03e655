"""The values of a block in Redis, written and read over several connections. What comes back is verified."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from kvstore.errors import CorruptBlock
from kvstore.remote import record as rec
from kvstore.remote.index import Names, Place
from kvstore.remote.lane import Command, Room, WrongType
from kvstore.remote.link import Link, all_of
from kvstore.types import BlockHeader, BlockId

AT_ONCE = 4
"""Parts that one connection has on their way: what is read at once is bounded, whatever is there."""
SEALED_AT_ONCE = 2
"""As many of them if they are sealed: the next ones are sealed while these are under way."""
KEPT_PER_LANE = 8
"""Memory of so many sealed parts is kept for each of a block's connections, to be used again."""


class Gone(Exception):
    """A block is not there any more, or is another write of it than the index here knows. Nothing is damaged."""


class Values:
    """Records and parts of blocks.

    Parameters
    ----------
    link : Link
    names : Names
        Of their keys.
    seal : Seal or None
    ttl_s : int
        How long they stay.
    """

    def __init__(self, link: Link, names: Names, seal: rec.Seal | None, ttl_s: int) -> None:
        self._link = link
        self._names = names
        self._seal = seal
        self._ttl_s = ttl_s
        self._spare: list[mmap.mmap] = []
        """Memory of sealed parts, used again: fresh pages take longer than the cipher. The kernel copies faster from
        where a page begins."""

    def names(self, member: bytes, place: Place) -> list[str]:
        """Keys of all values of a block."""
        return [self._names.record(member), *self._names.parts(member, place)]

    def _lanes(self, place: Place) -> int:
        """Connections that are worth it: one for each whole part."""
        return max(1, min(self._link.lanes, place.nbytes // rec.PART_BYTES))

    # -- reading -------------------------------------------------------------------------------------------------------

    async def read(self, block: BlockId, member: bytes, place: Place, into: Sequence[memoryview]) -> rec.Record:
        """Read and verify a block. The record, which says what the parts must be, travels with the first of them.

        Parameters
        ----------
        block : BlockId
            As its record names it.

        Raises
        ------
        Gone, CorruptBlock
            And whatever else the link fails with.
        """
        parts = self._names.parts(member, place)
        record: asyncio.Future[rec.Record] = asyncio.get_running_loop().create_future()

        async def read_some(numbers: range, leads: bool) -> None:
            wanted = [(number, self._places(number, place, into)) for number in numbers]
            used: list[mmap.mmap] = []
            values = [self._landing(number, place, places, used) for number, places in wanted]
            commands = [self._link.getting(parts[number], rec.PART_BYTES + rec.SEAL_BYTES) for number in numbers]
            rooms: list[Room] = [*values]
            if leads:
                commands.insert(0, self._link.getting(self._names.record(member), rec.MAX_RECORD))
                rooms.insert(0, rec.MAX_RECORD)
            try:
                replies = await self._link.exchange(commands, rooms)
            except WrongType:
                raise CorruptBlock("redis: a value is of another type.") from None
            if leads:
                record.set_result(self._believed(block, place, replies.pop(0)))
            found = await record
            for (number, places), value, length in zip(wanted, values, replies, strict=True):
                if not length:
                    raise Gone
                if length != len(value):
                    raise CorruptBlock("redis: a part is of another length.")
                rec.open_part(block, found, number, value, places, self._seal)
            self._give_back(used)

        async def lane(numbers: range) -> None:
            for first in range(0, max(1, len(numbers)), AT_ONCE):
                await read_some(numbers[first : first + AT_ONCE], leads=not (first or numbers.start))

        async def leading(numbers: range) -> None:
            try:
                await lane(numbers)
            finally:
                record.cancel()  # if it did not come, the others do not wait for it

        count = self._lanes(place)
        await all_of(
            [leading(range(0, len(parts), count)), *(lane(range(at, len(parts), count)) for at in range(1, count))]
        )
        return record.result()

    @staticmethod
    def _places(number: int, place: Place, buffers: Sequence[memoryview]) -> list[memoryview]:
        """Where a part lies in a block's buffers."""
        return rec.cut(buffers, *rec.span(number, place.nbytes))

    def _landing(self, number: int, place: Place, places: list[memoryview], used: list[mmap.mmap]) -> memoryview:
        """Memory that the value of a part is received into: its place itself, if it comes as it is and in one piece."""
        if self._seal is None and len(places) == 1:
            return places[0]
        length = rec.span(number, place.nbytes)[1] + (0 if self._seal is None else rec.SEAL_BYTES)
        return self._borrow(used)[:length]

    def _borrow(self, used: list[mmap.mmap]) -> memoryview:
        """Memory for the value of one part, noted in `used`."""
        used.append(self._spare.pop() if self._spare else mmap.mmap(-1, rec.PART_BYTES + rec.SEAL_BYTES))
        return memoryview(used[-1])

    def _give_back(self, used: list[mmap.mmap]) -> None:
        """Keep borrowed memory for the next; not after a failure, when a connection may still hold it."""
        self._spare += used[: max(0, KEPT_PER_LANE * self._link.lanes - len(self._spare))]

    def _believed(self, block: BlockId, place: Place, value: bytes | int | None) -> rec.Record:
        """A record, if it is that of the write which the index names."""
        if not value:
            raise Gone
        if isinstance(value, int):
            raise CorruptBlock("redis: a record is too long.")
        record = rec.decode(block, value, self._seal)
        if record.write != place.write:
            raise Gone
        if record.nbytes != place.nbytes:
            raise CorruptBlock("redis: a record's length is not the one that the index names.")
        return record

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(
        self,
        block: BlockId,
        member: bytes,
        place: Place,
        header: BlockHeader,
        payload: Sequence[memoryview],
        tell: Command,
    ) -> Any:
        """Write a block's values: the parts, then the record, and with that the command that tells of the block.

        A server does what one connection asks in order, so a block of few parts takes one round trip. In a cluster the
        index is on another node: it is told when all values are there.

        Parameters
        ----------
        block : BlockId
            As its record names it.
        tell : Command
            It has no effect unless all values are there.

        Returns
        -------
        What the command was answered.
        """
        parts, lanes = range(rec.part_count(place.nbytes)), self._lanes(place)
        names, sums = self._names.parts(member, place), [0] * (len(parts) if self._seal is None else 0)
        last = parts if lanes == 1 and len(parts) <= AT_ONCE else range(0)

        def setting(name: str, value: bytes | memoryview) -> Command:
            return "SET", name, value, "EX", self._ttl_s

        def commands(numbers: range, used: list[mmap.mmap]) -> Iterator[Command]:
            """What sets some parts. Each is summed or sealed when the one before it is on its way."""
            for number in numbers:
                pieces = self._places(number, place, payload)
                part = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
                if self._seal is None:
                    sums[number] = rec.sum_of(part)
                else:
                    part = rec.close_part(block, place.write, number, part, self._seal, self._borrow(used))
                yield setting(names[number], part)

        def end(behind: Sequence[Command]) -> Iterator[Command]:
            yield setting(
                self._names.record(member), rec.encode(block, place.write, header, place.nbytes, sums, self._seal)
            )
            yield from behind

        async def write_some(numbers: range, *behind: Command, finish: bool = False) -> list[Any]:
            used: list[mmap.mmap] = []
            replies = await self._link.exchange(chain(commands(numbers, used), end(behind) if finish else ()))
            self._give_back(used)
            return replies

        async def lane(numbers: range) -> None:
            at_once = AT_ONCE if self._seal is None else SEALED_AT_ONCE
            for first in range(0, len(numbers), at_once):
                await write_some(numbers[first : first + at_once])

        if not last:
            await all_of(lane(parts[at::lanes]) for at in range(lanes))
        if self._link.is_cluster:
            await write_some(last, finish=True)
            return (await self._link.exchange([tell]))[0]
        return (await write_some(last, tell, finish=True))[-1]

    async def unlink(self, names: Iterable[str]) -> None:
        """Delete values."""
        if commands := [("UNLINK", name) for name in names]:
            await self._link.exchange(commands)

    async def expire(self, lives: Iterable[tuple[str, int]]) -> None:
        """Put off the expiry of values: names, and seconds from now."""
        if commands := [("EXPIRE", name, seconds) for name, seconds in lives]:
            await self._link.exchange(commands)
