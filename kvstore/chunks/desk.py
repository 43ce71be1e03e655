"""The chunk index beside the tier chain: told of what comes and goes, rebuilt after a restart, asked by `match`."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.chunks.index import ChunkIndex
from kvstore.chunks.spans import between, check_spans
from kvstore.errors import InvalidParams
from kvstore.types import CHUNK_MARK, BlockId, Gone, Scope, TierCode
from kvstore.watcher import Watcher
from kvstore.wire import messages as m

if TYPE_CHECKING:
    from kvstore.chain import TierChain

log = logging.getLogger("kvstore.chunks")


class ChunkDesk:
    """Keeps the index in step with the tiers.

    Parameters
    ----------
    chain : TierChain
    capacity : int
        Bytes of the index.
    most_variants : int
        Of one chunk.
    """

    def __init__(self, chain: TierChain, capacity: int, most_variants: int) -> None:
        self._chain = chain
        self.index = ChunkIndex(capacity, self._where, most_variants, self._replaced)
        self.rebuilding = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- in step with the tiers ----------------------------------------------------------------------------------------

    def watcher(self, other: Watcher) -> Watcher:
        """One to be told of every block, who tells `other`, too."""
        return _ChunkWatcher(self, other)

    def came(self, block: BlockId) -> None:
        """A chunk's last block is in host memory."""
        found = self._chain.host.get(block)
        if found is not None:
            self.index.stored(block, found.header)

    def left(self, block: BlockId) -> None:
        """A chunk's last block left a tier."""
        if self._where(block.scope, [block.key]) is None:
            self.index.removed(block)

    def _where(self, scope: Scope, keys: list[bytes]) -> int | None:
        codes = self._chain.locate(scope, keys, prefix=False)
        return None if TierCode.ABSENT in codes else max(codes)

    def _replaced(self, scope: Scope, keys: list[bytes]) -> None:
        task = asyncio.get_running_loop().create_task(self._drop(scope, keys))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop(self, scope: Scope, keys: list[bytes]) -> None:
        try:
            await self._chain.drop(scope, keys)
        except Exception:
            log.warning("a chunk's replaced variant could not be dropped; it leaves by age", exc_info=True)

    async def rebuild(self) -> None:
        """Enter what lower tiers hold since before this start, by the headers of the blocks whose names say so."""
        self.rebuilding = True
        try:
            for tier in self._chain.below:
                for scope in list(tier.scopes()):
                    for key in [key for key in tier.held(scope) if key.endswith(CHUNK_MARK)]:
                        block = BlockId(scope, key)
                        header = None if self.index.info(block) is not None else await tier.header(block)
                        if header is not None and tier.contains(scope, key):
                            self.index.stored(block, header)
        except Exception:
            log.exception("not every chunk found on disk was entered; those that are not used again stay unknown")
        finally:
            self.rebuilding = False

    # -- asked ---------------------------------------------------------------------------------------------------------

    def match(self, scope: Scope, p: m.Match) -> m.MatchReply:
        """Chunks in a prompt, and which of the spans that it names, or that stand between separators, are none yet.

        Raises
        ------
        InvalidParams
        """
        if len(p.tokens) % 4 or len(p.separator) % 4:
            raise InvalidParams("match: token ids are int32, four bytes each.", "")
        count = len(p.tokens) // 4
        spans = [(start, stop) for start, stop in p.spans]
        check_spans(spans, count)
        if p.separator:
            ids, separator = (np.frombuffer(raw, dtype="<i4") for raw in (p.tokens, p.separator))
            spans = sorted([*spans, *_apart(between(ids, separator), spans)])
        found = self.index.match(scope, p.tokens, spans, find=p.find, labels=p.labels)
        known = {(one.start, one.stop) for one in found}
        return m.MatchReply([m.Found(*one) for one in found], [span for span in spans if span not in known])

    def state(self) -> dict[str, Any]:
        """For the snapshot."""
        index = self.index
        return {
            "chunks": index.contents,
            "variants": len(index),
            "bytes": index.used,
            "capacity": index.capacity,
            "rebuilding": self.rebuilding,
            **{name: index.counts[name] for name in ("stored", "removed", "replaced", "forgotten", "refused")},
        }


class _ChunkWatcher(Watcher):
    def __init__(self, desk: ChunkDesk, other: Watcher) -> None:
        self._desk = desk
        self._other = other

    def stored(self, tier: TierCode, block: BlockId, nbytes: int, parent: bytes) -> None:
        self._other.stored(tier, block, nbytes, parent)
        if tier == TierCode.HOST and block.key.endswith(CHUNK_MARK):
            self._desk.came(block)

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        self._other.removed(tier, block, reason)
        if block.key.endswith(CHUNK_MARK):
            self._desk.left(block)


def _apart(spans: list[tuple[int, int]], named: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that overlap none of the named."""
    return [(a, b) for a, b in spans if all(b <= start or stop <= a for start, stop in named)]
