"""The values of a block in Redis, written and read over several connections. What comes back is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.errors import CorruptBlock
from kvstore.remote import record as rec
from kvstore.remote.index import Names, Place
from kvstore.remote.link import Link, all_of
from kvstore.types import BlockHeader, BlockId

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
        self._spare: list[bytearray] = []
        """Memory of sealed parts, used again: fresh pages take longer than the cipher."""

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
        """Verify some parts, by number, and put them to where they belong."""
        for number, value in values.items():
            if not value:
                raise Gone
            rec.open_part(block, record, number, value, into, self._seal)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(
        self,
        block: BlockId,
        member: bytes,
        place: Place,
        header: BlockHeader,
        payload: Sequence[memoryview],
        tell: Sequence[Any],
    ) -> Any:
        """Write a block's values: the parts, then the record, and with that the command that tells of the block.

        A server does what one connection asks in order, so a block of few parts takes one round trip. In a cluster the
        index is on another node: it is told when all values are there.

        Parameters
        ----------
        block : BlockId
            As its record names it.
        tell : sequence
            A command that has no effect unless all values are there.

        Returns
        -------
        What the command was answered.
        """
        parts, lanes = range(rec.part_count(place.nbytes)), self._lanes(place)
        sums = [0] * len(parts)
        last = parts if lanes == 1 and len(parts) <= AT_ONCE else range(0)

        async def write_some(numbers: range, finish: bool = False) -> Any:
            pipe, used = self._link.pipeline(), list[bytearray]()
            for number in numbers:
                pieces = rec.cut(payload, *rec.span(number, place.nbytes))
                part = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
                sums[number] = rec.sum_of(part)
                if self._seal is not None:
                    used.append(self._spare.pop() if self._spare else bytearray(rec.PART_BYTES + rec.SEAL_BYTES))
                    part = rec.close_part(block, place.write, number, part, self._seal, memoryview(used[-1]))
                pipe.set(names[number], part, ex=self._ttl_s)
            if finish:
                record = rec.encode(block, place.write, header, place.nbytes, sums, self._seal)
                pipe.set(self._names.record(member), record, ex=self._ttl_s)
                if not self._link.is_cluster:
                    pipe.execute_command(*tell)
            replies = await self._link.ask(pipe.execute())
            # Not after a failure: a transport may still hold it then.
            self._spare += used[: max(0, AT_ONCE * self._link.lanes - len(self._spare))]
            return replies[-1]

        async def lane(numbers: range) -> None:
            for first in range(0, len(numbers), AT_ONCE):
                await write_some(numbers[first : first + AT_ONCE])

        names = self._names.parts(member, place)
        if not last:
            await all_of(lane(parts[at::lanes]) for at in range(lanes))
        reply = await write_some(last, finish=True)
        return await self._link.ask(self._link.client.execute_command(*tell)) if self._link.is_cluster else reply

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
