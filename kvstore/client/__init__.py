"""Talk to a kvstore daemon: blocking (`KVStoreClient`) or with asyncio (`AsyncKVStoreClient`)."""

from kvstore.client.aio import AsyncKVStoreClient
from kvstore.client.blocks import LeasedBlock, Loaded, Room
from kvstore.client.chunks import ChunkPart, chunk_keys, chunk_parts
from kvstore.client.events import Event, Mirror, Position
from kvstore.client.handles import AsyncReservation, Lease, Reservation
from kvstore.client.plans import AsyncPlanRun, PlanRun
from kvstore.client.reports import Verdict, report_blend
from kvstore.client.streams import AsyncEventStream, EventStream
from kvstore.client.sync import KVStoreClient

__all__ = [
    "AsyncEventStream",
    "AsyncKVStoreClient",
    "AsyncPlanRun",
    "AsyncReservation",
    "ChunkPart",
    "Event",
    "EventStream",
    "KVStoreClient",
    "Lease",
    "LeasedBlock",
    "Loaded",
    "Mirror",
    "PlanRun",
    "Position",
    "Reservation",
    "Room",
    "Verdict",
    "chunk_keys",
    "chunk_parts",
    "report_blend",
]
