"""The disk tier: one file a block, and the directory is the index.

A put is: find, reserve space in the budget (which names what leaves for it), one trip to a thread that removes what
leaves and writes the file, book the result. A get is: find, one trip to a thread that reads into the caller's buffers
and verifies every byte, book the result. Everything that can go wrong on the way is a value. The parts, in
`kvstore.disk`: `store` (state and threads), `index` (budget), `reader` (what is read, and how that can end), `blocks`
(files), `format` (bytes), `io` (system calls).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvstore.disk.blocks import MAX_DESCRIPTION, ForeignFile
from kvstore.disk.directory import FIXED_COST
from kvstore.disk.format import MAX_HEADER, MAX_PAYLOAD, Shape, is_block_id, scope_path, shape_of
from kvstore.disk.index import NAMESPACE_COST, Departure
from kvstore.disk.io import Files
from kvstore.disk.reader import Reader
from kvstore.disk.store import Store
from kvstore.errors import ConfigError, CorruptBlock, StorageError, TierDown
from kvstore.eviction import make_policy
from kvstore.tiers.base import Finding, Sized, Tier, TierCounters, Usage
from kvstore.tiers.disk_check import check_disk
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    Exists,
    Gone,
    Hit,
    LoadOutcome,
    Scope,
    Stored,
    StoreOutcome,
    TierCode,
)
from kvstore.watcher import Watcher

_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskTier(Tier):
    """Blocks in files under one directory.

    Parameters
    ----------
    root : Path or str
        The directory. Made with mode 0700 if it is not there.
    capacity : int
        Byte budget: blocks with their headers and padding, names, directories, temporary files, quarantine.
    policy : str
        Name of an eviction policy.
    threads : int
        I/O threads that read, and as many that do everything else.
    found_share : float
        Share of the bytes found at start by which the budget is raised.
    files : Files
        The system calls; another object only to watch or disturb them.
    pin_share : float
        The part of the budget that pins may keep.

    Raises
    ------
    ConfigError
        If the capacity is less than what an empty tier takes, or the policy unknown.
    """

    name = "disk"
    code = TierCode.DISK

    def __init__(
        self,
        root: Path | str,
        capacity: int,
        *,
        policy: str = "lhd",
        threads: int = 4,
        found_share: float = 0.0,
        files: Files | None = None,
        pin_share: float = 0.5,
    ) -> None:
        least = FIXED_COST + NAMESPACE_COST
        if capacity < least:
            raise ConfigError(f"disk.bytes: {capacity} is less than the {least} bytes that an empty tier takes.")
        self.counters = TierCounters()
        files = files if files is not None else Files()
        self._store = Store(Path(root), capacity, make_policy(policy), threads, files, pin_share)
        self._store.found_share = found_share
        self._index = self._store.index
        self.order = self._order = self._index.order
        self._writing: set[BlockId] = set()
        self._aborted: set[BlockId] = set()
        self._reader = Reader(self._store, self.counters)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the directory and list what is in it.

        Raises
        ------
        DirectoryUnusable
            If it is not ours, in use, of another format, or the kernel refuses.
        """
        try:
            await self._store.open()
        except BaseException:
            await self._store.close()
            raise
        self.counters.evicted = self._index.evicted

    async def close(self) -> None:
        """Finish what was accepted and let go of the directory."""
        await self._store.close()

    # -- looking -------------------------------------------------------------------------------------------------------

    def size(self, block: BlockId) -> int | None:
        """Payload bytes of a block that is here, and not too old. No I/O."""
        shape = self._reader.living(block)
        return None if shape is None else shape.nbytes

    def contains(self, scope: Scope, key: bytes) -> bool:
        """Whether a block is here, and not too old. No I/O."""
        space = self._index.spaces.get(scope)
        if space is None or key not in space.blocks:
            return False
        return not self._order.expiring or self._order.alive(BlockId(scope, key))

    def usage(self) -> Usage:
        """Bytes of the budget and blocks held."""
        return Usage(self._index.capacity, self._index.used, self._index.count)

    def pace(self) -> float | None:
        """What a block takes by the pieces that have come of those under way."""
        return self._store.blocks.under_way.pace() if self._store.ready else None

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes of the budget) of each scope."""
        return self._index.scopes()

    def held(self, scope: Scope) -> Mapping[bytes, Sized]:
        """The blocks of one scope by key; to be read, not changed."""
        space = self._index.spaces.get(scope)
        return {} if space is None else space.blocks

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told of blocks that come and go."""
        self._index.watcher = watcher

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note a use of blocks of one prompt, first block first."""
        self._index.touch(blocks)

    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction until a monotonic time; whether it is here."""
        return self._index.pin(block, until)

    @property
    def direct_io(self) -> bool:
        """Whether files are read and written around the page cache; `describe_state` says why not."""
        return self._store.ready and self._store.directory.direct_io

    def describe_state(self) -> dict[str, Any]:
        """How the files are accessed, what was found at start, what is set aside."""
        index = self._index
        return {
            "path": str(self._store.root),
            "direct_io": self.direct_io,
            "pins_refused": index.pins.refused,
            "direct_io_reason": self._store.directory.direct_io_reason if self._store.ready else "not running",
            **self._store.found,
            "quarantined_files": len(index.quarantine),
            "quarantined_bytes": sum(index.quarantine.values()),
        }

    # -- get -----------------------------------------------------------------------------------------------------------

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """Read a block into the caller's buffers and verify every byte of its file."""
        outcome = await self._store.threads.to_the_end(self._reader.read(block, into, used=True))
        if isinstance(outcome, Hit):
            self.counters.hits += 1
            self.counters.bytes_read += outcome.nbytes
        else:
            self.counters.misses += 1
        return outcome

    async def peek(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """As `get`, but nobody used the block."""
        return await self._store.threads.to_the_end(self._reader.read(block, into, used=False))

    async def header(self, block: BlockId) -> BlockHeader | None:
        """The header of a block that is here and undamaged."""
        return await self._store.threads.to_the_end(self._reader.header(block))

    # -- put -----------------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        """Write a block to a new file and give it its name.

        Raises
        ------
        StorageError
            If the block's identity makes no path, or the payload's lengths do not sum to `nbytes`.
        """
        outcome = await self._store.threads.to_the_end(self._put(block, header, payload, nbytes, durable))
        self.counters.evicted = self._index.evicted
        if isinstance(outcome, Stored):
            self.counters.stored += 1
            self.counters.bytes_written += nbytes
        elif isinstance(outcome, Exists):
            self.counters.exists += 1
        else:
            self.counters.drop(outcome.reason)
        return outcome

    async def _put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, durable: bool
    ) -> StoreOutcome:
        store = self._store
        if not store.ready:
            return Dropped(DropReason.TIER_DOWN)
        if not is_block_id(block) or sum(view.nbytes for view in payload) != nbytes:
            raise StorageError(f"disk tier: {block.scope.domain!r}, {nbytes} bytes: not a block it can store.", "")
        if self._reader.living(block) is not None:
            return await self._keep(block, durable)
        if self._index.find(block) is not None:  # too old: the new one takes its place
            await self._drop([block], Gone.EXPIRED)
        if block in store.busy:  # being written by another call, or on its way out
            return Dropped(DropReason.IN_FLIGHT)
        shape = shape_of(block, header, nbytes)
        too_large = shape.offset > MAX_HEADER or nbytes > MAX_PAYLOAD
        if too_large or FIXED_COST + NAMESPACE_COST + shape.cost > self._index.capacity:
            return Dropped(DropReason.TOO_LARGE)

        wanted = partial(self._wants, block)
        began = time.perf_counter()
        self._writing.add(block)
        try:
            with store.occupied(Departure([(block, shape)])):
                error = await store.write(block, header, shape, payload, durable, wanted)
                if error is not None and error.errno in _FULL and await store.free(shape.cost):
                    # The disk holds less than the budget: others use it too. What was freed may be enough.
                    error = await store.write(block, header, shape, payload, durable, wanted)
            if error is not None:
                return Dropped(DropReason.TIER_FULL if error.errno in _FULL else DropReason.IO_ERROR)
            self.counters.write_s += time.perf_counter() - began
            if store.lacks_description(block.scope):
                await store.describe(block.scope)
            return Stored() if wanted() else Dropped(DropReason.ABORTED)
        finally:
            self._writing.discard(block)
            self._aborted.discard(block)

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        """Write a block anew beside its old file and let that one go; it keeps its place in the order.

        Where there is no room for both it is absent for a moment, and new afterwards.
        """
        old, new = self._reader.living(block), shape_of(block, header, nbytes)
        if old is None or self._index.used + new.cost > self._index.capacity:
            return await super().replace(block, header, payload, nbytes)
        return await self._store.threads.to_the_end(self._replace(block, header, payload, old, new))

    async def _replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], old: Shape, new: Shape
    ) -> StoreOutcome:
        store = self._store
        if block in store.busy or not store.ready:
            return Dropped(DropReason.IN_FLIGHT)
        if new == old:  # a file of the same name
            return Exists()
        reading = self._index.begin_read(block)  # it is not evicted meanwhile
        self._writing.add(block)
        try:
            with store.occupied(Departure([(block, new)])):
                wanted = partial(self._wants, block)
                error = await store.write(block, header, new, payload, False, wanted, replaced=old)
            if error is not None:
                return Dropped(DropReason.TIER_FULL if error.errno in _FULL else DropReason.IO_ERROR)
            self.counters.bytes_written += new.nbytes
            return Stored() if wanted() else Dropped(DropReason.ABORTED)
        finally:
            self._index.end_read(block, reading)
            self._writing.discard(block)
            self._aborted.discard(block)

    def _wants(self, block: BlockId) -> bool:
        return block not in self._aborted

    async def _keep(self, block: BlockId, durable: bool) -> StoreOutcome:
        """The answer for a block that is here already."""
        shape = self._index.find(block)
        if durable and shape is not None:
            reading = self._index.begin_read(block)
            try:
                error = await self._store.harden(block, shape)
            except (CorruptBlock, ForeignFile):
                return Dropped(DropReason.NOT_DURABLE)
            finally:
                self._index.end_read(block, reading)
            if error is not None or reading.gone:
                return Dropped(DropReason.NOT_DURABLE)
        self._index.touch([block])
        return Exists()

    # -- away ----------------------------------------------------------------------------------------------------------

    async def drop(self, block: BlockId) -> bool:
        """Forget a block, also one that is being written; whether it was here.

        Raises
        ------
        TierDown
            If the file cannot be removed. The block is still here then.
        """
        return await self._store.threads.to_the_end(self._drop([block])) > 0

    async def clear(self, scope: Scope) -> int:
        """Forget all blocks of a scope, also those being written; how many were here. Raises as `drop`."""
        space = self._index.spaces.get(scope)
        here = [] if space is None else [BlockId(scope, key) for key in space.blocks]
        moving = [name for name in self._store.busy if isinstance(name, BlockId) and name.scope == scope]
        return await self._store.threads.to_the_end(self._drop([*here, *moving]))

    async def _drop(self, blocks: list[BlockId], reason: Gone = Gone.DROPPED) -> int:
        store = self._store
        wanted = set(blocks)
        while True:
            self._aborted.update(self._writing & wanted)
            moving = next((name for name in store.busy if name in wanted), None)
            if moving is None:  # all at once: what was free may be written again while another is waited for
                break
            await store.busy.until_free(moving)
        if not store.ready:
            return 0
        leaving = self._index.forget(blocks, reason)
        count = len(leaving.blocks)
        failed, error = await store.remove(leaving)
        if failed:
            raise TierDown(f"disk tier: {len(failed)} of {count} blocks could not be removed ({error}).")
        return count

    async def expire(self) -> int:
        """Remove what has not been used for longer than its rule allows; how many blocks."""
        if not self._order.expiring or not self._store.ready:
            return 0
        old = self._order.expired()
        for block in old:
            self._order.count_expired(block)
        return await self._store.threads.to_the_end(self._drop(old, Gone.EXPIRED)) if old else 0

    # -- descriptions --------------------------------------------------------------------------------------------------

    async def describe(self, scope: Scope, text: bytes) -> None:
        """Keep a text of at most 64 KiB beside a namespace's blocks: written with the first, gone with the last.

        Raises
        ------
        StorageError
            If the text is empty or too long, or the scope makes no path.
        """
        if not 0 < len(text) <= MAX_DESCRIPTION or not is_block_id(BlockId(scope, scope.ns)):
            raise StorageError(f"disk tier: {len(text)} bytes cannot describe {scope_path(scope)}.", "")
        self._store.remember(scope, text)
        if self._store.lacks_description(scope):
            await self._store.threads.to_the_end(self._store.describe(scope))

    def descriptions(self) -> dict[Scope, bytes]:
        """The texts that are on the disk."""
        store = self._store
        return {scope: store.texts[scope] for scope, space in self._index.spaces.items() if space.description}

    # -- check ---------------------------------------------------------------------------------------------------------

    async def check(self, fix: bool = False) -> list[Finding]:
        """Walk index and files both ways, reading every byte; report, or with `fix` mend, every disagreement.

        Raises
        ------
        TierDown
            If the tier is not running or a directory cannot be listed.
        """
        if not self._store.ready:
            raise TierDown("disk tier: not started, or closed.")
        return await self._store.threads.to_the_end(check_disk(self._store, fix))
