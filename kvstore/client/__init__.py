"""Talk to a kvstore daemon: blocking (`KVStoreClient`) or with asyncio (`AsyncKVStoreClient`)."""

from kvstore.client.aio import AsyncKVStoreClient
from kvstore.client.blocks import LeasedBlock, Loaded, Room
from kvstore.client.handles import AsyncReservation, Lease, Reservation
from kvstore.client.sync import KVStoreClient

__all__ = [
    "AsyncKVStoreClient",
    "AsyncReservation",
    "KVStoreClient",
    "Lease",
    "LeasedBlock",
    "Loaded",
    "Reservation",
    "Room",
]
