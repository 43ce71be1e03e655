"""Group commit: everybody who waits for names to be on the disk shares the next round of fsyncs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from kvstore.types import Scope


class GroupSync:
    """Rounds of directory fsyncs, one at a time. Who comes during a round waits for the next, together with all others.

    Parameters
    ----------
    sync_names : callable
        ``await sync_names(scopes, new)`` makes the names in these namespaces' directories durable, and the directories'
        own names for those in `new`.
    """

    def __init__(self, sync_names: Callable[[set[Scope], set[Scope]], Awaitable[None]]) -> None:
        self._sync_names = sync_names
        self._wanted: set[Scope] = set()
        self._done: asyncio.Future[None] | None = None
        self._rounds: asyncio.Task[None] | None = None
        self._rooted: set[Scope] = set()
        self._rooting: set[Scope] = set()

    async def sync(self, scope: Scope) -> None:
        """Wait until the names that are in a namespace's directory now would survive a loss of power.

        Raises
        ------
        OSError
            From the kernel, for everybody in the round.
        """
        self._wanted.add(scope)
        if self._done is None:
            self._done = asyncio.get_running_loop().create_future()
        mine = self._done
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.ensure_future(self._run())
        await mine

    def forget(self, scopes: Iterable[Scope]) -> None:
        """Note that directories are being removed: made anew, their names have to be synced again."""
        self._rooted.difference_update(scopes)
        self._rooting.difference_update(scopes)

    async def _run(self) -> None:
        while self._done is not None:
            scopes, done = self._wanted, self._done
            self._wanted, self._done = set(), None
            new = scopes - self._rooted
            self._rooting = set(new)  # less what is removed during the round
            try:
                await self._sync_names(scopes, new)
            except OSError as error:
                done.set_exception(error)
            except BaseException as error:
                done.set_exception(OSError(f"group commit ended: {error!r}"))
                raise
            else:
                self._rooted |= self._rooting
                done.set_result(None)
