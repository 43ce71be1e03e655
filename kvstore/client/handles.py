"""Leases and reservations as a client holds them, for both faces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kvstore.client.blocks import LeasedBlock, Room
from kvstore.errors import LeaseExpired
from kvstore.types import Dropped, DropReason, Exists, Miss, StoreOutcome

if TYPE_CHECKING:
    from kvstore.client.aio import AsyncKVStoreClient
    from kvstore.client.sync import KVStoreClient

C = TypeVar("C", "KVStoreClient", "AsyncKVStoreClient")


class Lease:
    """The right to read blocks in shared memory, as a context manager that releases it. Releasing waits for nothing.

    Attributes
    ----------
    blocks : list of LeasedBlock or Miss
        One for each key that was asked for.
    """

    def __init__(
        self,
        client: KVStoreClient | AsyncKVStoreClient,
        lease: int,
        expires: float,
        epoch: int,
        blocks: list[LeasedBlock | Miss],
    ) -> None:
        self._client = client
        self._epoch = epoch
        self._expires = expires
        self.id = lease
        self.blocks = blocks
        self._released = False

    def valid(self) -> bool:
        """Whether the right still held just now. Ask after reading: what was read before is then good."""
        return not self._released and self._client.still_valid(self._expires, self._epoch)

    def release(self) -> None:
        """Give the right back. May be called twice."""
        if not self._released:
            self._released = True
            self._client.end_lease(self.id, self._epoch)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class _Rooms(Generic[C]):
    """What both kinds of reservation share."""

    def __init__(
        self, client: C, reservation: int, expires: float, epoch: int, blocks: list[Room | Exists | Dropped]
    ) -> None:
        self._client = client
        self._expires = expires
        self._epoch = epoch
        self._open = any(isinstance(block, Room) for block in blocks)
        self.id = reservation
        self.blocks = blocks

    def valid(self) -> bool:
        """Whether it can still be committed."""
        return self._open and self._client.still_valid(self._expires, self._epoch)

    def abort(self) -> None:
        """Give all room back. May be called twice."""
        if self._open:
            self._open = False
            self._client.core.abort(self.id, self._epoch)

    def _close(self, indexes: Sequence[int] | None) -> list[int]:
        """The indexes to commit, which is possible once; none if there is nothing to commit."""
        if not self._open:
            return []
        rooms = [block.index for block in self.blocks if isinstance(block, Room)]
        chosen = rooms if indexes is None else list(indexes)
        valid = self.valid()
        if not chosen or not valid:
            self.abort()
        if not valid:
            raise LeaseExpired("the reservation has expired, or its connection is gone; nothing was stored.")
        self._open = False
        return chosen

    def _outcomes(self, done: dict[int, StoreOutcome]) -> list[StoreOutcome]:
        dropped = Dropped(DropReason.ABORTED)
        return [done.get(i, dropped) if isinstance(b, Room) else b for i, b in enumerate(self.blocks)]


class Reservation(_Rooms["KVStoreClient"]):
    """The right to fill memory, as a context manager that gives back what was not committed.

    Attributes
    ----------
    blocks : list of Room, Exists or Dropped
        One for each block that was offered.
    """

    def commit(self, indexes: Sequence[int] | None = None, *, durable: bool = False) -> list[StoreOutcome]:
        """Make filled blocks visible and give the others back.

        Parameters
        ----------
        indexes : sequence of int, optional
            Which blocks were filled; all that have room if not given.
        durable : bool
            Wait until they would survive a loss of power.

        Returns
        -------
        list of StoreOutcome
            One for each block that was offered.

        Raises
        ------
        LeaseExpired
            If it took too long, or the connection is gone: nothing was stored.
        """
        chosen = self._close(indexes)
        if not chosen:
            return self._outcomes({})
        return self._outcomes(self._client.drive(self._client.core.commit(self.id, chosen, durable), None))

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()


class AsyncReservation(_Rooms["AsyncKVStoreClient"]):
    """A `Reservation` for asyncio programs."""

    async def commit(self, indexes: Sequence[int] | None = None, *, durable: bool = False) -> list[StoreOutcome]:
        """See `Reservation.commit`."""
        chosen = self._close(indexes)
        if not chosen:
            return self._outcomes({})
        return self._outcomes(await self._client.drive(self._client.core.commit(self.id, chosen, durable), None))

    async def __aenter__(self) -> AsyncReservation:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.abort()
