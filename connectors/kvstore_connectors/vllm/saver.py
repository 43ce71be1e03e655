"""Storing from a device: the engine's thread only notes what became full; another thread reserves, gathers, commits.

Full pages do not change, until their request has ended and the engine gives them to another one. So nothing is copied
aside: before each step the engine's thread says which pages it is about to write (`Saver.guard`). If one of them is
being gathered, the step's kernels wait for that on the device, some microseconds. If its turn has not come yet, it is
left out, and counted.

This thread needs the interpreter that the engine needs, too. So what is queued is stored together, with one question to
the daemon and one answer, and it sleeps until there is something.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.client import Room
from kvstore_connectors.base import Tally, report_defect
from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.pages import Piece

if TYPE_CHECKING:
    from kvstore_connectors.vllm.identity import Scope
    from kvstore_connectors.vllm.jobs import SaveBlock, SaveJob
    from kvstore_connectors.vllm.transfers import Fill

AT_ONCE = 4
"""Blocks that are queued in one go: the engine's thread may have to wait for that, well below a millisecond."""

TOGETHER = 32
"""Blocks above which no more are stored together: the daemon shows them when all have come."""

Store = Callable[["Scope", "Sequence[SaveBlock]", "Fill"], None]


class _Gathering:
    """Engine blocks that are being gathered.

    Attributes
    ----------
    begun : bool
        Whether that was given to the device; until then `event` is not known.
    event : device event or None
        After which they are no longer needed.
    """

    __slots__ = ("begun", "engine_ids", "event")

    def __init__(self, engine_ids: set[int]) -> None:
        self.engine_ids = engine_ids
        self.begun = False
        self.event: Any = None


class _Open:
    """What became full in a step, of one scope, and is not stored yet."""

    __slots__ = ("after", "blocks", "engine_ids", "overtaken", "scope", "taken")

    scope: Scope
    blocks: list[SaveBlock]
    after: Any

    def __init__(self, scope: Scope, blocks: list[SaveBlock], after: Any) -> None:
        self.scope = scope
        self.blocks = blocks
        self.after = after
        self.engine_ids = set[int]().union(*(block.engine_ids for block in blocks))
        self.overtaken: set[int] = set()
        """Engine blocks that got another use before their turn came."""
        self.taken: list[_Gathering] = []

    def used_again(self, fresh: Collection[int] | None) -> list[_Gathering]:
        """Give up what is still to be gathered of some blocks (None: of all); of the others, what to wait for."""
        hit = self.engine_ids if fresh is None else self.engine_ids.intersection(fresh)
        if not hit:
            return []
        found = [one for one in self.taken if not hit.isdisjoint(one.engine_ids)]
        self.overtaken |= hit.difference(*(one.engine_ids for one in found))
        return found


class Saver:
    """The thread that brings full blocks from a device to the daemon.

    Parameters
    ----------
    pages : DevicePages
    store : callable
        Stores blocks of a scope, given the function that fills what the daemon has room for.
    tally : Tally
    """

    def __init__(self, pages: DevicePages, store: Store, tally: Tally) -> None:
        self._pages = pages
        self._store = store
        self._tally = tally
        self._queue: deque[_Open] = deque()
        self._open: list[_Open] = []
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="kvstore-save", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[SaveJob]) -> None:
        """Store a step's jobs behind the kernels that were given to the device so far; returns at once."""
        blocks: dict[Scope, list[SaveBlock]] = {}
        for job in jobs:
            blocks.setdefault(job.scope, []).extend(job.blocks)
        after = self._pages.mark()
        entries = [_Open(scope, some, after) for scope, some in blocks.items()]
        with self._change:
            self._open += entries
            self._queue += entries
            self._change.notify()

    def guard(self, fresh: Collection[int] | None) -> None:
        """The engine is about to write these blocks (None: any): what is being gathered goes first, the rest is off."""
        if not self._open or (fresh is not None and not fresh):
            return
        with self._change:
            found = dict.fromkeys(one for entry in self._open for one in entry.used_again(fresh))
            for one in found:
                self._change.wait_for(lambda one=one: one.begun)
                if one.event is not None:
                    self._pages.hold(one.event)

    def close(self) -> None:
        """End the thread after what it is at; the rest is dropped."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join(timeout=2.0)

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                entries = self._next()
            try:
                owners = {id(block): entry for entry in entries for block in entry.blocks}
                blocks = [block for entry in entries for block in entry.blocks]
                self._store(entries[0].scope, blocks, lambda rooms, owners=owners: self._fill(owners, rooms))
            except Exception:
                report_defect("saving")
            finally:
                with self._change:
                    for entry in entries:
                        self._open.remove(entry)

    def _next(self) -> list[_Open]:
        """What is stored together: of one scope, in order."""
        entries = [self._queue.popleft()]
        count = len(entries[0].blocks)
        while self._queue and self._queue[0].scope == entries[0].scope:
            count += len(self._queue[0].blocks)
            if count > TOGETHER:
                break
            entries.append(self._queue.popleft())
        return entries

    def _fill(self, owners: dict[int, _Open], rooms: Sequence[tuple[SaveBlock, Room]]) -> list[bool]:
        """Gather into the rooms and wait until the bytes are there; whether each block was still whole."""
        done = [False] * len(rooms)
        batches: list[tuple[list[int], Any]] = []
        parts = [self._pages.reach(Piece(room.parts, 0, block.engine_ids, block.position)) for block, room in rooms]
        for start in range(0, len(rooms), AT_ONCE):
            some = [(i, rooms[i][0].engine_ids, owners[id(rooms[i][0])]) for i in range(len(rooms))[start:][:AT_ONCE]]
            with self._change:
                some = [(i, ids, entry) for i, ids, entry in some if entry.overtaken.isdisjoint(ids)]
                gathering = _Gathering({one for _, ids, _ in some for one in ids})
                for entry in {entry for _, _, entry in some}:
                    entry.taken.append(gathering)
            if some:
                chosen = [i for i, _, _ in some]
                # Behind the last of their steps: those before it were given to the device before it.
                batches.append((chosen, self._take(gathering, [parts[i] for i in chosen], some[-1][2].after)))
        self._tally.add("save_overtaken", len(rooms) - sum(len(chosen) for chosen, _ in batches))
        for chosen, batch in batches:
            for i, good in zip(chosen, batch.wait(), strict=True):
                done[i] = good
                if good:
                    self._pages.seal(rooms[i][1].parts, rooms[i][0].position)
                else:
                    self._tally.add("save_unencodable")
        return done

    def _take(self, gathering: _Gathering, parts: Sequence[Any], after: Any) -> Any:
        """Begin to gather. Meanwhile the engine's thread goes on, unless it is about to write these very blocks."""
        batch = None
        try:
            batch = self._pages.take(parts, after)
        finally:
            with self._change:
                gathering.begun, gathering.event = True, None if batch is None else batch.taken
                self._change.notify_all()
        return batch
