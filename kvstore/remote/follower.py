"""The shared index as one daemon knows it: read once, then followed; connected again by itself when that fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from kvstore.remote import index as ix
from kvstore.remote.lane import Command
from kvstore.remote.link import FAILURES, Link, kind_of
from kvstore.types import BlockId, Scope

log = logging.getLogger("kvstore.redis")

OWNER = "owner"
"""What the domain of the daemon's own user is called in Redis: that user may have another number on another host."""
MAX_TEXT = 65_536
"""Bytes of a description."""
REST_S = 0.005
"""Between two looks at the log when there is something in it: under a stream of stores each look would find one."""


async def _nothing() -> None:
    pass


class Follower:
    """Keeps a copy of the index up to date.

    Parameters
    ----------
    link : Link
    names : Names
    own_domain : str
        The trust domain of the daemon's own user.
    max_block_bytes : int
        Larger blocks are not believed in: the index is not trusted with memory.
    """

    def __init__(self, link: Link, names: ix.Names, own_domain: str, max_block_bytes: int) -> None:
        self.mirror = ix.Mirror()
        self.about: dict[Scope, bytes] = {}
        self.closed = False
        self.forgotten = 0
        """Blocks that were known and were not there any more when the index was read again."""
        self.meanwhile: Callable[[], Awaitable[None]] = _nothing
        """What else is to be told to Redis after each look at the log."""
        self._described: set[Scope] = set()
        """Scopes whose text the server has."""
        self._link = link
        self._names = names
        self._own_domain = own_domain
        self._max_block_bytes = max_block_bytes
        # Well within the time limit of the connection.
        self._patience_ms = max(1, min(500, int(500 * link.timeout_s)))
        self._origin = os.urandom(8).hex()
        self._task: asyncio.Task[None] | None = None
        self._synced = asyncio.Event()
        self._heed_own = 0

    @property
    def connected(self) -> bool:
        """Whether the copy is that of a server that answers."""
        return self._synced.is_set()

    async def start(self) -> None:
        """Connect and read what is there; if that fails, go on trying in the background."""
        self._task = asyncio.get_running_loop().create_task(self._follow())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._synced.wait(), self._link.timeout_s)

    async def stop(self) -> None:
        """End following."""
        if self._task is not None:
            self._task.cancel()  # it looks at `closed` too: a timeout that ends just then would swallow this
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._synced.clear()

    # -- following -----------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep the copy of the index up to date, and connect again whenever that fails."""
        wait_s = 0.1
        while not self.closed:
            try:
                age = self._link.age
                at, number = await self._read_index()
                self._link.error, wait_s = "", 0.1
                self._synced.set()
                while at and not self.closed and age == self._link.age:
                    before = number
                    at, number = await self._read_log(at, number)
                    await self._tell()
                    if number != before:
                        await asyncio.sleep(REST_S)
            except FAILURES as error:
                self._failed(error)
                await self._link.renew()
                await asyncio.sleep(wait_s)
                wait_s = min(5.0, 2 * wait_s)
            await self._link.quietly(self._link.reconnect())

    async def _tell(self) -> None:
        """Tell what is to be told. A server that is full, or a replica, takes nothing, and still answers who reads."""
        try:
            await self.meanwhile()
        except FAILURES as error:
            if kind_of(error)[0] not in ("readonly", "full"):
                raise
            self._link.note(error)

    def _failed(self, error: BaseException) -> None:
        connected = self._synced.is_set() or not self._link.error
        self._synced.clear()
        self._link.note(error)
        if connected:
            log.warning("redis: %s", self._link.error)

    async def _read_index(self) -> tuple[bytes, int]:
        """Read all of it; the place in the stream from which on it changes, and the number of the last change."""
        ask, client = self._link.ask, self._link.client
        number = int(await ask(client.get(self._names.seq)) or 0)
        last = await ask(client.xrevrange(self._names.log, count=1))
        mirror, cursor = ix.Mirror(), 0
        while True:
            cursor, found = await ask(client.hscan(self._names.blocks, cursor, count=1000))
            for member, value in found.items():
                block, place = self.block(member), self.place(value)
                if block is not None and place is not None:
                    mirror.add(block, place)
            if not int(cursor):
                break
        about, described = await ask(client.hgetall(self._names.about)), set[Scope]()
        for member, text in about.items():
            block = self.block(member + bytes(32))
            if block is not None and len(text) <= MAX_TEXT:
                self.about[block.scope] = text
                described.add(block.scope)
        # What we ourselves changed while this was read may be missing from it: so far the log counts for that, too.
        self._heed_own = int(await ask(client.get(self._names.seq)) or 0)
        self.forgotten += sum(mirror.find(block) is None for block in self.mirror.blocks())
        self.mirror, self._described = mirror, described
        return (last[0][0], int(last[0][1][b"n"])) if last else (b"0-0", number)

    async def _read_log(self, at: bytes, number: int) -> tuple[bytes, int]:
        """Apply what changed; empty bytes if something was missed and the index has to be read again."""
        reading = self._link.client.xread({self._names.log: at}, count=1000, block=self._patience_ms)
        found = await asyncio.wait_for(cast("Awaitable[Any]", reading), 2 * self._link.timeout_s)
        for _, changes in found or ():
            for place_in_log, change in changes:
                if int(change[b"n"]) != number + 1:
                    return b"", 0
                at, number = place_in_log, number + 1
                if number <= self._heed_own or change[b"o"].decode(errors="replace") != self._origin:
                    self._apply(change)
        return at, number

    def _apply(self, change: dict[bytes, bytes]) -> None:
        block, place = self.block(change[b"m"]), self.place(change[b"v"])
        if block is None or place is None:
            return
        if change[b"k"] == b"stored":
            self.mirror.add(block, place)
        else:
            self.mirror.remove(block, place.write)

    # -- names ---------------------------------------------------------------------------------------------------------

    def known(self, block: BlockId) -> BlockId:
        """A block as its record names it: with the name that its domain has in Redis."""
        domain = OWNER if block.scope.domain == self._own_domain else block.scope.domain
        return BlockId(Scope(domain, block.scope.ns), block.key)

    def member(self, block: BlockId) -> bytes:
        """A block as a member of the index."""
        return ix.member_of(block, self.known(block).scope.domain)

    def block(self, member: bytes) -> BlockId | None:
        """The block of a member; None if it is none."""
        domain = ix.domain_of(member)
        return ix.block_of(member, self._own_domain if domain == OWNER and self._own_domain else domain)

    def place(self, value: bytes) -> ix.Place | None:
        """What a value of the index says; None if that cannot be believed."""
        place = ix.Place.unpack(value)
        believable = place is not None and place.nbytes <= min(self._max_block_bytes, place.cost)
        return place if believable else None

    # -- changing ------------------------------------------------------------------------------------------------------

    def command(self, text: str, *args: bytes | str | float, values: Sequence[str] = ()) -> Command:
        """The command that runs one of the scripts of `kvstore.remote.index`; `values` are keys behind the index."""
        return ["EVAL", text, 5 + len(values), *self._names.index, *values, self._origin, *args]

    async def script(self, text: str, *args: bytes | str | float) -> Any:
        """Run one of the scripts of `kvstore.remote.index`."""
        return (await self._link.exchange([self.command(text, *args)]))[0]

    async def describe(self, scope: Scope, text: bytes) -> None:
        """Keep a short text beside the blocks of a scope."""
        known = scope in self._described and self.about.get(scope) == text
        if not self.connected or known or not 0 < len(text) <= MAX_TEXT:
            return
        self.about[scope] = text
        self._described.add(scope)
        try:
            member = self.member(BlockId(scope, b""))
            await self._link.exchange([("HSET", self._names.about, member, text)])
        except FAILURES as error:
            self._link.note(error)
            self._described.discard(scope)  # to be told again
