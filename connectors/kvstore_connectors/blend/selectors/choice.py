"""Selectors that know all rows before the repair begins: a score for every token, and the highest are recomputed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Mixture(Choice):
    """Several choices, each with its share of the budget; what one leaves goes to the next.

    Parameters
    ----------
    name : str
    parts : tuple of (Choice, float)
        Choices, most trusted first, and their shares; the last takes what is left.
    """

    name: str
    parts: tuple[tuple[Choice, float], ...]

    @property
    def reads_question(self) -> bool:
        return any(part.reads_question for part, _ in self.parts)

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        rows = yield from self.choose(work, len(work.prompt.ids))
        chosen = torch.full((len(work.prompt.ids),), -torch.inf, device=rows.device)
        chosen[rows] = 0
        return chosen

    def choose(self, work: Work, count: int) -> Generator[int, None, Tensor]:
        open_rows = work.prompt.repairable.clone()
        quota = 0.0
        chosen = 0
        for index, (part, share) in enumerate(self.parts):
            scores = yield from part.scores(work)
            quota = count if index + 1 == len(self.parts) else quota + share * count
            rows = top(scores.masked_fill(~open_rows, -torch.inf), int(quota + 0.5) - chosen)
            open_rows[rows] = False
            chosen += len(rows)
        return (work.prompt.repairable & ~open_rows).nonzero()[:, 0]


@dataclass(frozen=True)
class Product(Choice):
    """Tokens that are high in all of several scores, none of them negative."""

    name: str
    parts: tuple[Choice, ...]

    @property
    def reads_question(self) -> bool:
        return any(part.reads_question for part in self.parts)

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        product = torch.ones(len(work.prompt.ids), device=work.prompt.ids.device)
        for part in self.parts:
            scores = yield from part.scores(work)
            product *= scores.clamp(min=0)
        return product
