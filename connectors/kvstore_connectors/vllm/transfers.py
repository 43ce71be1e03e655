"""Moving blocks between the engine's pages and the daemon's memory: one function to load, one to store.

Loading copies first and asks afterwards whether the lease was valid all the time: bytes of a lease that ran out are
worth nothing, and the engine recomputes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvstore.client import LeasedBlock, Room
from kvstore.errors import CodecError, InternalError
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import BlockHeader, Exists, Miss, MissReason, Namespace, Stored
from kvstore_connectors.base import Link, Tally, is_final
from kvstore_connectors.vllm.identity import request_namespace
from kvstore_connectors.vllm.jobs import LoadJob, SaveBlock, SaveJob
from kvstore_connectors.vllm.pages import Bytes, Pages, Piece
from kvstore_connectors.vllm.patience import Patience

LEASE_BLOCKS, LEASE_BYTES = 16, 1 << 30
"""Blocks of the first lease: few, so that copying begins soon. Then as many as are in so many bytes, if that is more:
bounds what a load pins in the daemon's memory."""

TTL_S = 30.0

Fill = Callable[[Sequence[tuple[SaveBlock, Room]]], list[bool]]
"""Writes blocks into their rooms; says of each whether it did."""


class _Landing(NamedTuple):
    """Blocks of a lease that are being copied; the function waits for them. `final` if none behind them can be had."""

    lease: Any
    blocks: int
    nbytes: int
    landed: Callable[[], None]
    final: bool


def keys_of(namespace: Namespace, hashes: Sequence[bytes]) -> list[bytes]:
    """Keys of blocks, given vLLM's hash of each."""
    digest = namespace_digest(namespace)
    return [derived_key(digest, engine_hash) for engine_hash in hashes]


class Transfers:
    """Loads and stores for one rank.

    Parameters
    ----------
    pages : Pages
    namespace : Namespace
        Of this rank.
    tally : Tally
    load_deadline_s : float
    """

    def __init__(self, pages: Pages, namespace: Namespace, tally: Tally, load_deadline_s: float) -> None:
        self._pages = pages
        self._namespace = namespace
        self._tally = tally
        self._load_deadline_s = load_deadline_s

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, link: Link, job: LoadJob, after: Any = None, stop: Callable[[], bool] = lambda: False) -> set[int]:
        """Do what can be done of a load; returns the engine blocks that were not filled.

        Those are everything from the first block on that could not be had: KV behind a hole is of no use.
        """
        begun = job.begun or time.monotonic()
        deadline = begun + min(job.deadline_s or self._load_deadline_s, self._load_deadline_s)
        patience = Patience(job.saves_s, deadline, job.ranks)
        namespace = request_namespace(self._namespace, job.scope)
        keys = keys_of(namespace, job.hashes)
        done = 0
        landing: _Landing | None = None
        final = False
        while not final:
            # The blocks of one lease are on their way while the next is asked for.
            first = done + (landing.blocks if landing else 0)
            following = None
            if first < len(keys) and not patience.ended and not stop():
                held = landing is not None and landing.blocks > 0
                begin = partial(
                    self._begin, job=job, namespace=namespace, keys=keys, first=first, after=after, held=held
                )
                following = link.run("load", partial(begin, patience=patience))
            final = following is None or following.final
            if landing is not None and not self._finish(landing):
                if following is not None:
                    self._finish(following)
                landing = None
                break
            done, landing = first, following
        if landing is not None and self._finish(landing):
            done += landing.blocks
        failed = set(job.engine_ids[self._filled(job, done) :]) if done < len(keys) or not keys else set()
        self._count_load(job, done, failed, begun, patience.ended)
        return failed

    def _filled(self, job: LoadJob, blocks: int) -> int:
        """Engine blocks that are filled once that many blocks are loaded."""
        return max(blocks * self._pages.per_block - job.skip, 0) if blocks else 0

    def _begin(
        self,
        client: Any,
        job: LoadJob,
        namespace: Namespace,
        keys: list[bytes],
        first: int,
        after: Any,
        held: bool,
        patience: Patience,
    ) -> _Landing:
        """Lease some blocks from `first` on and have them copied, while those before may still be `held`."""
        several = LEASE_BYTES // self._pages.stored_nbytes(job.position + 1) if first else 0
        wanted = keys[first : first + max(LEASE_BLOCKS, several)]
        lease = client.lease(wanted, namespace=namespace, ttl_s=TTL_S, wait_s=patience.next_round_s())
        try:
            reason = None
            pieces: list[Piece] = []
            for block in lease.blocks:
                if isinstance(block, Miss):
                    reason = block.reason
                    break
                piece = self._pages.known(self._piece(block, job, first + len(pieces)))
                if piece is None:
                    self._tally.add("load_wrong_size")
                    reason = MissReason.CORRUPT
                    break
                pieces.append(piece)
            if pieces:
                patience.came()
            if reason is MissReason.DEADLINE and job.saves_s:
                missing = first + len(pieces)
                patience.look(missing, self._left_s(client, namespace, keys[missing:], job.position))
            landed = self._pages.start(pieces, after)
        except BaseException:
            lease.release()
            raise
        final = is_final(reason, held or len(pieces) > 0)
        if final:
            self._tally.add("load_corrupt" if reason is MissReason.CORRUPT else "load_missing")
        return _Landing(lease, len(pieces), sum(piece.nbytes for piece in pieces), landed, final)

    def _left_s(self, client: Any, namespace: Namespace, keys: list[bytes], position: int) -> float:
        """What the daemon thinks that bringing these blocks up takes at the pace of its reads now."""
        (tiers,) = client.lookup_many([(namespace, keys)], prefix=True)
        speeds, nbytes = client.speeds, self._pages.stored_nbytes(position + 1)
        costs = {tier: block_s + byte_s * nbytes for tier, (_, block_s, byte_s) in speeds.items()}
        return sum(costs.get(tier, 0.0) for tier in tiers)

    def _finish(self, landing: _Landing) -> bool:
        """Wait until blocks have landed, and end their lease; whether it held all the time."""
        with landing.lease:
            landing.landed()
            valid = bool(landing.lease.valid())
        if valid:
            self._tally.add("loaded_bytes", landing.nbytes)
        elif landing.blocks:
            self._tally.add("load_expired")
        return valid or not landing.blocks

    def _piece(self, block: Any, job: LoadJob, index: int) -> Piece:
        begin = self._filled(job, index)
        end = min(self._filled(job, index + 1), len(job.engine_ids))
        skip = job.skip if index == 0 else 0
        if not 0 < end - begin <= self._pages.per_block - skip:
            raise InternalError(
                f"a load of {len(job.engine_ids)} engine blocks does not fit its {len(job.hashes)} blocks."
            )
        position = job.position + index * self._pages.block_tokens
        return Piece(block.parts, skip, job.engine_ids[begin:end], position, block.device)

    def _count_load(self, job: LoadJob, done: int, failed: set[int], begun: float, given_up: bool) -> None:
        self._tally.add("load_seconds", time.monotonic() - begun)
        if done:
            self._tally.add("loaded_blocks", done)
        if failed and given_up:
            self._tally.add("load_given_up")
        if failed:
            self._tally.add("load_failures")
            self._tally.add("recomputed_tokens", min(len(failed) * self._pages.engine_block, job.tokens))

    # -- storing -------------------------------------------------------------------------------------------------------

    def save(self, link: Link, jobs: Sequence[SaveJob]) -> None:
        """Store blocks straight from the engine's pages; returns when they are copied."""
        begun = time.monotonic()
        for job in jobs:
            self.store(link, request_namespace(self._namespace, job.scope), job.blocks, self._fill)
        self._tally.add("save_seconds", time.monotonic() - begun)

    def _fill(self, rooms: Sequence[tuple[SaveBlock, Room]]) -> list[bool]:
        return [self._fill_one(block, room) for block, room in rooms]

    def _fill_one(self, block: SaveBlock, room: Room) -> bool:
        try:
            fill_room(room, lambda into: self._pages.save(block.engine_ids, into, block.position))
        except CodecError:  # values that the code cannot say: the block is not kept
            self._tally.add("save_unencodable")
            return False
        return True

    def store(self, link: Link, namespace: Namespace, blocks: Sequence[SaveBlock], fill: Fill) -> None:
        """Store blocks of one request; ``fill`` writes those that the daemon has room for."""
        stored = link.run("save", lambda client: self._store(client, namespace, blocks, fill))
        if stored is None:
            self._tally.add("save_unreachable", len(blocks))

    def _store(self, client: Any, namespace: Namespace, blocks: Sequence[SaveBlock], fill: Fill) -> bool:
        digest = namespace_digest(namespace)
        offers = []
        for block in blocks:
            parent = derived_key(digest, block.parent) if block.parent else b""
            header = BlockHeader(parent=parent, tokens=block.tokens, position=block.position)
            offers.append((derived_key(digest, block.hash), self._pages.stored_nbytes(block.position), header))
        with client.reserve(offers, namespace=namespace, ttl_s=TTL_S, wait_s=0.0) as reservation:
            rooms = [(index, room) for index, room in enumerate(reservation.blocks) if isinstance(room, Room)]
            done = fill([(blocks[index], room) for index, room in rooms]) if rooms else []
            outcomes = reservation.commit([index for (index, _), filled in zip(rooms, done, strict=True) if filled])
        for outcome, (_, nbytes, _) in zip(outcomes, offers, strict=True):
            self._count_outcome(outcome, nbytes)
        return True

    def _count_outcome(self, outcome: Any, nbytes: int) -> None:
        if isinstance(outcome, Stored):
            self._tally.add("saved_blocks")
            self._tally.add("saved_bytes", nbytes)
        else:
            self._tally.add("save_exists" if isinstance(outcome, Exists) else "save_dropped")


def contiguous(block: LeasedBlock) -> Bytes:
    """A leased block's bytes in one piece: in place, or copied together if it lies in several parts."""
    if block.array is not None:
        return block.array
    whole = np.empty(block.nbytes, dtype=np.uint8)
    block.copy_into(whole)
    return whole


def fill_room(room: Room, write: Callable[[Bytes], None]) -> None:
    """Write a block into its room: in place, or through a copy if the room lies in several parts."""
    if room.array is not None:
        write(room.array)
        return
    whole = np.empty(room.nbytes, dtype=np.uint8)
    write(whole)
    room.write(whole)
