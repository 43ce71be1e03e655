"""Moving blocks between a cache and the daemon's memory.

Loading copies first and asks afterwards whether the lease was valid all the time: bytes of a lease that ran out are
worth nothing, and the model computes those tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.client import LeasedBlock, Room
from kvstore.client.blocks import as_bytes
from kvstore.types import BlockHeader, Dropped, DropReason, Exists, Miss, MissReason, Namespace, Stored
from kvstore_connectors.base import Link, Tally, is_final
from kvstore_connectors.transformers.layout import Bytes, LayerKV, Layout
from kvstore_connectors.transformers.prefix import StoreReport

GROUP = 16
"""Blocks leased or reserved at a time: bounds what one transfer holds of the daemon's memory."""

ROUND_S = 0.1
"""Longest wait for blocks on their way up from a lower tier. Then the daemon is asked again, and has to answer."""

TTL_S = 30.0


class Offer(NamedTuple):
    """A full block of a cache.

    Attributes
    ----------
    row, block : int
        Prompt of the batch, and block of it.
    """

    key: bytes
    header: BlockHeader
    row: int
    block: int


class Transfers:
    """Loads and stores for one model.

    Parameters
    ----------
    link : Link
    layout : Layout
    tally : Tally
    load_deadline_s : float
        A load takes no longer; what has not arrived then is computed.
    """

    def __init__(self, link: Link, layout: Layout, tally: Tally, load_deadline_s: float) -> None:
        self._link = link
        self._layout = layout
        self._tally = tally
        self._load_deadline_s = load_deadline_s

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(
        self, namespace: Namespace, keys: Sequence[Sequence[bytes]], device: torch.device
    ) -> tuple[list[LayerKV], int]:
        """KV of the blocks that every prompt of a batch begins with.

        Parameters
        ----------
        namespace : Namespace
        keys : sequence of sequence of bytes
            Prefix keys of each prompt, as many for each.
        device : torch.device

        Returns
        -------
        kv : list of (Tensor, Tensor)
            For each layer, each [batch, kv_head, token, dim]; may be longer than what was loaded.
        blocks : int
            How many were loaded.
        """
        deadline = time.monotonic() + self._load_deadline_s
        found = self._link.run("lookup", lambda client: client.lookup_many([(namespace, row) for row in keys]))
        blocks = min(map(len, found)) if found else 0
        if not blocks:
            return [], 0
        kv = self._layout.empty(len(keys), blocks * self._layout.block_tokens, device)
        for row, row_keys in enumerate(keys):
            blocks = min(blocks, self._load_row(namespace, row_keys[:blocks], kv, row, deadline))
        return kv, blocks

    def _load_row(
        self, namespace: Namespace, keys: Sequence[bytes], kv: Sequence[LayerKV], row: int, deadline: float
    ) -> int:
        done = 0
        while done < len(keys) and time.monotonic() < deadline:
            some = partial(
                self._load_some, namespace=namespace, keys=keys, kv=kv, row=row, first=done, deadline=deadline
            )
            answer = self._link.run("load", some)
            if answer is None:
                break
            count, reason = answer
            done += count
            if reason is not None and is_final(reason, count > 0):
                self._tally.add(f"load_{reason.value}")
                break
        return done

    def _load_some(
        self,
        client: Any,
        namespace: Namespace,
        keys: Sequence[bytes],
        kv: Sequence[LayerKV],
        row: int,
        first: int,
        deadline: float,
    ) -> tuple[int, MissReason | None]:
        """Load up to `GROUP` blocks from `first` on: how many, and why no more."""
        wait_s = max(min(ROUND_S, deadline - time.monotonic()), 0.0)
        with client.lease(keys[first : first + GROUP], namespace=namespace, ttl_s=TTL_S, wait_s=wait_s) as lease:
            reason, copied = None, 0
            for block in lease.blocks:
                if isinstance(block, Miss):
                    reason = block.reason
                    break
                if block.nbytes != self._layout.nbytes:
                    reason = MissReason.CORRUPT
                    break
                self._layout.read(_source(client, lease, block, kv[0][0].device), kv, row, first + copied)
                copied += 1
            if copied and kv[0][0].is_cuda:
                torch.cuda.current_stream(kv[0][0].device).synchronize()  # it reads the daemon's memory up to here
            if copied and not lease.valid():
                return 0, MissReason.LOST
        return copied, reason

    # -- storing -------------------------------------------------------------------------------------------------------

    def store(self, namespace: Namespace, offers: Sequence[Offer], kv: Sequence[LayerKV]) -> StoreReport:
        """Store blocks of a cache; stops at the first that finds no room, since what follows would not be found.

        Parameters
        ----------
        namespace : Namespace
        offers : sequence of Offer
        kv : sequence of (Tensor, Tensor)
            For each layer, each [batch, kv_head, token, dim].
        """
        outcomes: list[Any] = []
        for start in range(0, len(offers), GROUP):
            some = partial(self._store_some, namespace=namespace, offers=offers[start : start + GROUP], kv=kv)
            done = self._link.run("store", some)
            if done is None:
                break
            outcomes += done
            if any(isinstance(one, Dropped) and one.reason is not DropReason.IN_FLIGHT for one in done):
                break
        stored = sum(isinstance(one, Stored) for one in outcomes)
        existed = sum(isinstance(one, Exists) for one in outcomes)
        return StoreReport(stored, existed, len(offers) - stored - existed)

    def _store_some(
        self, client: Any, namespace: Namespace, offers: Sequence[Offer], kv: Sequence[LayerKV]
    ) -> list[Any]:
        wanted = [(offer.key, self._layout.nbytes, offer.header) for offer in offers]
        with client.reserve(wanted, namespace=namespace, ttl_s=TTL_S, wait_s=0.0) as reservation:
            filled = []
            for index, room in enumerate(reservation.blocks):
                if isinstance(room, Room):
                    self._fill(client, reservation.id, room, offers[index], kv)
                    filled.append(index)
            return reservation.commit(filled)

    def _fill(self, client: Any, reservation: int, room: Room, offer: Offer, kv: Sequence[LayerKV]) -> None:
        if room.array is not None:
            self._layout.write(kv, offer.row, offer.block, room.array)
            return
        whole = np.empty(room.nbytes, dtype=np.uint8)  # the room lies in several slabs, or on another host
        self._layout.write(kv, offer.row, offer.block, whole)
        client.drive(client.core.fill(reservation, room, as_bytes(whole)), None)


def _source(client: Any, lease: Any, block: LeasedBlock, device: torch.device) -> Bytes | torch.Tensor:
    """Where a leased block is best read for a device: on it, if the daemon has a copy there."""
    near = block.device
    return near if isinstance(near, torch.Tensor) and near.device == device else _in_one_piece(client, lease, block)


def _in_one_piece(client: Any, lease: Any, block: LeasedBlock) -> Bytes:
    """A leased block's bytes: in place, or copied together if it lies in several slabs or on another host."""
    if block.array is not None:
        return block.array
    whole = np.empty(block.nbytes, dtype=np.uint8)
    client.read(lease, block, whole)
    return whole
