"""Which blocks of a tier are encoded, on which rung, how large they are and were, and which may step down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from sys import intern

from kvstore.types import BlockId, Gone, TierCode
from kvstore.watcher import Watcher

UNREAD = "found at start"
"""Rung of a block whose header nobody has read since the daemon started."""

LOSSLESS = "byteplanes"
"""What an encoded block begins with that has lost nothing."""
FEW = 8
"""Where fewer than one block in so many may step down, it is not worth looking for them in the order of eviction."""


def called(chain: str, planes: int = 0) -> str:
    """The name of a rung: its chain, and of how many planes if some were cut off; 0 means all are there."""
    return f"{chain}, {planes} of its planes" if planes else chain


class Standing(Watcher):
    """Sums by rung, kept up to date as blocks come and go.

    A tier that tells of departures (`Tier.watch`) is never counted wrong; of one that others share, what leaves is
    noticed when it is looked for.
    """

    def __init__(self) -> None:
        self._sizes: dict[BlockId, tuple[str, int, int]] = {}
        self._may_step: dict[BlockId, int] = {}
        self._sums: dict[str, Counter[str]] = {}

    def set(self, block: BlockId, name: str, stored: int, logical: int, rung: int | None) -> None:
        """A block stands on a rung of such a name from now on; its number is None if the block may not step down."""
        self.forget(block)
        name = intern(name)
        self._sizes[block] = name, stored, logical
        self._sums.setdefault(name, Counter()).update(blocks=1, stored_bytes=stored, logical_bytes=logical)
        if rung is not None:
            self._may_step[block] = rung

    def seen(self, block: BlockId, name: str) -> None:
        """The header of a block was read, which says on what rung it stands."""
        known = self._sizes.get(block)
        if known is not None and known[0] != name:
            self.set(block, name, known[1], known[2], self._may_step.get(block))

    def may_step(self, block: BlockId) -> bool:
        """Whether a block has a rung below it, as far as is known."""
        return block in self._may_step

    def rung(self, block: BlockId) -> str:
        """Name of the rung that a block stands on; empty if it is not encoded, as far as is known."""
        known = self._sizes.get(block)
        return "" if known is None else known[0]

    def is_whole(self, block: BlockId) -> bool:
        """Whether a block is encoded without loss, as far as is known."""
        return self.rung(block).partition("|")[0] == LOSSLESS

    def stay(self, block: BlockId) -> None:
        """A block can step down no further."""
        self._may_step.pop(block, None)

    def forget(self, block: BlockId) -> None:
        """A block is not here, or not encoded."""
        self._may_step.pop(block, None)
        known = self._sizes.pop(block, None)
        if known is not None:
            name, stored, logical = known
            self._sums[name].update(blocks=-1, stored_bytes=-stored, logical_bytes=-logical)

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """A block left the tier."""
        del tier, reason
        self.forget(block)

    def stepping(
        self, least_valuable: Iterable[BlockId], free: Callable[[BlockId], bool], look: int, most: int
    ) -> list[BlockId]:
        """Blocks to step down next: of the first `look` to leave, or if few blocks may, of those here longest.

        Those on the highest rung go first: loss grows faster with each rung, so all take one before any takes two.

        Parameters
        ----------
        least_valuable : iterable of BlockId
            The order of eviction.
        free : callable
            Whether a block may be changed now.
        look, most : int
            How many are looked at, and how many are chosen.
        """
        chosen: list[BlockId] = []
        if FEW * len(self._may_step) > len(self._sizes):
            chosen = [block for block in islice(least_valuable, look) if block in self._may_step and free(block)]
        chosen = chosen or [block for block in islice(self._may_step, look) if free(block)]
        return sorted(chosen, key=self._may_step.__getitem__)[:most]

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def can_step(self) -> int:
        """How many blocks have a rung below them, as far as is known."""
        return len(self._may_step)

    def by_rung(self) -> dict[str, dict[str, int]]:
        """Blocks, stored and logical bytes by the name of their rung."""
        return {name: dict(counts) for name, counts in self._sums.items() if counts["blocks"] > 0}
