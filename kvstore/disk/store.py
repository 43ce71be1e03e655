"""Index, files and threads in step: each method changes the disk in one trip to a thread and books what came of it.

State lives on the event loop, system calls in the threads. Blocks and namespaces whose files a thread is working on are
`busy`. Methods are not written to be cancelled; callers run them by `Threads.to_the_end`.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.disk.blocks import BlockFiles, TmpLeft, description_cost
from kvstore.disk.busy import Busy
from kvstore.disk.directory import Directory
from kvstore.disk.format import Shape, block_name, scope_path
from kvstore.disk.group import GroupSync
from kvstore.disk.index import Departure, Index, Removed
from kvstore.disk.io import Files
from kvstore.disk.recover import Recovered, by_last_use, recover
from kvstore.disk.threads import Threads
from kvstore.errors import DirectoryUnusable
from kvstore.eviction.base import EvictionPolicy
from kvstore.types import BlockHeader, BlockId, Gone, Scope

QUARANTINE_FILES = 64
QUARANTINE_SHARE = 8
"""Damaged files kept for inspection: at most so many, and at most one part in so many of the budget."""

IDLE_TEXTS = 4096
"""Descriptions kept in memory for namespaces that have no blocks here."""


class _Written(NamedTuple):
    """What an I/O thread made of a write."""

    error: OSError | None = None
    failed: Sequence[Removed] = ()
    leftover: str = ""


class Store:
    """The blocks of one directory.

    Parameters
    ----------
    root : Path
        The directory.
    capacity : int
        Byte budget.
    policy : EvictionPolicy
        Order of eviction.
    threads : int
        I/O threads that read, and as many that do everything else.
    files : Files
        The system calls.
    pin_share : float
        The part of the budget that pins may keep.
    """

    directory: Directory
    blocks: BlockFiles

    def __init__(
        self,
        root: Path,
        capacity: int,
        policy: EvictionPolicy[BlockId],
        threads: int,
        files: Files,
        pin_share: float = 0.5,
    ) -> None:
        self.root = root
        self.index = Index(capacity, policy, pin_share)
        self.files = files
        self.busy = Busy()
        self.found: dict[str, Any] = {}
        self.texts: dict[Scope, bytes] = {}
        self.ready = False
        self.threads = Threads(threads)
        self.found_share = 0.0
        self._closed = False
        self._names = GroupSync(self._sync_names)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Take the directory, list what is in it, and evict what the budget does not allow.

        Raises
        ------
        DirectoryUnusable
            If that is not possible.
        """
        began = time.perf_counter()
        index = self.index
        found = await self.threads.run(self._open)
        index.adopt(found.spaces, found.quarantine)
        index.capacity += int(self.found_share * index.used)
        self.texts = found.texts
        self.found = {"recovered_blocks": index.count, "foreign_files": len(found.foreign)}
        await self._bound_quarantine()
        if index.used > index.capacity:
            await self._order_blocks()
            if not await self.free(index.used - index.capacity):
                raise DirectoryUnusable(
                    f"disk.path: what is in {self.root} takes {index.used} bytes, the budget is {index.capacity}."
                )
        else:
            self.threads.begin(self._order_blocks())
        self.ready = True
        self.found["recover_s"] = time.perf_counter() - began

    def _open(self) -> Recovered:
        self.directory = Directory(self.root, self.files)
        self.blocks = BlockFiles(self.directory, self.files)
        try:
            return recover(self.directory, self.blocks, self.files)
        except OSError as error:
            raise DirectoryUnusable(f"disk.path: {self.root} cannot be read: {error}.") from error

    async def _order_blocks(self) -> None:
        """Find out in which order the blocks found at start were last used, and which of them are no files of ours."""
        found = {scope: list(space.blocks.items()) for scope, space in self.index.spaces.items()}
        order, strangers = await self.threads.run(by_last_use, self.directory, self.files, found)
        self.index.set_cold(order)
        for block, shape in strangers:
            if self.index.is_cold(block) and self.index.find(block) == shape:  # it may have been replaced
                await self.forget_lost(block, shape)
                self.found["foreign_files"] += 1

    async def close(self) -> None:
        """Finish what was begun and let go of the directory."""
        self.ready = False
        if self._closed:
            return
        self._closed = True
        await self.threads.close()
        if hasattr(self, "directory"):
            self.directory.close()

    # -- coming --------------------------------------------------------------------------------------------------------

    async def write(
        self,
        block: BlockId,
        header: BlockHeader,
        shape: Shape,
        payload: Sequence[memoryview],
        durable: bool,
        wanted: Callable[[], bool],
        replaced: Shape | None = None,
    ) -> OSError | None:
        """Store a block if it still is `wanted` when it is written. Why not, if the kernel or the budget refused.

        One that is here with the shape `replaced` changes to the new one, and its old file leaves; if that was found
        damaged meanwhile, it comes as any other.
        """
        reservation = self.index.reserve(block.scope, shape.cost)
        if reservation is None:
            return OSError(errno.ENOSPC, "not enough blocks may be evicted")
        wrote = _Written(OSError("not tried"))
        error: OSError | None = None
        try:
            job = partial(self.blocks.write, block, header, shape, payload, durable)
            wrote = await self._replace(reservation.leaving, job, shape.file_bytes)
            error = wrote.error or (await self.sync_names(block.scope) if durable else None)
        finally:
            kept = self._kept(shape.cost, wrote)
            old = None
            if wrote.error is None and replaced is not None and self.index.find(block) == replaced:
                old = self.index.exchange(block, shape)
            elif wrote.error is None:
                self.index.insert(block, shape, header)
            empty = self.index.settle(reservation, kept, wrote.failed)
        if old is not None:
            await self._remove_old(old)
        if wrote.error is None and (error is not None or not wanted()):
            await self.remove(self.index.forget([block]))
        await self.remove(empty)
        return error

    async def _remove_old(self, old: Departure) -> None:
        """Remove the file of a block that has another one now."""
        failed, _ = await self.threads.run(self._clear_out, old)
        for block, shape in failed:
            self.index.leftovers[f"blocks/{scope_path(block.scope)}/{block_name(block.key, shape)}"] = shape.cost
            self.index.used += shape.cost - old.nbytes  # a reader pays back what it was not told is still there
        if not failed:
            self.index.depart(old)

    async def _replace(self, leaving: Departure, write: Callable[[str], None], file_bytes: int = 0) -> _Written:
        """One trip to a thread: remove what leaves, and only then write, over a file of that length if one leaves."""

        def job() -> _Written:
            taken, rest = self._take_one(leaving, file_bytes)
            failed, error = self._clear_out(rest)
            try:
                if error is None:
                    write(taken)
                else:
                    self.blocks.give_up(taken)
            except TmpLeft as left:
                return _Written(left.cause, failed, f"tmp/{left.name}")
            except OSError as other:
                return _Written(error or other, failed, f"tmp/{taken}" if error else "")
            return _Written(error, failed)

        with self.occupied(leaving):
            return await self.threads.run(job)

    def _take_one(self, leaving: Departure, file_bytes: int) -> tuple[str, Departure]:
        """In a thread: a file among those that leave which can be written over, and what else leaves."""
        for at, (block, shape) in enumerate(leaving.blocks):
            if shape.file_bytes == file_bytes:
                taken = self.blocks.take(block, shape)
                if taken:
                    others = [*leaving.blocks[:at], *leaving.blocks[at + 1 :]]
                    return taken, Departure(others, leaving.scopes)
                break
        return "", leaving

    def _kept(self, cost: int, wrote: _Written) -> int:
        """Bytes of a new file that are on the disk after a write, wanted or not."""
        if wrote.leftover:
            self.index.leftovers[wrote.leftover] = cost
            return cost
        return cost if wrote.error is None else 0

    async def harden(self, block: BlockId, shape: Shape) -> OSError | None:
        """Make a stored block survive a loss of power. Why not, if so."""
        try:
            await self.threads.run(self.blocks.harden, block, shape)
        except OSError as error:
            return error
        return await self.sync_names(block.scope)

    async def sync_names(self, scope: Scope) -> OSError | None:
        """Wait for the group commit of a namespace's names. Why it failed, if so."""
        try:
            await self._names.sync(scope)
        except OSError as error:
            return error
        return None

    async def _sync_names(self, scopes: set[Scope], new: set[Scope]) -> None:
        await self.threads.run(self.blocks.sync_names, scopes, new)

    # -- leaving -------------------------------------------------------------------------------------------------------

    async def free(self, nbytes: int) -> bool:
        """Evict blocks of at least `nbytes`; whether that much is gone."""
        leaving = self.index.evict(nbytes)
        if leaving is None:
            return False
        failed, _ = await self.remove(leaving)
        self.index.evicted -= len(failed)
        return not failed

    async def remove(self, leaving: Departure) -> tuple[list[Removed], OSError | None]:
        """Remove what the index has forgotten. What could not be removed is back in it, and returned with why."""
        failed: list[Removed] = []
        error = None
        if leaving.blocks or leaving.scopes:
            with self.occupied(leaving):
                failed, error = await self.threads.run(self._clear_out, leaving)
        self.index.depart(leaving, failed)
        return failed, error

    def _clear_out(self, leaving: Departure) -> tuple[list[Removed], OSError | None]:
        """In a thread: remove files, then directories that are empty. What could not be removed, and why."""
        failed: list[Removed] = []
        cause = None
        for block, shape in leaving.blocks:
            try:
                self.blocks.remove(block, shape)
            except OSError as error:
                failed.append((block, shape))
                cause = error
        for scope in leaving.scopes:
            self.blocks.remove_namespace(scope)
        return failed, cause

    async def forget_lost(self, block: BlockId, shape: Shape) -> None:
        """Forget a block whose file is gone, or has been replaced by something that is not ours to remove."""
        if self.index.find(block) != shape:
            return
        leaving = self.index.forget([block], Gone.LOST)
        leaving.blocks.clear()
        await self.remove(leaving)

    async def set_aside(self, block: BlockId, shape: Shape) -> None:
        """Forget a damaged block and move its file into quarantine, or away if it is too large for that."""
        index = self.index
        leaving, reading = index.forget_damaged(block, shape)
        room = index.capacity - index.used + (shape.cost if leaving.blocks else 0)
        keep = shape.cost <= min(room, index.capacity // QUARANTINE_SHARE)
        with self.occupied(Departure([(block, shape)], leaving.scopes)):
            place = await self.threads.run(self._move_aside, block, shape, keep)
            await self.threads.run(self._clear_out, Departure(scopes=leaving.scopes))
        if place is not None:
            where, name = place
            where[name] = shape.cost
            index.used += shape.cost
        elif reading.count:
            reading.owed = shape.cost
            index.used += shape.cost  # removed, and still open
        index.depart(leaving)
        await self._bound_quarantine()

    def _move_aside(self, block: BlockId, shape: Shape, keep: bool) -> tuple[dict[str, int], str] | None:
        """In a thread: where the damaged file's bytes are booked now, and under what name."""
        if keep:
            with contextlib.suppress(OSError):
                return self.index.quarantine, self.blocks.set_aside(block, shape)
        try:
            self.blocks.remove(block, shape)
        except OSError:
            return self.index.leftovers, f"blocks/{scope_path(block.scope)}/{block_name(block.key, shape)}"
        return None

    async def _bound_quarantine(self) -> None:
        """Keep the youngest damaged files that the bounds allow."""
        index = self.index
        kept = index.quarantine
        while len(kept) > QUARANTINE_FILES or sum(kept.values()) > index.capacity // QUARANTINE_SHARE:
            name = next(iter(kept))
            cost = kept.pop(name)
            try:
                await self.threads.run(self.blocks.forget_aside, name)
            except OSError:
                index.leftovers[f"quarantine/{name}"] = cost
            else:
                index.used -= cost

    # -- descriptions --------------------------------------------------------------------------------------------------

    def remember(self, scope: Scope, text: bytes) -> None:
        """Keep the description of a namespace in memory until there are blocks to write it beside."""
        self.texts[scope] = text
        while len(self.texts) > len(self.index.spaces) + IDLE_TEXTS:
            oldest = next(scope for scope in self.texts if scope not in self.index.spaces)
            del self.texts[oldest]

    def lacks_description(self, scope: Scope) -> bool:
        """Whether a namespace has blocks, and a description that is not on the disk yet."""
        space = self.index.spaces.get(scope)
        return space is not None and bool(space.blocks) and not space.description and scope in self.texts

    async def describe(self, scope: Scope) -> None:
        """Write the description of a namespace, unless there is no room: then a later put tries again."""
        await self.busy.until_free(scope)
        if not self.lacks_description(scope) or not self.ready:
            return
        text = self.texts[scope]
        cost = description_cost(len(text))
        reservation = self.index.reserve(scope, cost)
        if reservation is None:
            return
        wrote = _Written(OSError("not tried"))
        try:
            with self.occupied(Departure(scopes=[scope])):
                wrote = await self._replace(reservation.leaving, lambda _: self.blocks.describe(scope, text))
        finally:
            kept = self._kept(cost, wrote)
            if wrote.error is None:
                self.index.spaces[scope].description = cost
            empty = self.index.settle(reservation, kept, wrote.failed)
        await self.remove(empty)

    @contextlib.contextmanager
    def occupied(self, leaving: Departure) -> Iterator[None]:
        """Mark blocks and namespaces as busy."""
        self._names.forget(leaving.scopes)
        with self.busy.mark([*(block for block, _ in leaving.blocks), *leaving.scopes]):
            yield
