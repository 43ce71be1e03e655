"""What a long bench has measured so far, one file a result: it stops and goes on, and processes can share the work."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class State:
    """Results by name, one file each, and no new ones after some time.

    A result is made by one process at a time: it holds a lock on a file beside it, which ends with the process.

    Parameters
    ----------
    folder : Path
    seconds : float
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._until = folder, time.monotonic() + seconds

    def get(self, name: str) -> Any:
        """A result, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result, made now if it is not there, nobody else is at it, and there is time."""
        found = self.get(name)
        if found is None and time.monotonic() < self._until:
            with self.claimed(name) as mine:
                found = self.get(name)
                if mine and found is None:
                    began = time.monotonic()
                    found = make()
                    path = self.folder / f"{name}.json"
                    path.with_suffix(".new").write_text(json.dumps(found))
                    path.with_suffix(".new").rename(path)
                    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        return found

    def every(self, wanted: Mapping[str, Callable[[], Any]]) -> bool:
        """Have all of these made, here or by the processes beside; whether there was time for it."""
        while True:
            missing = [name for name, make in wanted.items() if self.once(name, make) is None]
            if not missing or time.monotonic() >= self._until:
                return not missing
            time.sleep(0.5)

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Keep others from a piece of work, or learn that it is theirs."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def all(self, prefix: str) -> list[Any]:
        """Results whose names begin so, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{prefix}-*.json"))]
