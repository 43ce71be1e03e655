"""The thread that loads beside the running batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from kvstore_connectors.base import report_defect
from kvstore_connectors.vllm.jobs import LoadJob


class Loader:
    """Loads jobs one after the other, and says once of each that it has ended.

    Parameters
    ----------
    load : callable
        Loads a job and returns the engine blocks that failed; given the job and the event it has to wait for.
    """

    def __init__(self, load: Callable[[LoadJob, Any, Callable[[], bool]], set[int]]) -> None:
        self._load = load
        self._jobs: deque[tuple[LoadJob, Any]] = deque()
        self._change = threading.Condition()
        self._finished: set[str] = set()
        self._failed: set[int] = set()
        self._open = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="kvstore-load", daemon=True)
        self._thread.start()

    def submit(self, job: LoadJob, after: Any) -> None:
        """Load a job; it will be reported by `take` exactly once."""
        with self._change:
            self._open += 1
            self._jobs.append((job, after))
            self._change.notify_all()

    def take(self, wait_s: float = 0.0) -> tuple[set[str], set[int]]:
        """Requests whose loads ended since the last call, and engine blocks that failed; may wait for the first."""
        if not self._open and not self._finished:  # as in most steps
            return set(), set()
        with self._change:
            if self._open and not self._finished and wait_s > 0:
                self._change.wait_for(lambda: self._finished or self._stopped, wait_s)
            finished, self._finished = self._finished, set()
            failed, self._failed = self._failed, set()
        return finished, failed

    def close(self) -> None:
        """End the thread after the load it is at."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join(timeout=2.0)

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                job, after = self._jobs.popleft()
            try:
                failed = self._load(job, after, lambda: self._stopped)
            except Exception:  # the engine waits for this request: it has to hear of its end
                report_defect("loading")
                failed = set(job.engine_ids)
            with self._change:
                # In one step, so that no request is reported as finished before its failures are.
                self._failed |= failed
                self._finished.add(job.request)
                self._open -= 1
                self._change.notify_all()
