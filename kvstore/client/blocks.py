"""Blocks as a client holds them: leased for reading, reserved for writing, or copied out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from kvstore.client.slabs import Bytes
from kvstore.errors import InvalidParams
from kvstore.types import BlockHeader, TierCode

Buffer = Any
"""Anything with a contiguous buffer: bytes, bytearray, memoryview, a NumPy array, a CPU tensor's `.numpy()`."""


def as_bytes(buffer: Buffer, writable: bool = False) -> memoryview:
    """A buffer as flat bytes, without copying.

    Raises
    ------
    InvalidParams
        If it is not contiguous, or read-only where it is to be written.
    """
    try:
        view = memoryview(cast("bytes", buffer))
        if view.ndim != 1 or view.format != "B" or not view.c_contiguous:
            view = view.cast("B")
    except (TypeError, ValueError) as error:
        if not isinstance(buffer, np.ndarray) or not buffer.flags.c_contiguous:
            raise InvalidParams(f"buffer: not contiguous memory ({error}).", "") from None
        # A type or shape that the buffer protocol does not know.
        view = memoryview(cast("bytes", buffer.reshape(-1).view(np.uint8)))
    if writable and view.readonly:
        raise InvalidParams("buffer: it is read-only.", "")
    return view


def copy_parts(parts: Sequence[Bytes], into: memoryview) -> None:
    """Copy parts one after the other into a buffer of their total length, without holding the interpreter lock."""
    target = np.frombuffer(into, dtype=np.uint8)
    if len(parts) == 1:
        np.copyto(target, parts[0])
        return
    position = 0
    for part in parts:
        np.copyto(target[position : position + len(part)], part)
        position += len(part)


class LeasedBlock(msgspec.Struct, eq=False, gc=False):
    """A block in shared memory that may be read while its lease is valid.

    Attributes
    ----------
    index : int
        Place in the request.
    nbytes : int
        Payload bytes.
    tier : TierCode
        Where it was found.
    parts : list of ndarray, uint8
        Its bytes, in order, in place. Nearly always one part. Empty for a remote client.
    header : BlockHeader or None
        Present if headers were asked for.
    device : array of uint8, or None
        The same bytes in the memory of this process's GPU, where the daemon has them there (`kvstore.client.device`).
    """

    index: int
    nbytes: int
    tier: TierCode
    parts: list[Bytes]
    header: BlockHeader | None
    device: Any = None

    @property
    def array(self) -> Bytes | None:
        """The bytes in place if they are contiguous."""
        return self.parts[0] if len(self.parts) == 1 else None

    def copy_into(self, buffer: Buffer) -> None:
        """Copy the bytes out, from shared memory. The lease must be found valid afterwards."""
        view = as_bytes(buffer, writable=True)
        if len(view) != self.nbytes or not self.parts:
            raise InvalidParams(f"buffer: {len(view)} bytes for a block of {self.nbytes} in shared memory.", "")
        copy_parts(self.parts, view)


class Room(msgspec.Struct, eq=False, gc=False):
    """Memory for one block that is to be stored.

    Attributes
    ----------
    index : int
        Place in the request.
    nbytes : int
        Payload bytes.
    parts : list of ndarray, uint8
        Where they go, in order. Empty for a remote client.
    """

    index: int
    nbytes: int
    parts: list[Bytes]

    @property
    def array(self) -> Bytes | None:
        """The memory if it is contiguous."""
        return self.parts[0] if len(self.parts) == 1 else None

    def write(self, buffer: Buffer) -> None:
        """Copy the block's bytes in, into shared memory."""
        view = as_bytes(buffer)
        if len(view) != self.nbytes or not self.parts:
            raise InvalidParams(f"buffer: {len(view)} bytes for a block of {self.nbytes} in shared memory.", "")
        source = np.frombuffer(view, dtype=np.uint8)
        if len(self.parts) == 1:
            np.copyto(self.parts[0], source)
            return
        position = 0
        for part in self.parts:
            np.copyto(part, source[position : position + len(part)])
            position += len(part)


class Loaded(NamedTuple):
    """A block copied out of the store."""

    data: bytearray
    header: BlockHeader
    tier: TierCode
