"""The memory the host tier lends out: memfd slabs cut into pages, handed out as extents.

A slab is one anonymous memory file, sealed against shrinking and growing so that no reader can be killed by a truncated
mapping, and sealed against further seals so that a client cannot add one. It belongs to one trust domain for its whole
life: its file descriptor is the capability, and whoever holds it can read and write everything in it. Slab ids are
never reused in one life of the daemon, so an extent of a slab that is gone can be refused, not misread.

Slabs are made ahead of need and their pages touched in a background thread: the first touch of a page costs about nine
times a warm copy. Free memory is kept as runs of pages, in bins by the power of two of their length, so finding room
does not depend on how many blocks there are. A block that fits no single run is given several: an allocation fails
only if there are fewer free pages than it needs.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvstore.errors import ConfigError, InternalError
from kvstore.memory import populate
from kvstore.types import Extent

PAGE_BYTES = 16 * 1024
"""Unit of allocation. A multiple of 4096, so extents are aligned for direct I/O."""

_MFD_HUGETLB = 0x0004
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 0x1, 0x2, 0x4


class Region:
    """Memory of one trust domain, cut into pages. Its id is never reused in one life of the daemon."""

    def __init__(self, region_id: int, domain: str, nbytes: int) -> None:
        self.id = region_id
        self.domain = domain
        self.nbytes = nbytes
        self.pages = nbytes // PAGE_BYTES

    def close(self) -> None:
        """Let go of the memory."""


class Slab(Region):
    """One sealed memory file of one trust domain.

    Attributes
    ----------
    id : int
        Never reused in one life of the daemon.
    domain : str
        The trust domain whose clients may hold `fd`.
    fd : int
        The memory file.
    view : memoryview
        All bytes, mapped into the daemon.
    """

    def __init__(self, slab_id: int, domain: str, nbytes: int, huge: bool) -> None:
        super().__init__(slab_id, domain, nbytes)
        self.huge = huge
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (_MFD_HUGETLB if huge else 0)
        self.fd = os.memfd_create(f"kvstore-slab-{slab_id}", flags)
        try:
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, nbytes)
        except BaseException:
            os.close(self.fd)
            raise
        for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
            try:
                self._map.madvise(getattr(mmap, advice))
            except (OSError, AttributeError):  # a hint: the kernel may be built without it
                continue
        self.view = memoryview(self._map)

    def populate(self) -> None:
        """Touch all pages, so that nobody waits for them later."""
        populate(self._map)

    def close(self) -> None:
        """Let go of the daemon's mapping and descriptor. The memory returns when the last client has let go too."""
        if self.fd < 0:
            return
        try:
            self.view.release()
            self._map.close()
        except BufferError:  # an I/O thread still holds a part of it; the mapping goes with that reference
            pass
        os.close(self.fd)
        self.fd = -1


R = TypeVar("R", bound=Region)


@dataclass(slots=True)
class _Domain:
    """Slabs and free runs of one trust domain. Runs are (slab id, first page) -> length in pages."""

    slabs: dict[int, Region] = field(default_factory=dict)
    runs: dict[tuple[int, int], int] = field(default_factory=dict)
    ends: dict[tuple[int, int], int] = field(default_factory=dict)
    bins: list[dict[tuple[int, int], None]] = field(default_factory=lambda: [{} for _ in range(40)])
    free: int = 0

    def add_run(self, slab: int, start: int, length: int) -> None:
        self.runs[slab, start] = length
        self.ends[slab, start + length] = start
        self.bins[length.bit_length() - 1][slab, start] = None

    def take_run(self, slab: int, start: int) -> int:
        length = self.runs.pop((slab, start))
        del self.ends[slab, start + length]
        del self.bins[length.bit_length() - 1][slab, start]
        return length

    def find(self, pages: int) -> tuple[int, int] | None:
        """A run of at least `pages`: from a bin where every run fits, else by looking through the bin below it."""
        exact = pages.bit_length() - 1
        first = exact if pages == 1 << exact else exact + 1
        for size in range(first, len(self.bins)):
            if self.bins[size]:
                return next(iter(self.bins[size]))
        for run in self.bins[exact]:
            if self.runs[run] >= pages:
                return run
        return None

    def largest(self) -> tuple[int, int]:
        for size in range(len(self.bins) - 1, -1, -1):
            if self.bins[size]:
                return max(self.bins[size], key=self.runs.__getitem__)
        raise InternalError("arena: no free run although pages are counted as free.")


class Pool(ABC, Generic[R]):
    """Slabs cut into pages and lent as extents; where the slabs come from, a subclass says.

    Parameters
    ----------
    capacity : int
        Byte budget, a bound on all slabs together, dropped ones that clients still hold included.
    slab_bytes : int
        Size of a slab, rounded down to pages; also the most that one allocation may span without being split.
    ahead_bytes : int
        How much free memory should be kept touched and ready; `on_low` is called when there is less.
    """

    def __init__(self, capacity: int, slab_bytes: int = 64 << 20, ahead_bytes: int = 256 << 20) -> None:
        slab_bytes = min(slab_bytes, capacity) // PAGE_BYTES * PAGE_BYTES
        if slab_bytes <= 0:
            raise ConfigError(f"host.bytes: {capacity} is less than one page of {PAGE_BYTES} bytes.")
        self.slab_bytes = slab_bytes
        self.capacity = capacity // slab_bytes * slab_bytes
        self.page_bytes = PAGE_BYTES
        self._ahead = min(ahead_bytes, self.capacity)
        self._domains: dict[str, _Domain] = {}
        self._slabs: dict[int, R] = {}
        self._holders: dict[int, set[int]] = {}
        self._dropping: dict[int, R] = {}
        self._next_id = 1
        self._closed = False
        self.on_low: Callable[[str], None] = lambda domain: None

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Bytes of all slabs that exist, dropped ones that clients still hold included."""
        return (len(self._slabs) + len(self._dropping)) * self.slab_bytes

    @property
    def dropping(self) -> int:
        """Bytes of slabs that are given up but still held by clients."""
        return len(self._dropping) * self.slab_bytes

    def free(self, domain: str) -> int:
        """Bytes that an allocation in this domain could get without evicting, growth of the arena included."""
        have = self._domains[domain].free * PAGE_BYTES if domain in self._domains else 0
        return have + self.capacity - self.total

    def used(self) -> int:
        """Bytes lent out."""
        free = sum(d.free for d in self._domains.values()) * PAGE_BYTES
        return len(self._slabs) * self.slab_bytes - free

    def slab(self, slab_id: int) -> R | None:
        """The slab of that id if it exists and is not being dropped."""
        return self._slabs.get(slab_id)

    def slabs_of(self, domain: str) -> list[int]:
        """Ids of the slabs of a trust domain, the oldest first."""
        return [slab.id for slab in self._slabs.values() if slab.domain == domain]

    # -- lending -------------------------------------------------------------------------------------------------------

    def allocate(self, domain: str, nbytes: int, *, split: bool = True) -> tuple[Extent, ...] | None:
        """Extents of together exactly `nbytes`, each starting on a page, or None if there is no room.

        All extents but the last are whole pages; there is one only if it may not `split`. Nothing is evicted here; the
        caller evicts and asks again.
        """
        pages = -(-nbytes // PAGE_BYTES)
        if pages == 0:
            return ()
        state = self._domains.get(domain)
        if state is None:
            state = self._domains[domain] = _Domain()
        if self.wants_ahead(domain):
            self.on_low(domain)
        run = state.find(pages)
        # A block larger than a slab is split in any case: for it only the sum counts.
        while run is None and (state.free < pages or pages * PAGE_BYTES <= self.slab_bytes) and self._grow(domain):
            run = state.find(pages)
        if run is not None:
            return (self._carve(state, run, pages, nbytes),)
        if not split or state.free < pages:
            return None
        extents: list[Extent] = []
        while pages:
            run = state.find(pages) or state.largest()
            take = min(pages, state.runs[run])
            extents.append(self._carve(state, run, take, min(nbytes, take * PAGE_BYTES)))
            pages -= take
            nbytes -= extents[-1].nbytes
        return tuple(extents)

    def _carve(self, state: _Domain, run: tuple[int, int], pages: int, nbytes: int) -> Extent:
        slab, start = run
        length = state.take_run(slab, start)
        if length > pages:
            state.add_run(slab, start + pages, length - pages)
        state.free -= pages
        return Extent(slab, start * PAGE_BYTES, nbytes)

    def release(self, extents: Iterable[Extent]) -> None:
        """Take extents back and join them with their free neighbours."""
        for slab_id, offset, nbytes in extents:
            slab = self._slabs[slab_id]
            state = self._domains[slab.domain]
            start, pages = offset // PAGE_BYTES, -(-nbytes // PAGE_BYTES)
            state.free += pages
            before = state.ends.get((slab_id, start))
            if before is not None:
                pages += state.take_run(slab_id, before)
                start = before
            if (slab_id, start + pages) in state.runs:
                pages += state.take_run(slab_id, start + pages)
            state.add_run(slab_id, start, pages)

    # -- slabs ---------------------------------------------------------------------------------------------------------

    def _grow(self, domain: str) -> bool:
        """Add a slab to a domain if the budget allows one, else one whose whole memory another domain does not use."""
        if self._closed:
            return False
        if self.total + self.slab_bytes > self.capacity:
            self._reclaim(domain)
            if self.total + self.slab_bytes > self.capacity:
                return False
        self._add(self._make_slab(domain))
        return True

    def _add(self, slab: R) -> None:
        state = self._domains.setdefault(slab.domain, _Domain())
        self._slabs[slab.id] = state.slabs[slab.id] = slab
        self._holders[slab.id] = set()
        state.free += slab.pages
        state.add_run(slab.id, 0, slab.pages)

    @abstractmethod
    def _make_slab(self, domain: str) -> R:
        """A slab that was not there before."""

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def wants_ahead(self, domain: str) -> bool:
        """Whether another slab should be made ready for this domain."""
        state = self._domains.get(domain)
        free = state.free * PAGE_BYTES if state else 0
        return not self._closed and free < self._ahead and self.total + self.slab_bytes <= self.capacity

    def make_ahead(self, domain: str) -> R:
        """A new slab, usable at once, that the caller should populate in a thread before somebody needs it."""
        slab = self._make_slab(domain)
        self._add(slab)
        return slab

    def movable(self, domain: str) -> set[int]:
        """Slabs of other domains that no client holds: wholly free, they can be given up for this domain."""
        return {slab.id for slab in self._slabs.values() if slab.domain != domain and not self._holders[slab.id]}

    def _reclaim(self, domain: str) -> None:
        """Give up one wholly free slab of another domain. One that a client holds would return nothing by that."""
        for slab_id in self.movable(domain):
            slab = self._slabs[slab_id]
            state = self._domains[slab.domain]
            if state.runs.get((slab_id, 0)) == slab.pages:
                self._drop_slab(state, slab)
                return

    def _drop_slab(self, state: _Domain, slab: R) -> None:
        state.take_run(slab.id, 0)
        state.free -= slab.pages
        del state.slabs[slab.id], self._slabs[slab.id]
        slab.close()
        if self._holders[slab.id]:
            self._dropping[slab.id] = slab
        else:
            del self._holders[slab.id]

    def hold(self, slab_id: int, session: int) -> None:
        """Note that a client was handed the descriptor of a slab."""
        self._holders[slab_id].add(session)

    def unhold(self, session: int) -> None:
        """Note that a client is gone, and with it its mappings."""
        for slab_id, holders in list(self._holders.items()):
            holders.discard(session)
            if not holders and slab_id in self._dropping:
                del self._dropping[slab_id], self._holders[slab_id]

    # -- invariants ----------------------------------------------------------------------------------------------------

    def check(self, lent: Iterable[Extent]) -> None:
        """Account for every byte: what is lent and what is free cover each slab exactly, with no overlap.

        Raises
        ------
        InternalError
            If a byte is lent twice, lost, or lent in a slab that does not exist.
        """
        cover: dict[int, list[tuple[int, int]]] = {slab: [] for slab in self._slabs}
        for slab, offset, nbytes in lent:
            if slab not in cover:
                raise InternalError(f"arena: an extent lies in slab {slab}, which does not exist.")
            cover[slab].append((offset // PAGE_BYTES, -(-nbytes // PAGE_BYTES)))
        for state in self._domains.values():
            for (slab, start), length in state.runs.items():
                cover[slab].append((start, length))
            if sum(state.runs.values()) != state.free:
                raise InternalError("arena: free runs do not sum to the free count.")
        for slab, parts in cover.items():
            position = 0
            for start, length in sorted(parts):
                if start != position:
                    kind = "lent twice" if start < position else "lost"
                    raise InternalError(f"arena: slab {slab} has pages {kind} at page {min(start, position)}.")
                position += length
            if position != self._slabs[slab].pages:
                raise InternalError(f"arena: slab {slab} has pages lost at page {position}.")
        if self.total > self.capacity:
            raise InternalError(f"arena: {self.total} bytes of slabs exceed the budget of {self.capacity}.")

    def close(self) -> None:
        """Let go of all slabs."""
        self._closed = True
        for slab in self._slabs.values():
            slab.close()
        self._slabs.clear()
        self._domains.clear()


class Arena(Pool[Slab]):
    """All slabs of the host tier, `huge` if the machine has set huge pages aside. Parameters are those of `Pool`."""

    def __init__(self, capacity: int, slab_bytes: int = 64 << 20, ahead_bytes: int = 256 << 20) -> None:
        super().__init__(capacity, slab_bytes, ahead_bytes)
        self.huge = _huge_pages_free() >= self.slab_bytes

    def views(self, extents: Iterable[Extent]) -> list[memoryview]:
        """The bytes of some extents, mapped into this process."""
        return [self._slabs[e.slab].view[e.offset : e.offset + e.nbytes] for e in extents]

    def _make_slab(self, domain: str) -> Slab:
        slab_id = self._new_id()
        if self.huge:
            try:
                return Slab(slab_id, domain, self.slab_bytes, huge=True)
            except OSError:  # others took the reserved huge pages meanwhile
                self.huge = False
        return Slab(slab_id, domain, self.slab_bytes, huge=False)


def _huge_pages_free() -> int:
    """Bytes of huge pages that nobody has taken."""
    try:
        with open("/proc/meminfo") as info:
            fields = {line.split(":")[0]: int(line.split()[1]) for line in info}
    except OSError:
        return 0
    return fields.get("HugePages_Free", 0) * fields.get("Hugepagesize", 0) * 1024
