"""Talk to a kvstore daemon: blocking (`KVStoreClient`) or with asyncio (`AsyncKVStoreClient`)."""

from kvstore.client.aio import AsyncKVStoreClient, AsyncReservation
from kvstore.client.blocks import LeasedBlock, Loaded, Room
from kvstore.client.sync import KVStoreClient, Lease, Reservation

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
