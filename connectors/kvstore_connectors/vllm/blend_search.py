"""Searches for chunks that the scheduler does not wait for: a thread asks the daemon, all ranks have to agree."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidParams
from kvstore.keys import namespace_digest
from kvstore.types import Namespace
from kvstore_connectors.base import Link, Tally, log
from kvstore_connectors.vllm.blend_wish import Wish

MOST_TOKENS = 262_144
"""In longer prompts no chunks are looked for."""


class Chunk(NamedTuple):
    """A chunk in a prompt that every rank has: the key of its last block, by namespace digest."""

    start: int
    stop: int
    keys: dict[bytes, bytes]
    overhead: float


class Search:
    """One prompt's search.

    Attributes
    ----------
    found : list of Chunk
        In order; empty until `finished`.
    absent : list of (int, int)
        Named spans that are no chunks yet.
    """

    __slots__ = ("absent", "deadline", "finished", "found", "namespaces", "tokens", "wish")

    def __init__(
        self, namespaces: Sequence[Namespace], tokens: NDArray[np.int32], wish: Wish, deadline_s: float
    ) -> None:
        self.namespaces = list(dict.fromkeys(namespaces))
        self.tokens = tokens
        self.wish = wish
        self.deadline = time.monotonic() + deadline_s
        self.finished = False
        self.found: list[Chunk] = []
        self.absent: list[tuple[int, int]] = []

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.finished or time.monotonic() >= self.deadline


class Searches:
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
        self._queue: list[Search] = []
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="kvstore-search", daemon=True)
        self._thread.start()

    def submit(self, namespaces: Sequence[Namespace], tokens: NDArray[np.int32], wish: Wish) -> Search:
        """Look for chunks; returns at once."""
        search = Search(namespaces, tokens, wish, self._deadline_s)
        with self._change:
            if self._stopped or not namespaces:
                search.finished = True
            else:
                self._queue.append(search)
                self._change.notify_all()
        return search

    def wait(self, search: Search, timeout_s: float) -> bool:
        """Wait a moment for an answer; whether it is there."""
        if not search.finished:
            with self._change:
                self._change.wait_for(lambda: search.finished, timeout_s)
        return search.finished

    def close(self) -> None:
        """End the thread; open searches end without an answer."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        self._thread.join(timeout=1.0)
        self._link.close()

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    for search in self._queue:
                        search.finished = True
                    self._change.notify_all()
                    return
                search = self._queue.pop(0)
            answer = self._link.run("search", partial(self._ask, search))
            with self._change:
                if answer is not None:
                    search.found, search.absent = answer
                search.finished = True
                self._change.notify_all()

    def _ask(self, search: Search, client: Any) -> tuple[list[Chunk], list[tuple[int, int]]] | None:
        """The first rank's namespace is searched; of the others those spans are asked for that it has."""
        first, *others = search.namespaces
        wish = search.wish
        try:
            found, absent = client.match(
                search.tokens,
                spans=wish.spans,
                separator=wish.separator,
                find=wish.find,
                labels=wish.labels,
                namespace=first,
            )
        except InvalidParams as error:  # spans that make no sense: the request is computed as any other
            self._tally.add("blend_bad_request")
            log.debug("a request is computed without chunks: %s", error)
            return None
        digest = namespace_digest(first)
        chunks = [Chunk(one.start, one.stop, {digest: one.key}, one.overhead) for one in found]
        for namespace in others:
            spans = [(chunk.start, chunk.stop) for chunk in chunks]
            theirs, _ = client.match(search.tokens, spans=spans, labels=wish.labels, namespace=namespace)
            keys = {(one.start, one.stop): one.key for one in theirs}
            digest = namespace_digest(namespace)
            for chunk in chunks:
                if (chunk.start, chunk.stop) in keys:
                    chunk.keys[digest] = keys[chunk.start, chunk.stop]
        return [chunk for chunk in chunks if len(chunk.keys) == len(search.namespaces)], absent
