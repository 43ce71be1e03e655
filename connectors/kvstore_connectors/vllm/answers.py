"""Where requests' blocks are, as the daemon says: asked early, awaited for a moment, asked again when that is old."""

from __future__ import annotations

import time

from kvstore.types import Namespace, TierCode
from kvstore_connectors.base import Tally
from kvstore_connectors.vllm.identity import request_namespace
from kvstore_connectors.vllm.lookups import Lookups, Query
from kvstore_connectors.vllm.tracked import Tracked

FIRST_WAIT_S = 0.0003
"""Most lookups are answered within this time, so that a request need not wait for another scheduling round."""

ANSWER_LIFE_S = 10.0
"""An answer older than this is asked for again: a request may wait long for its turn."""


class Answers:
    """What the daemon has of requests' blocks.

    Parameters
    ----------
    lookups : Lookups
    tally : Tally
    engine_block, block_tokens : int
        As of `SchedulerSide`.
    may_load : bool
        If not, nothing is asked.

    Attributes
    ----------
    ranks : list of Namespace
        The workers'; before they are known nothing is asked.
    """

    def __init__(self, lookups: Lookups, tally: Tally, engine_block: int, block_tokens: int, may_load: bool) -> None:
        self._lookups, self._tally = lookups, tally
        self._block_tokens, self._ratio = block_tokens, block_tokens // engine_block
        self._may_load = may_load
        self.ranks: list[Namespace] = []

    def wanted(self, tracked: Tracked) -> bool:
        """Whether anything could be loaded for a request."""
        request = tracked.request
        return (
            self._may_load
            and bool(self.ranks)
            and not tracked.given_up
            and not getattr(request, "skip_reading_prefix_cache", False)
            and len(request.block_hashes) >= self._ratio
        )

    def ask(self, tracked: Tracked) -> Query:
        """Look a request's full blocks up."""
        hashes = tracked.request.block_hashes
        mine = [bytes(hashes[i]) for i in range(self._ratio - 1, len(hashes), self._ratio)]
        namespaces = [request_namespace(rank, tracked.scope) for rank in self.ranks]
        tracked.query = self._lookups.submit(namespaces, mine)
        self._tally.add("lookups")
        self._tally.add("asked_tokens", len(mine) * self._block_tokens)
        return tracked.query

    def of(self, tracked: Tracked) -> list[TierCode] | None:
        """Tiers of a request's blocks; empty for a miss, None while unknown."""
        query, now = tracked.query, time.monotonic()
        if query is None or self._outdated(query, tracked, now):
            query = self.ask(tracked)
            self._lookups.wait(query, FIRST_WAIT_S)
        if not query.finished:
            if now < query.deadline:
                return None
            if not query.late:
                query.late = True
                self._tally.add("lookup_late")
            return []
        return query.tiers or []

    def _outdated(self, query: Query, tracked: Tracked, now: float) -> bool:
        """Whether the request has more blocks by now, or the answer is old."""
        grown = len(query.hashes) < len(tracked.request.block_hashes) // self._ratio
        return grown or (query.finished and now - query.asked > ANSWER_LIFE_S)
