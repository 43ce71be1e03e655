"""Names whose files a thread is working on: nobody else may touch them until all who marked them are done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvstore.types import BlockId, Scope

Name = BlockId | Scope


@dataclass(slots=True)
class _Marks:
    count: int
    free: asyncio.Future[None]


class Busy:
    """Marks on blocks and namespaces. They may lie inside each other or overlap; the last to end sets a name free."""

    def __init__(self) -> None:
        self._marks: dict[Name, _Marks] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._marks

    def __iter__(self) -> Iterator[Name]:
        return iter(self._marks)

    def __len__(self) -> int:
        return len(self._marks)

    async def until_free(self, name: Name) -> None:
        """Wait until nobody works on a name."""
        while (marks := self._marks.get(name)) is not None:
            await marks.free

    @contextlib.contextmanager
    def mark(self, names: Iterable[Name]) -> Iterator[None]:
        """Work on names."""
        marked = list(names)
        for name in marked:
            marks = self._marks.get(name)
            if marks is None:
                self._marks[name] = _Marks(1, asyncio.get_running_loop().create_future())
            else:
                marks.count += 1
        try:
            yield
        finally:
            for name in marked:
                marks = self._marks[name]
                marks.count -= 1
                if not marks.count:
                    del self._marks[name]
                    marks.free.set_result(None)
