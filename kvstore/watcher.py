"""Who is told of blocks that come and go. Tiers call it; the event log is one."""

from __future__ import annotations

from kvstore.types import BlockId, Gone, TierCode


class Watcher:
    """Told on the event loop, when a block can be found in a tier from now on, or no longer. This one does not care."""

    def stored(self, tier: TierCode, block: BlockId, nbytes: int, parent: bytes) -> None:
        """A block of so many payload bytes is there; `parent` is the key before it, empty if none is known."""

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """A block that was there no longer is."""


class Watchers(Watcher):
    """Several watchers as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def stored(self, tier: TierCode, block: BlockId, nbytes: int, parent: bytes) -> None:
        """Tell all of them."""
        for watcher in self._watchers:
            watcher.stored(tier, block, nbytes, parent)

    def removed(self, tier: TierCode, block: BlockId, reason: Gone) -> None:
        """Tell all of them."""
        for watcher in self._watchers:
            watcher.removed(tier, block, reason)
