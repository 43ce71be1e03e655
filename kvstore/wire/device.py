"""Messages about blocks that lie in the memory of a GPU, too. They stand apart from lookup and lease, so that clients
that know nothing of GPUs go on as before.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvstore.wire.fields import Handle, Message

GPU_ID_BYTES = 16


class Reach(Message):
    """Where blocks of a lease lie in the memory of a GPU, named by its UUID, as well as where the grants say.

    They may be read there for as long as the lease lasts. It is also how the daemon learns what that GPU's engines use.
    """

    lease: Handle
    gpu: Annotated[bytes, Meta(min_length=GPU_ID_BYTES, max_length=GPU_ID_BYTES)]


class Place(Message):
    """Block `index` of the lease lies in one piece in a slab of GPU memory."""

    index: int
    slab: int
    offset: int


class ReachReply(Message):
    """The GPU whose memory the daemon has, empty if none; if it is not the one asked about there are no places."""

    gpu: bytes
    places: list[Place]


class OpenSlab(Message):
    """Ask for the handle of a slab of GPU memory, of this trust domain."""

    slab: Handle


class OpenSlabReply(Message):
    """Its size, and the handle by which CUDA opens it in another process (`cudaIpcOpenMemHandle`)."""

    nbytes: int
    handle: bytes
