"""What the scheduler's side tells the workers' side with every step. Plain data: it crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.types import Namespace
from kvstore_connectors.vllm.blend_jobs import BlendJob, CaptureJob
from kvstore_connectors.vllm.identity import Scope


class SaveBlock(NamedTuple):
    """A block that becomes full in this step.

    Attributes
    ----------
    hash, parent : bytes
        vLLM's hash of its last engine block, and of the last engine block before it (empty for the first block).
    position : int
        Position of its first token.
    tokens : bytes
        Its token ids, int32 little-endian.
    engine_ids : list of int
        The engine blocks that hold it.
    """

    hash: bytes
    parent: bytes
    position: int
    tokens: bytes
    engine_ids: list[int]


@dataclass
class SaveJob:
    """Blocks of one request to be stored after this step's forward pass."""

    request: str
    scope: Scope
    blocks: list[SaveBlock]


@dataclass
class LoadJob:
    """KV that the engine was promised.

    Attributes
    ----------
    hashes : list of bytes
        vLLM's hash for each kvstore block to read from. Empty if the promise can not be kept: all of it is recomputed.
    skip : int
        Engine blocks at the start of the first block that are not wanted: the engine has them.
    engine_ids : list of int
        Engine blocks to fill, in order.
    tokens : int
        Tokens that were promised.
    position : int
        Position of the first token of the first block.
    deadline_s : float
        After this time from `begun` on what has not come is given up; 0 for the usual time.
    saves_s : tuple of float
        Of each block, what computing it and those behind it takes; see `Choice`.
    ranks : int
        Ranks that load at the same time, each blocks of its own.
    begun : float
        Monotonic time at which a worker got it.
    """

    request: str
    scope: Scope
    hashes: list[bytes]
    skip: int
    engine_ids: list[int]
    tokens: int
    is_async: bool
    position: int = 0
    deadline_s: float = 0.0
    saves_s: tuple[float, ...] = ()
    ranks: int = 1
    begun: float = 0.0


@dataclass
class ConnectorMeta(KVConnectorMetadata):
    """One step's work.

    Attributes
    ----------
    step : int
        Number of the step.
    idle : bool
        The step computes nothing, so a worker may wait a moment.
    timed : bool
        The scheduler wants to know when its output is back.
    fresh : list of int or None
        Engine blocks that the step, or a load beside it, is going to write for the first time; None: any.
    """

    step: int = 0
    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    blends: list[BlendJob] = field(default_factory=list)
    captures: list[CaptureJob] = field(default_factory=list)
    idle: bool = False
    timed: bool = False
    fresh: list[int] | None = None


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What the scheduler has to know of steps that have ended.

    Attributes
    ----------
    steps : dict
        Steps whose synchronous loads a worker has been through, well or not; summed over the ranks.
    timed : dict
        Steps that are timed, with the seconds that the connector took of them; the most of all ranks.
    blended : dict
        Timed steps that blended, with the seconds from then until the device was through; the most of all ranks.
    """

    steps: dict[int, int] = field(default_factory=dict)
    timed: dict[int, float] = field(default_factory=dict)
    blended: dict[int, float] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Add another rank's report."""
        if isinstance(other, Report):
            for step, ranks in other.steps.items():
                self.steps[step] = self.steps.get(step, 0) + ranks
            for mine, theirs in ((self.timed, other.timed), (self.blended, other.blended)):
                for step, seconds in theirs.items():
                    mine[step] = max(mine.get(step, 0.0), seconds)
        return self


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A rank's namespace, which the scheduler needs to look blocks up for it, and the bytes of a block there."""

    namespace: Namespace
    block_bytes: int
