"""What a long bench has measured so far, one file a result, so that it can stop and go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class State:
    """Results by name, one file each, and no new ones after some time.

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
        """The result, made now if it is not there and there is time."""
        found = self.get(name)
        if found is None and time.monotonic() < self._until:
            began = time.monotonic()
            found = make()
            path = self.folder / f"{name}.json"
            path.with_suffix(".new").write_text(json.dumps(found))
            path.with_suffix(".new").rename(path)
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        return found

    def all(self, prefix: str) -> list[Any]:
        """Results whose names begin so, in order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{prefix}-*.json"))]
