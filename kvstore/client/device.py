"""GPU memory of the daemon, as a client on the same GPU reaches it.

What is read there is in host memory, too, under the same lease. So nothing that goes wrong here is an error: the blocks
stay readable where they are, and the daemon is not asked again on this connection.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.client.blocks import LeasedBlock
from kvstore.client.effects import Call, Calls, Flow, Work
from kvstore.errors import DeviceUnavailable, ForeignHandle, LeaseExpired, ProtocolError, UnknownMethod
from kvstore.types import Miss, TierCode
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.client.core import Core

log = logging.getLogger("kvstore.client")


Leased = tuple[int, float, int, list[LeasedBlock | Miss]]
"""What `Core.lease` answers: id, local expiry, epoch, blocks."""


class Importer(Protocol):
    """How this process opens GPU memory of another one; `kvstore_gpu.shared.Imports` is for CUDA.

    Attributes
    ----------
    gpu : bytes
        UUID of the device.
    """

    gpu: bytes

    def open(self, handle: bytes, nbytes: int) -> Any:
        """The memory behind a handle as an array of so many bytes; raises `DeviceUnavailable`."""
        ...


class DeviceMap:
    """Slabs of GPU memory of one connection, opened when first needed; each is closed when the last view of it goes.

    Parameters
    ----------
    importer : Importer

    Attributes
    ----------
    off : str
        Why the daemon is not asked any more; empty while it is.
    """

    def __init__(self, importer: Importer) -> None:
        self._importer = importer
        self._slabs: dict[int, Any] = {}
        self.off = ""

    def reach(self, lease: int, blocks: Sequence[Any]) -> Flow[None]:
        """Note in leased blocks where else they can be read.

        Parameters
        ----------
        lease : int
        blocks : sequence
            What the lease answered: those that are a `LeasedBlock` in shared memory are asked about.
        """
        if self.off or not any(isinstance(block, LeasedBlock) and block.parts for block in blocks):
            return
        try:
            reply: m.ReachReply = yield Call("reach", m.Reach(lease, self._importer.gpu))
            if reply.gpu != self._importer.gpu:
                self.off = "the daemon has no memory of this GPU"
                return
            yield from self._open({place.slab for place in reply.places})
            self._note(reply.places, blocks)
        except (UnknownMethod, DeviceUnavailable) as error:
            self.off = error.cause
            log.warning("blocks are read from host memory: %s", error)
        except (ForeignHandle, LeaseExpired):
            return  # the lease has ended, as will be found after the copy; or the tier has just been switched off

    def _open(self, slabs: set[int]) -> Flow[None]:
        missing = sorted(slabs - self._slabs.keys())
        if missing:
            replies: list[m.OpenSlabReply] = yield Calls([Call("open_slab", m.OpenSlab(slab)) for slab in missing])
            # Opening takes its time, so nothing is asked of the daemon after it.
            for slab, reply in zip(missing, replies, strict=True):
                self._slabs[slab] = yield Work(lambda r=reply: self._importer.open(r.handle, r.nbytes), 0)

    def _note(self, places: Sequence[m.Place], blocks: Sequence[Any]) -> None:
        for place in places:
            block = blocks[place.index] if 0 <= place.index < len(blocks) else None
            if not isinstance(block, LeasedBlock) or place.offset < 0:
                raise ProtocolError(f"reach: block {place.index} at {place.offset} is none of this lease.")
            part = self._slabs[place.slab][place.offset : place.offset + block.nbytes]
            if len(part) != block.nbytes:
                raise ProtocolError(f"reach: block {place.index} lies outside slab {place.slab}.")
            block.device, block.tier = part, TierCode.GPU


def reaching(core: Core, lease: Flow[Leased]) -> Flow[Leased]:
    """A lease, and where its blocks lie on this process's GPU, if it can reach the daemon's memory there."""
    leased = yield from lease
    link = core.link
    if core.device is not None and link is not None and link.slabs is not None:
        link.device = link.device or DeviceMap(core.device)
        try:
            yield from link.device.reach(leased[0], leased[3])
        except BaseException:  # nobody will ever know of this lease
            core.release(leased[0], leased[2])
            raise
    return leased
