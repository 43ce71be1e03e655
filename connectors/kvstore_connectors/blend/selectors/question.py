"""ProphetKV: recompute the tokens that the question looks at, seen by letting it read the unrepaired cache once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kvstore_connectors.blend.attention import scores
from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Question(Choice):
    """Attention of the question's tokens, summed over layers.

    The reading costs the question's tokens once more; it is part of the work's cost.

    Parameters
    ----------
    by : {"mean", "peak", "peaks"}
        The mean over heads and tokens, as published; or the highest token of a head less that head's mean, of the
        highest head or the mean over heads. A sink is looked at by all tokens alike and so has no peak.
    """

    name: str = "question"
    by: Literal["mean", "peak", "peaks"] = "mean"

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        if self.by not in work.notes:
            yield from read_question(work, self.by)
        return work.notes[self.by]

    @property
    def reads_question(self) -> bool:
        return True


def _mean(table: Tensor) -> Tensor:
    return table.sum((0, 1))


def _peaks(table: Tensor) -> Tensor:
    return (table.amax(1) - table.mean(1)).sum(0)


def _peak(table: Tensor) -> Tensor:
    return (table.amax(1) - table.mean(1)).amax(0)


How = Literal["sum", "max"]

_MEASURES: dict[str, tuple[Callable[[Tensor], Tensor], How]] = {
    "mean": (_mean, "sum"),
    "peaks": (_peaks, "sum"),
    "peak": (_peak, "max"),
}
"""From attention ``[head, query, key]`` to a number for each key, and how ranks put theirs together."""


class Reading:
    """A `recompute.Watch` that notes where the question's tokens look.

    Parameters
    ----------
    work : Work
    by : {"mean", "peak", "peaks"}
        As of `Question`.
    """

    def __init__(self, work: Work, by: str) -> None:
        self._model = work.model
        self._measure: Callable[[Tensor], Tensor]
        self._how: How
        self._measure, self._how = _MEASURES[by]
        self._tokens, self._asked = len(work.prompt.ids), len(work.prompt.question)
        self._seen = torch.zeros((work.model.layers, self._tokens), device=work.prompt.ids.device)

    def __call__(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        # The question is the end of the prompt, nothing of it is cached, and so it is the end of the rows.
        keys, first = keys[: self._tokens], self._tokens - self._asked
        products = scores(queries[-self._asked :], keys, rows[-self._asked :], self._model.scale, first)
        self._seen[layer] = self._measure(products.softmax(-1))

    def scores(self) -> Tensor:
        """The measure of every position ``[n]``, summed over layers."""
        return self._model.total(self._seen, self._how).sum(0)


def read_question(work: Work, by: str) -> Iterator[int]:
    """Compute the question's tokens over the cache as it is and note where they look."""
    reading = Reading(work, by)
    yield from work.steps(work.prompt.missing, watch=reading)
    work.notes[by] = reading.scores()
