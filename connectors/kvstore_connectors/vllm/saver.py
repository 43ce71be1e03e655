"""Storing from a device: the engine's thread only notes what became full; another thread reserves, gathers, commits.

Full pages do not change, until their request has ended and the engine gives them to another one. So nothing is copied
aside: before each step the engine's thread says which pages it is about to write (`Saver.guard`). If one of them is
being gathered, the step's kernels wait for that on the device, some microseconds. If its turn has not come yet, it is
left out, and counted.
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
    from kvstore_connectors.vllm.jobs import SaveBlock, SaveJob
    from kvstore_connectors.vllm.transfers import Fill

AT_ONCE = 4
"""Blocks that are queued in one go: the engine's thread may wait for that, well below a millisecond."""

Store = Callable[["SaveJob", "Fill"], None]


class _Open:
    """A job that is not over."""

    __slots__ = ("after", "engine_ids", "job", "overtaken", "taken")

    job: SaveJob
    after: Any

    def __init__(self, job: SaveJob, after: Any) -> None:
        self.job = job
        self.after = after
        self.engine_ids = {one for block in job.blocks for one in block.engine_ids}
        self.overtaken: set[int] = set()
        """Engine blocks that got another use before their turn came."""
        self.taken: list[tuple[set[int], Any]] = []
        """Engine blocks that are being gathered, with the event after which they are no longer needed."""

    def used_again(self, fresh: Collection[int] | None) -> list[Any]:
        """Give up what is still to be gathered of some blocks (None: of all); the events to wait for, of the others."""
        hit = self.engine_ids if fresh is None else self.engine_ids.intersection(fresh)
        events = []
        for ids, event in self.taken:
            if not hit.isdisjoint(ids):
                events.append(event)
                hit = hit - ids
        self.overtaken |= hit
        return events


class Saver:
    """The thread that brings full blocks from a device to the daemon.

    Parameters
    ----------
    pages : DevicePages
    store : callable
        Stores a job's blocks, given the function that fills what the daemon has room for.
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

    def submit(self, job: SaveJob) -> None:
        """Store a job's blocks behind the kernels that were given to the device so far; returns at once."""
        entry = _Open(job, self._pages.mark())
        with self._change:
            self._open.append(entry)
            self._queue.append(entry)
            self._change.notify_all()

    def guard(self, fresh: Collection[int] | None) -> None:
        """The engine is about to write these blocks (None: any): what is being gathered goes first, the rest is off."""
        if not self._open or (fresh is not None and not fresh):
            return
        with self._change:
            for entry in self._open:
                for event in entry.used_again(fresh):
                    self._pages.hold(event)

    def close(self) -> None:
        """End the thread after the job it is at; the others are dropped."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join(timeout=2.0)

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                entry = self._queue.popleft()
            try:
                self._store(entry.job, lambda rooms, entry=entry: self._fill(entry, rooms))
            except Exception:
                report_defect("saving")
            finally:
                with self._change:
                    self._open.remove(entry)

    def _fill(self, entry: _Open, rooms: Sequence[tuple[SaveBlock, Room]]) -> list[bool]:
        """Gather into the rooms and wait until the bytes are there; whether each block was still whole."""
        done = [False] * len(rooms)
        batches = []
        parts = [self._pages.reach(Piece(room.parts, 0, block.engine_ids, block.position)) for block, room in rooms]
        for start in range(0, len(rooms), AT_ONCE):
            with self._change:
                here = range(start, min(start + AT_ONCE, len(rooms)))
                chosen = [i for i in here if entry.overtaken.isdisjoint(rooms[i][0].engine_ids)]
                if chosen:
                    batch = self._pages.take([parts[i] for i in chosen], entry.after)
                    entry.taken.append(({one for i in chosen for one in rooms[i][0].engine_ids}, batch.taken))
                    batches.append((chosen, batch))
        self._tally.add("save_overtaken", len(rooms) - sum(len(chosen) for chosen, _ in batches))
        for chosen, batch in batches:
            for i, good in zip(chosen, batch.wait(), strict=True):
                done[i] = good
                if good:
                    self._pages.seal(rooms[i][1].parts, rooms[i][0].position)
                else:
                    self._tally.add("save_unencodable")
        return done
