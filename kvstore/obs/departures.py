"""Why blocks are not here: the latest that left a tier, or were offered and not taken, with the reason.

A miss by itself says nothing. With this, `kvstore explain` and the dashboard can tell one that was evicted a minute ago
from one that was never stored.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import NamedTuple

from kvstore.types import BlockId, Gone, TierCode
from kvstore.watcher import Watcher

MAX_BLOCKS = 16_384
_NAMES = {tier: tier.name.lower() for tier in TierCode}


class Departure(NamedTuple):
    """What became of a block: the tier it left (empty if it was never taken), why, and when (monotonic)."""

    tier: str
    reason: str
    at: float


class Departures(Watcher):
    """Remembers a bounded number of departures, the latest of each block.

    Parameters
    ----------
    capacity : int
        Blocks remembered; who left longest ago is forgotten first.
    """

    def __init__(self, capacity: int = MAX_BLOCKS) -> None:
        self._capacity = capacity
        self._latest: OrderedDict[BlockId, Departure] = OrderedDict()

    def __len__(self) -> int:
        return len(self._latest)

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """Note that a block left a tier."""
        self._note(block, Departure(_NAMES[tier], reason.value, time.monotonic()))

    def refused(self, block: BlockId, reason: str) -> None:
        """Note that a block was offered and not taken."""
        self._note(block, Departure("", reason, time.monotonic()))

    def _note(self, block: BlockId, departure: Departure) -> None:
        self._latest[block] = departure
        self._latest.move_to_end(block)
        if len(self._latest) > self._capacity:
            self._latest.popitem(last=False)

    def find(self, block: BlockId) -> Departure | None:
        """The latest departure of a block, if it is remembered."""
        return self._latest.get(block)
