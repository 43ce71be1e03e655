"""What engines on the daemon's GPU ask, and what is copied there for them.

An engine that leased blocks asks where they lie on its GPU. Those that have a copy are lent there, too; the others are
noted, and copied once they were wanted often enough: by one thread on a stream of its own, one block at a time, so that
copies never take more of PCIe than one of them can, and the event loop none of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from kvstore import gpu_memory
from kvstore.admission import Doorkeeper
from kvstore.errors import ConfigError, DeviceUnavailable
from kvstore.eviction import make_policy
from kvstore.gpu_memory import DeviceMemory, DevicePool, DeviceSlab
from kvstore.leases import Lease
from kvstore.tiers.gpu import GpuBlock, GpuTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock
from kvstore.types import BlockId, DropReason

if TYPE_CHECKING:
    from kvstore.settings import Gpu

log = logging.getLogger("kvstore.gpu")

WAITING_SHARE = 4
"""Blocks that wait to be copied are at most one part in so many of the tier."""


class GpuDesk:
    """A GPU tier at work.

    Parameters
    ----------
    tier : GpuTier
    memory : DeviceMemory
    host : HostTier
        Where blocks are copied from.
    twice : bool
        Copy a block when it is wanted the second time, not the first.

    Attributes
    ----------
    name : str
        The device, in words.
    off : str
        Why nothing is lent or copied any more; empty while all is well.
    refused : int
        Times that a block was not copied because so many waited.
    """

    def __init__(self, tier: GpuTier, memory: DeviceMemory, host: HostTier, *, twice: bool = True) -> None:
        self.tier = tier
        self.name = memory.name
        self.off = ""
        self.refused = 0
        self._failed_at = 0.0
        self._memory = memory
        self._host = host
        self._doorkeeper = Doorkeeper() if twice else None
        self._lent: dict[int, dict[int, GpuBlock]] = {}
        """Copies by lease and by index in it: however often a lease is asked about, each is lent once."""
        self._waiting: dict[BlockId, int] = {}
        self._waiting_bytes = 0
        self._most_bytes = tier.pool.capacity // WAITING_SHARE
        self._thread = ThreadPoolExecutor(1, "kvstore-gpu")
        self._task: asyncio.Task[None] | None = None

    @property
    def gpu(self) -> bytes:
        """UUID of the device; empty if it is of no use any more."""
        return b"" if self.off else self._memory.gpu

    # -- asked by engines ----------------------------------------------------------------------------------------------

    def reach(self, lease: Lease) -> dict[int, GpuBlock]:
        """Lend what a lease has on the GPU, until it ends; what it has not there is wanted there."""
        if self.off:
            return {}
        held = self._lent.get(lease.id)
        if held is None:
            held = self._lent[lease.id] = {}
            lease.ends.append(lambda: self.tier.give_back(self._lent.pop(lease.id).values()))
        asked = {index: block for index, block in lease.blocks.items() if index not in held}
        held |= self.tier.lend(asked)
        self._want({index: block for index, block in asked.items() if index not in held})
        return held

    def slab(self, slab_id: int, domain: str) -> DeviceSlab | None:
        """A slab that somebody of this trust domain may open."""
        return None if self.off else self.tier.slab(slab_id, domain)

    # -- copying -------------------------------------------------------------------------------------------------------

    def _want(self, blocks: Mapping[int, HostBlock]) -> None:
        for _, block in sorted(blocks.items()):  # heads before tails
            if block.gone or block.id in self._waiting or self.tier.get(block.id) is not None:
                continue
            if block.nbytes > self.tier.pool.slab_bytes:
                self.tier.counters.drop(DropReason.TOO_LARGE)
            elif self._waiting_bytes + block.nbytes > self._most_bytes:
                self.refused += 1
            elif self._doorkeeper is None or not self._doorkeeper.first_time(block.id):
                self._waiting[block.id] = block.nbytes
                self._waiting_bytes += block.nbytes
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._copy_all())

    async def _copy_all(self) -> None:
        try:
            while self._waiting and not self.off:
                block = next(iter(self._waiting))
                try:
                    await self._copy(block)
                finally:
                    self._waiting_bytes -= self._waiting.pop(block, 0)
        except DeviceUnavailable as error:
            self.fail(error)
        except Exception:
            log.exception("copying to the GPU failed")
        finally:
            self._task = None

    async def _copy(self, block_id: BlockId) -> None:
        block = self._host.get(block_id)
        if block is None:
            return
        extent = self.tier.allocate(block_id.scope.domain, block.nbytes)
        if extent is None:
            self.tier.counters.drop(DropReason.TIER_FULL)
            return
        slab = self.tier.pool.slab(extent.slab)
        address = (slab.address if slab is not None else 0) + extent.offset
        kept = False
        self._host.acquire([block])
        try:
            views = self._host.arena.views(block.extents)
            await asyncio.get_running_loop().run_in_executor(self._thread, self._memory.copy, views, address)
            if not block.gone and not self.off:
                self.tier.insert(block, extent)
                kept = True
        finally:
            # Cancelled, the thread may be at it yet: the next copy into this room runs in the same thread, after it.
            self._host.unacquire([block])
            if not kept:
                self.tier.free(extent)

    # -- state ---------------------------------------------------------------------------------------------------------

    def fail(self, error: DeviceUnavailable) -> None:
        """Do without the GPU from now on: whatever is there is in host memory, too."""
        self.off = error.cause
        self._failed_at = time.monotonic()
        self._waiting.clear()
        self._waiting_bytes = 0
        self.tier.clear()
        log.error("the GPU tier is off: %s Blocks are served from host memory.", error.cause)

    def state(self) -> dict[str, Any]:
        """What an operator should know, beside counters and usage."""
        kept_out = {} if self._doorkeeper is None else {"kept_out": self._doorkeeper.kept_out}
        closed = {"breaker": {"state": "closed", "failures": 0}}
        return {
            "device": self.name,
            "waiting_blocks": len(self._waiting),
            "waiting_bytes": self._waiting_bytes,
            "refused": self.refused,
            **self.tier.breakdown(),
            **kept_out,
            **(_resting(self.off, time.monotonic() - self._failed_at) if self.off else closed),
        }

    async def close(self) -> None:
        """Stop copying. The memory goes with the process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)


def open_tier(settings: Gpu, host: HostTier) -> GpuDesk:
    """Take the memory that the settings ask for; blocks for as long as that takes.

    Raises
    ------
    DeviceUnavailable
        If there is no such device, nothing that drives it, or not so much memory.
    ConfigError
        If it is less than one slab.
    """
    slab_bytes = gpu_memory.slab_size(settings.bytes)
    if settings.bytes < slab_bytes:
        raise ConfigError(f"gpu.bytes: {settings.bytes} is less than one slab of {slab_bytes} bytes.")
    memory = gpu_memory.open_memory(settings.device)
    pool = DevicePool(memory.take(settings.bytes // slab_bytes, slab_bytes), slab_bytes)
    return GpuDesk(GpuTier(pool, make_policy(settings.policy)), memory, host, twice=settings.admission == "second")


def off_state(reason: str) -> dict[str, Any]:
    """What is shown of a tier that was asked for and could not be had."""
    return {"capacity": 0, "used": 0, "blocks": 0, **_resting(reason, None)}


def _resting(reason: str, since_s: float | None) -> dict[str, Any]:
    """As a tier below host memory says that it is cut off."""
    return {"breaker": {"state": "open", "failures": 1, "reason": reason, "since_s": since_s}}
