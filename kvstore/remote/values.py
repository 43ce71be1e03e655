"""The values of a block in Redis, written and read over several connections. What comes back is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import cast

from kvstore.errors import CorruptBlock
from kvstore.remote import record as rec
from kvstore.remote.index import Names, Place
from kvstore.remote.link import Link, all_of
from kvstore.types import BlockId

AT_ONCE = 4
"""Parts that one connection has on their way: what is read at once is bounded, whatever is there."""


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

        async def lane(numbers: range) -> None:
            for first in range(0, max(1, len(numbers)), AT_ONCE):
                some = numbers[first : first + AT_ONCE]
                leads = not (first or numbers.start)
                pipe = self._link.pipeline()
                if leads:
                    pipe.getrange(self._names.record(member), 0, rec.MAX_RECORD)
                for number in some:
                    pipe.getrange(parts[number], 0, rec.PART_BYTES + rec.SEAL_BYTES)
                values = await self._link.ask(pipe.execute())
                if leads:
                    record.set_result(self._believed(block, place, values.pop(0)))
                self._unpack(block, await record, dict(zip(some, values, strict=True)), into)

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

    def _believed(self, block: BlockId, place: Place, value: bytes) -> rec.Record:
        """A record, if it is that of the write which the index names."""
        if not value:
            raise Gone
        record = rec.decode(block, value, self._seal)
        if record.write != place.write:
            raise Gone
        if record.nbytes != place.nbytes:
            raise CorruptBlock("redis: a record's length is not the one that the index names.")
        return record

    def _unpack(self, block: BlockId, record: rec.Record, values: dict[int, bytes], into: Sequence[memoryview]) -> None:
        """Verify some parts, by number, and copy them to where they belong."""
        for number, value in values.items():
            if not value:
                raise Gone
            part = rec.open_part(block, record, number, value, self._seal)
            rec.scatter(part, number * rec.PART_BYTES, into)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(self, member: bytes, place: Place, record: bytes, parts: Sequence[memoryview | bytes]) -> None:
        """Write a block's values, the record last in its lane."""
        values = dict(zip(self._names.parts(member, place), parts, strict=True)) | {self._names.record(member): record}
        lanes = self._lanes(place)
        await all_of(self._write_lane(list(values.items())[at::lanes]) for at in range(lanes))

    async def _write_lane(self, values: Sequence[tuple[str, memoryview | bytes]]) -> None:
        for first in range(0, len(values), AT_ONCE):
            pipe = self._link.pipeline()
            for name, value in values[first : first + AT_ONCE]:
                pipe.set(name, cast("bytes", value), ex=self._ttl_s)
            await self._link.ask(pipe.execute())

    async def unlink(self, names: Iterable[str]) -> None:
        """Delete values."""
        pipe = self._link.pipeline()
        for name in names:
            pipe.execute_command("UNLINK", name)  # the method for it does nothing in a cluster's pipeline
        if len(pipe):
            await self._link.ask(pipe.execute())

    async def expire(self, lives: Iterable[tuple[str, int]]) -> None:
        """Put off the expiry of values: names, and seconds from now."""
        pipe = self._link.pipeline()
        for name, seconds in lives:
            pipe.expire(name, seconds)
        if len(pipe):
            await self._link.ask(pipe.execute())
