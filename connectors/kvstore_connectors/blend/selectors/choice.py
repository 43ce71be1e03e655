"""Selectors that know all rows before the repair begins: a score for every token, and the highest are recomputed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.prompt import top

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.work import Work


class Choice(ABC):
    """A selector by scores."""

    @abstractmethod
    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        """Score of every position ``[n]``, minus infinity for those that must not be chosen.

        May run passes; yields once for every layer of them.
        """

    @property
    def reads_question(self) -> bool:
        """Whether choosing computes the question's tokens once more."""
        return False

    def choose(self, work: Work, count: int) -> Generator[int, None, Tensor]:
        """Sorted positions of ``count`` tokens to recompute, or fewer."""
        scores = yield from self.scores(work)
        return top(scores.masked_fill(~work.prompt.repairable, -torch.inf), count)

    def repair(self, work: Work, count: int) -> Iterator[int]:
        rows = yield from self.choose(work, count)
        yield from work.steps(work.with_missing(rows))
