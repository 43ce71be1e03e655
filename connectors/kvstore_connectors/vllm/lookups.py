"""Lookups that the scheduler does not wait for.

vLLM's scheduler asks for the matched tokens of a waiting request again and again, on its own thread. So a request's
lookup is handed to a background thread when it arrives, and the scheduler only reads what has come back. All ranks are
asked in one round trip, and a block counts as present only if every rank has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from kvstore.keys import derived_key, namespace_digest
from kvstore.types import Namespace, TierCode
from kvstore_connectors.base import Link, Tally
from kvstore_connectors.choice import Speeds

_BATCH = 32
"""Prompts that travel in one round trip."""


class Query:
    """One prompt's lookup.

    Attributes
    ----------
    deadline : float
        Monotonic time after which nobody waits for it.
    tiers : list of TierCode or None
        The farthest tier of each block over all ranks, ABSENT if a rank lacks it; None while unknown.
    finished : bool
        Whether it was answered or given up.
    late : bool
        Whether its deadline was seen to pass.
    speeds : mapping
        What a load costs from the lower tiers among them, as the daemon says.
    """

    __slots__ = ("asked", "deadline", "finished", "hashes", "late", "namespaces", "speeds", "tiers")

    def __init__(self, namespaces: Sequence[Namespace], hashes: Sequence[bytes], deadline_s: float) -> None:
        self.namespaces = namespaces
        self.hashes = hashes
        self.asked = time.monotonic()
        self.deadline = self.asked + deadline_s
        self.tiers: list[TierCode] | None = None
        self.finished = False
        self.late = False
        self.speeds: Speeds = {}


class Lookups:
    """The background thread that asks.

    Parameters
    ----------
    link : Link
        This thread's client.
    tally : Tally
    deadline_s : float
    """

    def __init__(self, link: Link, tally: Tally, deadline_s: float) -> None:
        self._link = link
        self._tally = tally
        self._deadline_s = deadline_s
        self._queue: list[Query] = []
        self._wishes: list[tuple[Query, int]] = []
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="kvstore-lookup", daemon=True)
        self._thread.start()

    def submit(self, namespaces: Sequence[Namespace], hashes: Sequence[bytes]) -> Query:
        """Ask for a prompt's blocks, given vLLM's hash of each; returns at once."""
        query = Query(namespaces, hashes, self._deadline_s)
        with self._change:
            if self._stopped or not hashes or not namespaces:
                query.finished = True
            else:
                self._queue.append(query)
                self._change.notify_all()
        return query

    def bring_up(self, query: Query, index: int) -> None:
        """Have a prompt's block brought into the daemon's memory, when there is time; nobody waits for it."""
        with self._change:
            self._wishes.append((query, index))
            self._change.notify_all()

    def wait(self, query: Query, timeout_s: float) -> bool:
        """Wait a moment for an answer; whether it is there."""
        if not query.finished:
            with self._change:
                self._change.wait_for(lambda: query.finished, timeout_s)
        return query.finished

    def wait_any(self, queries: Sequence[Query], timeout_s: float) -> None:
        """Wait a moment until one of these is answered."""
        with self._change:
            self._change.wait_for(lambda: any(query.finished for query in queries), timeout_s)

    def close(self) -> None:
        """End the thread; open queries end unanswered."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join(timeout=1.0)

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._wishes or self._stopped)
                wishes, self._wishes = self._wishes, []
                batch, self._queue = self._queue[:_BATCH], self._queue[_BATCH:]
                if self._stopped:
                    batch += self._queue
                    self._queue = []
            answers = None
            if batch and not self._stopped:
                answers = self._link.run("lookup", partial(self._ask, batch=batch))
            with self._change:
                for place, query in enumerate(batch):
                    query.tiers = None if answers is None else answers[place]
                    query.finished = True
                self._change.notify_all()
                if self._stopped:
                    return
            for query, index in wishes:
                self._link.run("prefetch", partial(self._prefetch, query=query, index=index))

    @staticmethod
    def _prefetch(client: Any, query: Query, index: int) -> None:
        for namespace in dict.fromkeys(query.namespaces):
            key = derived_key(namespace_digest(namespace), query.hashes[index])
            client.prefetch([key], namespace=namespace)

    @staticmethod
    def _ask(client: Any, batch: Sequence[Query]) -> list[list[TierCode]]:
        questions: list[tuple[Namespace, list[bytes]]] = []
        for query in batch:
            # Ranks that hold replicas share a namespace: they are asked once.
            for namespace in dict.fromkeys(query.namespaces):
                digest = namespace_digest(namespace)
                questions.append((namespace, [derived_key(digest, engine_hash) for engine_hash in query.hashes]))
        # Not as a prefix: the first blocks may be gone here while the engine itself still has them.
        replies = iter(client.lookup_many(questions, prefix=False))
        speeds = client.speeds
        answers = []
        for query in batch:
            ranks = [next(replies) for _ in dict.fromkeys(query.namespaces)]
            query.speeds = speeds
            answers.append([worst(codes) for codes in zip(*ranks, strict=True)])
        return answers


def worst(codes: Sequence[TierCode]) -> TierCode:
    """The farthest tier of a block over all ranks; ABSENT if any rank lacks it."""
    return TierCode.ABSENT if TierCode.ABSENT in codes else max(codes)
