"""Moving pages between SGLang's host pool and the daemon's memory.

Loading copies first and asks afterwards whether the lease was valid all the time: bytes of a lease that ran out are
worth nothing, and SGLang recomputes them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvstore.client import Room
from kvstore.errors import InvalidParams
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import BlockHeader, Exists, Miss, MissReason, Namespace, Stored
from kvstore_connectors.base import Link, Tally, is_final
from kvstore_connectors.sglang.pages import Bytes, HostPages, copy_in, copy_out

LEASE_PAGES = 32
"""Pages leased or reserved at a time: bounds what a call pins in the daemon's memory."""

LOOKUP_PAGES = 4096
"""Pages asked for in one question. SGLang asks for a whole prompt, which may be more than one can hold."""

ROUND_S = 0.1
"""Longest wait for pages on their way up from a lower tier. Then the daemon is asked again, and has to answer."""

TTL_S = 30.0


class Transfers:
    """Lookups, loads and stores of one rank. What the daemon can not do is a miss, never an exception.

    Parameters
    ----------
    namespace : Namespace
    pages : HostPages
    tally : Tally
    load_deadline_s, save_deadline_s : float
    """

    def __init__(
        self, namespace: Namespace, pages: HostPages, tally: Tally, load_deadline_s: float, save_deadline_s: float
    ) -> None:
        self.namespace = namespace
        self.pages = pages
        self._digest = namespace_digest(namespace)
        self._nbytes = pages.nbytes
        self._tally = tally
        self._load_deadline_s = load_deadline_s
        self._save_deadline_s = save_deadline_s

    def count(self, link: Link, hashes: Sequence[str]) -> int:
        """Pages of a prefix that are stored, wherever they are."""
        hits = 0
        while hits < len(hashes):
            keys = self._keys(hashes[hits : hits + LOOKUP_PAGES])
            codes = link.run("lookup", lambda client, keys=keys: client.lookup(keys, namespace=self.namespace))
            found = next((at for at, code in enumerate(codes or ()) if not code), len(codes or ()))
            hits += found
            if found < len(keys):
                break
        self._tally.add("lookups", len(hashes))
        self._tally.add("hits", hits)
        return hits

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, link: Link, hashes: Sequence[str], pages: Sequence[Bytes]) -> int:
        """Fill the leading pages of a prefix; how many. What lies behind a hole is of no use and left as it was."""
        _match(hashes, pages)
        begun = time.monotonic()
        deadline = begun + self._load_deadline_s
        keys = self._keys(hashes)
        done = 0
        while done < len(keys) and time.monotonic() < deadline:
            some = slice(done, done + LEASE_PAGES)
            answer = link.run("load", lambda client, some=some: self._load(client, keys[some], pages[some], deadline))
            if answer is None:
                break
            count, reason = answer
            done += count
            if is_final(reason, count > 0):
                break
        self._tally.add("load_seconds", time.monotonic() - begun)
        self._tally.add("loaded_pages", done)
        self._tally.add("loaded_bytes", done * self._nbytes)
        return done

    def _load(
        self, client: Any, keys: list[bytes], pages: Sequence[Bytes], deadline: float
    ) -> tuple[int, MissReason | None]:
        """Load some pages: how many, and why no more."""
        wait_s = max(min(ROUND_S, deadline - time.monotonic()), 0.0)
        copied, reason = 0, None
        with client.lease(keys, namespace=self.namespace, ttl_s=TTL_S, wait_s=wait_s) as lease:
            for block, page in zip(lease.blocks, pages, strict=True):
                if isinstance(block, Miss):
                    reason = block.reason
                    break
                if block.nbytes != self._nbytes:
                    self._tally.add("load_wrong_size")
                    reason = MissReason.CORRUPT
                    break
                copy_in(page, block.parts)
                copied += 1
            if copied and not lease.valid():
                self._tally.add("load_expired")
                return 0, MissReason.LOST
        if is_final(reason, copied > 0):
            self._tally.add("load_missing")
        return copied, reason

    # -- storing -------------------------------------------------------------------------------------------------------

    def save(
        self, link: Link, hashes: Sequence[str], pages: Sequence[Bytes], before: Sequence[str] | None = None
    ) -> list[bool]:
        """Store pages: for each, whether it is there now.

        Parameters
        ----------
        link : Link
        hashes : sequence of str
        pages : sequence of ndarray
        before : sequence of str, optional
            Hashes of the pages of the prompt before these, if they are known.
        """
        _match(hashes, pages)
        begun = time.monotonic()
        deadline = begun + self._save_deadline_s
        offers = self._offers(hashes, before)
        saved: list[bool] = []
        for first in range(0, len(offers), LEASE_PAGES):
            some = slice(first, first + LEASE_PAGES)
            if time.monotonic() >= deadline:
                break
            answer = link.run("save", lambda client, some=some: self._save(client, offers[some], pages[some], deadline))
            if answer is None:
                break
            saved += answer
        self._tally.add("save_seconds", time.monotonic() - begun)
        return saved + [False] * (len(hashes) - len(saved))

    def _offers(self, hashes: Sequence[str], before: Sequence[str] | None) -> list[tuple[bytes, int, BlockHeader]]:
        tokens = self.namespace.block_tokens
        first = len(before) if before else 0
        parent = self._keys(before[-1:])[0] if before else b""
        offers = []
        for number, key in enumerate(self._keys(hashes), first):
            offers.append((key, self._nbytes, BlockHeader(parent=parent, position=number * tokens)))
            parent = key
        return offers

    def _save(
        self, client: Any, offers: list[tuple[bytes, int, BlockHeader]], pages: Sequence[Bytes], deadline: float
    ) -> list[bool]:
        # Nobody computes behind this thread, so it waits for memory that is being written to disk.
        wait_s = max(min(ROUND_S, deadline - time.monotonic()), 0.0)
        with client.reserve(offers, namespace=self.namespace, ttl_s=TTL_S, wait_s=wait_s) as reservation:
            filled = []
            for index, answer in enumerate(reservation.blocks):
                if isinstance(answer, Room):
                    copy_out(pages[index], answer.parts)
                    filled.append(index)
            outcomes = reservation.commit(filled)
        for outcome in outcomes:
            self._count_outcome(outcome)
        return [isinstance(outcome, Stored | Exists) for outcome in outcomes]

    def _count_outcome(self, outcome: Any) -> None:
        if isinstance(outcome, Stored):
            self._tally.add("saved_pages")
            self._tally.add("saved_bytes", self._nbytes)
        else:
            self._tally.add("save_exists" if isinstance(outcome, Exists) else "save_dropped")

    def _keys(self, hashes: Sequence[str]) -> list[bytes]:
        return [derived_key(self._digest, page_hash.encode()) for page_hash in hashes]


def _match(hashes: Sequence[str], pages: Sequence[Bytes]) -> None:
    if len(hashes) != len(pages):
        raise InvalidParams(f"keys: {len(hashes)} keys for {len(pages)} pages.", "")
