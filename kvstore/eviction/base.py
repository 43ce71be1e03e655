"""The contract of an eviction policy: an order over items, nothing else.

A policy never frees memory and never looks into an item. The tier asks for victims and evicts those it may; a policy is
one file and one row in the table of `kvstore.eviction`. `kvstore.testing.policy_suite` judges every policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class EvictionPolicy(ABC, Generic[Item]):
    """An order in which items should leave.

    Rules for implementations
    -------------------------
    - Every item inserted and not removed MUST be yielded by `victims` exactly once, soonest to leave first.
    - `victims` MUST NOT change the order by being read. The caller takes as many as it needs, stops iterating, and only
      then calls `remove` for those it evicted.
    - All methods but `victims` MUST be O(1).
    - Within one call of `touch` the items are blocks of one prompt, first block first. Tails MUST go before heads: a
      block is of no use once its parent is gone.
    - Two items are equal if and only if they are the same block, also in another life: a policy MAY remember what it
      saw leave, in a bounded number of such ghosts.
    """

    name: str

    @abstractmethod
    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        """Add an item that is not there yet.

        Parameters
        ----------
        nbytes : int
            What it occupies.
        cost : float
            What it would take to compute it again, in any unit that is the same for all items; at least 0.
        parent : Item, optional
            The block before it in its prompt, whether or not that is there.
        """

    @abstractmethod
    def touch(self, items: list[Item]) -> None:
        """Note a use of these items, which are there."""

    @abstractmethod
    def remove(self, item: Item, *, evicted: bool = False) -> None:
        """Take out an item that is there: `evicted` for want of room, else dropped, which leaves no ghost."""

    def hold(self, item: Item) -> None:
        """Note that an item may not leave until `release`; one that is not there is passed over.

        `victims` SHOULD yield it after all others: to find one that may leave, nobody should look at all that may not.
        """

    def release(self, item: Item) -> None:
        """Note that an item may leave again; one that is not there is passed over."""

    @abstractmethod
    def victims(self) -> Iterator[Item]:
        """Items in the order in which they should leave."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""
