"""ProphetKV: recompute the tokens that the question looks at, seen by letting it read the unrepaired cache once."""

from __future__ import annotations

from collections.abc import Generator, Iterator
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
            yield from read_question(work)
        return work.notes[self.by]

    @property
    def reads_question(self) -> bool:
        return True


class Reading:
    """A `recompute.Watch` that notes where the question's tokens look, in each way of `Question`."""

    def __init__(self, work: Work) -> None:
        self._model = work.model
        self._tokens, self._asked = len(work.prompt.ids), int(work.prompt.question[0])
        shape, device = (work.model.layers, self._tokens), work.prompt.ids.device
        self._mean, self._peak, self._peaks = (torch.zeros(shape, device=device) for _ in range(3))

    def __call__(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        asking = rows >= self._asked
        products = scores(queries[asking], keys[: self._tokens], rows[asking], self._model.scale)
        table = products.softmax(-1)
        self._mean[layer] = table.sum((0, 1))
        above = table.amax(1) - table.mean(1)
        self._peak[layer], self._peaks[layer] = above.amax(0), above.sum(0)

    def mean(self) -> Tensor:
        """Mass on every position ``[n]``, summed over layers, heads, tokens and ranks."""
        return self._model.total(self._mean, "sum").sum(0)

    def peaks(self) -> Tensor:
        """What the highest token of each head puts there above that head's mean, summed over heads."""
        return self._model.total(self._peaks, "sum").sum(0)

    def peak(self) -> Tensor:
        """The same of the highest head."""
        return self._model.total(self._peak, "max").sum(0)


def read_question(work: Work) -> Iterator[int]:
    """Compute the question's tokens over the cache as it is and note where they look, in each way of `Question`."""
    reading = Reading(work)
    yield from work.steps(work.prompt.missing, watch=reading)
    work.notes |= {"mean": reading.mean(), "peak": reading.peak(), "peaks": reading.peaks()}
