"""What tests of the tiers as one store share: a small host tier over lower tiers that are dicts, and gates that hold
their calls back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from kvstore.chain import TierChain
from kvstore.eviction import make_policy
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.tiers.host import HostTier
from kvstore.tiers.host_block import HostBlock, encode_header
from kvstore.types import (
    BlockHeader,
    BlockId,
    Exists,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Scope,
    Stored,
    StoreOutcome,
    TierCode,
)

SCOPE = Scope("uid-1", b"n" * 32)
NBYTES = 40_000


class FakeTier(Tier):
    """A lower tier in a dict. Each `get`, `put` and `drop` first asks its gate, which may wait or raise."""

    name = "fake"
    code = TierCode.DISK

    def __init__(self, gate: Callable[[str, BlockId], Any] | None = None) -> None:
        self.counters = TierCounters()
        self.blocks: dict[BlockId, tuple[BlockHeader, bytes]] = {}
        self.calls: Counter[str] = Counter()
        self.answer: dict[str, Any] = {}
        self.touched: list[BlockId] = []
        self.pins: dict[BlockId, float] = {}
        self._gate = gate

    async def _pass(self, verb: str, block: BlockId) -> None:
        self.calls[verb] += 1
        if self._gate is not None:
            waits = self._gate(verb, block)
            if waits is not None:
                await waits

    def size(self, block: BlockId) -> int | None:
        return len(self.blocks[block][1]) if block in self.blocks else None

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        header, content = self.blocks.get(block, (BlockHeader(), b""))
        await self._pass("get", block)
        if "get" in self.answer:
            return self.answer["get"]
        if not content:
            return Miss(MissReason.ABSENT)
        for view in into:
            view[:], content = content[: len(view)], content[len(view) :]
        return Hit(header, sum(len(view) for view in into))

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        self.calls["durable"] += durable
        content = b"".join(payload)
        await self._pass("put", block)
        if "put" in self.answer:
            return self.answer["put"]
        if block in self.blocks:
            return Exists()
        self.blocks[block] = (header, content)
        return Stored()

    async def drop(self, block: BlockId) -> bool:
        await self._pass("drop", block)
        return self.blocks.pop(block, None) is not None

    async def clear(self, scope: Scope) -> int:
        return sum([await self.drop(block) for block in list(self.blocks) if block.scope == scope])

    def touch(self, blocks: Iterable[BlockId]) -> None:
        self.touched += blocks

    def pin(self, block: BlockId, until: float) -> bool:
        self.pins[block] = until
        return block in self.blocks

    def usage(self) -> Usage:
        return Usage(1 << 30, sum(len(content) for _, content in self.blocks.values()), len(self.blocks))

    async def check(self, fix: bool = False) -> list[Finding]:
        return []

    async def close(self) -> None:
        return None


class Gate:
    """Holds calls of some verbs back until it is opened."""

    def __init__(self, *verbs: str) -> None:
        self.verbs = verbs
        self.open = asyncio.Event()
        self.waiting = asyncio.Event()

    def __call__(self, verb: str, block: BlockId) -> Any:
        if verb not in self.verbs:
            return None
        self.waiting.set()
        return self.open.wait()


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def payload(of: bytes, nbytes: int = NBYTES) -> bytes:
    return hashlib.shake_128(of).digest(nbytes)


def block_id(number: int) -> BlockId:
    return BlockId(SCOPE, key(number))


class House:
    """A small host tier over some lower tiers."""

    def __init__(
        self, *below: Tier, nbytes: int = 1 << 20, parallel: int = 4, twice: Collection[TierCode] = ()
    ) -> None:
        self.host = HostTier(nbytes, make_policy("lru"), 256 * 1024, 0)
        self.chain = TierChain(self.host, list(below), parallel, twice)

    def admit(self, number: int, durable: bool = False) -> list[asyncio.Future[StoreOutcome]] | None:
        """Store a block; None if there is no room."""
        header = BlockHeader(position=number)
        raw = encode_header(header)
        extents = self.host.allocate(SCOPE.domain, NBYTES, len(raw))
        if extents is None:
            return None
        content = payload(key(number))
        for view in self.host.arena.views(extents):
            view[:], content = content[: len(view)], content[len(view) :]
        return self.chain.admit(HostBlock(block_id(number), raw, header, NBYTES, extents), durable)

    def in_host(self, number: int) -> bool:
        found = self.host.get(block_id(number))
        return found is not None and self.bytes_of(found) == payload(key(number))

    def bytes_of(self, block: HostBlock) -> bytes:
        return b"".join(bytes(view) for view in self.host.arena.views(block.extents))

    def evict(self, number: int) -> None:
        found = self.host.get(block_id(number))
        assert found is not None
        assert not found.dirty
        self.host.remove(found)

    def promote(self, number: int) -> asyncio.Future[tuple[HostBlock | Miss, TierCode]]:
        arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.chain.promote(block_id(number), lambda found, code: arrived.set_result((found, code)))
        return arrived

    async def settle(self) -> None:
        assert await self.chain.drain(5) == 0


Houses = Callable[..., House]


def gated(houses: Houses, verb: str, *held: int, **how: Any) -> tuple[Gate, FakeTier, House]:
    """A house over a tier that holds these blocks, and holds calls of a verb back; the gate before it, and the tier."""
    gate = Gate(verb)
    below = FakeTier(gate)
    below.blocks.update({block_id(number): (BlockHeader(), payload(key(number))) for number in held})
    return gate, below, houses(below, **how)
