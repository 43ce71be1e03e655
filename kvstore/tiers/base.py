"""The contract of a tier below host memory: keep blocks, hand them back whole or not at all.

A tier is one file and one row in the table of `kvstore.tiers`. Behaviour around a tier (metering, a circuit breaker) is
added by wrapping it (`kvstore.tiers.wrappers`), not by flags inside it. `kvstore.testing.tier_suite` judges every tier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvstore.eviction.partitions import Partitions
from kvstore.types import BlockHeader, BlockId, Dropped, Exists, LoadOutcome, Scope, Stored, TierCode
from kvstore.watcher import Watcher


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier holds, in bytes of its medium: headers, padding, index and temporary files included."""

    capacity: int
    used: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `check` found wrong, and whether it was mended."""

    what: str
    where: str
    fixed: bool = False


@dataclass(slots=True)
class TierCounters:
    """What happened in a tier since start. Plain integers, read by metrics and the status page."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    exists: int = 0
    evicted: int = 0
    corrupt: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0

    def drop(self, reason: str) -> None:
        """Count a block that was not stored."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Sized(Protocol):
    """What a tier's index has of a block, whatever else it has."""

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        ...


class Tier(ABC):
    """Where blocks are kept below host memory.

    Rules for implementations
    -------------------------
    - `size` and `locate` MUST NOT do I/O; they MAY say a block is there that `get` then misses.
    - `get` MUST verify identity, length and checksum of what it read, and MUST answer ``Miss(CORRUPT)`` on any doubt,
      after it has put the damaged copy aside so that it is not found again.
    - `put` MUST make the block visible at once or not at all, MUST NOT keep the caller's buffers after it returns,
      and MUST keep within the byte budget at every instant, evicting as needed.
    - `get` and `put` MUST survive cancellation at any await: nothing half-written stays visible, and no buffer of the
      caller is touched after the call has ended.
    - Expected outcomes are values. What is raised is a defect or `StorageError`.
    """

    name: str
    code: TierCode
    counters: TierCounters
    order: Partitions | None = None
    """How the tier is divided between those who share it, if it can be."""

    async def start(self) -> None:  # noqa: B027 - most have nothing to recover
        """Recover what is there. Raises `DirectoryUnusable` or `TierDown` where the tier cannot be used at all."""

    @abstractmethod
    def size(self, block: BlockId) -> int | None:
        """Payload bytes of the block if it is here, else None. No I/O."""

    def contains(self, scope: Scope, key: bytes) -> bool:
        """Whether the block is here. No I/O."""
        return self.size(BlockId(scope, key)) is not None

    def chain(self, block: BlockId) -> str:
        """By which chain of codecs a block is kept here; empty where it is as it came. No I/O."""
        return ""

    def outdone(self, scope: Scope, key: bytes, other: Tier) -> bool:
        """Whether another tier has a copy of the block that lost less than the one here, as far as is known. No I/O."""
        return False

    async def take_over(self, block: BlockId, other: Tier) -> bool:
        """Have another tier's better copy replace the one here, if no block has to leave for it; whether it did."""
        return False

    @abstractmethod
    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """Read the block's payload into `into`, whose lengths sum to `size(block)`.

        Each buffer starts page-aligned; those that are not the last are whole pages long, and the last may be written
        up to the next multiple of 4096 bytes.
        """

    async def peek(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        """As `get`, but the block is not used by it: neither its place in the order nor the counters change."""
        return await self.get(block, into)

    async def header(self, block: BlockId) -> BlockHeader | None:
        """The header of a block, without its payload; None if it is not here, damaged, or this tier can not tell."""
        return None

    @abstractmethod
    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> Stored | Exists | Dropped:
        """Store a block. `payload` is laid out as in `get`, and its lengths sum to `nbytes`.

        With `durable` the call returns only after the block would survive a loss of power.
        """

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> Stored | Exists | Dropped:
        """Put another payload in the place of a block that is here. By default it is absent meanwhile, and then new."""
        await self.drop(block)
        return await self.put(block, header, payload, nbytes)

    async def oldest(self, most: int) -> list[BlockId]:
        """Blocks that leave next, least valuable first, of a tier that others share and that has no `order` here."""
        return []

    @abstractmethod
    async def drop(self, block: BlockId) -> bool:
        """Forget a block; whether it was there."""

    async def expire(self) -> int:
        """Forget blocks that are too old by the rules of `order`; how many. Such blocks are not found even before."""
        return 0

    @abstractmethod
    async def clear(self, scope: Scope) -> int:
        """Forget every block of a scope; how many there were."""

    @abstractmethod
    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Note that these blocks were used in a tier above, so that they do not leave first. Unknown ones are fine."""

    @abstractmethod
    def pin(self, block: BlockId, until: float) -> bool:
        """Keep a block from eviction until the monotonic time `until` (0 ends a pin); whether it is here."""

    @abstractmethod
    def usage(self) -> Usage:
        """Bytes and blocks held."""

    def pace(self) -> float | None:
        """Seconds that the block under way takes by what has come of it, at least; None if that can not be told."""
        return None

    def scopes(self) -> dict[Scope, tuple[int, int]]:
        """(blocks, bytes) of each scope held here."""
        return {}

    def held(self, scope: Scope) -> Mapping[bytes, Sized]:
        """The blocks of one scope by key, if they are this daemon's alone; to be read, not changed."""
        return {}

    def watch(self, watcher: Watcher) -> None:  # noqa: B027 - a tier that others share has a log of its own
        """Have somebody told of every block of `held` that comes or goes."""

    async def describe(self, scope: Scope, text: bytes) -> None:  # noqa: B027 - a kindness, not a duty
        """Keep a short text beside the blocks of a scope, if this tier can."""

    def descriptions(self) -> dict[Scope, bytes]:
        """The texts kept by `describe`."""
        return {}

    def describe_state(self) -> dict[str, Any]:
        """What else an operator should know of this tier, as plain values."""
        return {}

    @abstractmethod
    async def check(self, fix: bool = False) -> list[Finding]:
        """Walk index and medium both ways and report, or with `fix` mend, every disagreement."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what was accepted and let go of the medium. May be called twice."""
