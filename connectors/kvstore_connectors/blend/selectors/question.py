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

    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import LayerKV
    from kvstore_connectors.blend.work import Work

By = Literal["mean", "peak", "value"]


@dataclass(frozen=True)
class Question(Choice):
    """Attention of the question's tokens, summed over layers.

    The reading costs the question's tokens once more; it is part of the work's cost.

    Parameters
    ----------
    by : {"mean", "peak", "value"}
        The mean over heads and tokens, as published; the highest token less the mean, of the highest head, since a
        sink is looked at by all tokens alike; or the mean times the length of the value that is fetched.
    """

    name: str = "question"
    by: By = "mean"

    def scores(self, work: Work) -> Generator[int, None, Tensor]:
        if self.by not in work.notes:
            yield from read_question(work, self.by)
        return work.notes[self.by]

    @property
    def reads_question(self) -> bool:
        return True


def _mean(model: Model, queries: Tensor, held: LayerKV, tokens: int) -> Tensor:
    return model.looked_at(queries, held.keys, tokens)


def _peak(model: Model, queries: Tensor, held: LayerKV, tokens: int) -> Tensor:
    first = tokens - len(queries)
    at = torch.arange(first, tokens, device=queries.device)
    table = scores(queries, held.keys[:tokens], at, model.scale, first).softmax(-1)
    return table.amax(1) - table.mean(1)


def _value(model: Model, queries: Tensor, held: LayerKV, tokens: int) -> Tensor:
    return model.looked_at(queries, held.keys, tokens, held.values)


How = Literal["sum", "max"]

_MEASURES: dict[By, tuple[Callable[[Model, Tensor, LayerKV, int], Tensor], How]] = {
    "mean": (_mean, "sum"),
    "peak": (_peak, "max"),
    "value": (_value, "sum"),
}
"""From queries of the last positions and a layer's keys and values to a number for each head and key, and how those of
heads, and of ranks, are put together."""


class Reading:
    """A `recompute.Watch` that notes where the question's tokens look.

    Parameters
    ----------
    work : Work
    by : {"mean", "peak", "value"}
        As of `Question`.
    """

    def __init__(self, work: Work, by: By) -> None:
        self._model, self._cache = work.model, work.cache
        self._how: How
        self._measure, self._how = _MEASURES[by]
        self._tokens, self._asked = len(work.prompt.ids), len(work.prompt.question)
        self._device = work.prompt.ids.device
        self._seen: dict[int, Tensor] = {}
        self._reads = True

    def stop(self) -> None:
        """Note nothing of the layers that are still to come."""
        self._reads = False

    def __call__(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        if not self._reads:
            return
        # The question is the end of the prompt, nothing of it is cached, and so it is the end of the rows.
        self._seen[layer] = self._measure(self._model, queries[-self._asked :], self._cache[layer], self._tokens)

    def scores(self, layers: range | None = None) -> Tensor:
        """The measure of every position ``[n]``, summed over these layers, or all that were seen."""
        some = [one for layer, one in self._seen.items() if layers is None or layer in layers]
        if not some:
            return torch.zeros(self._tokens, device=self._device)
        seen = torch.stack(some)
        if self._how == "sum":
            return self._model.total(seen.sum((0, 1)), "sum")
        return self._model.total(seen.amax(1), "max").sum(0)


def read_question(work: Work, by: By) -> Iterator[int]:
    """Compute the question's tokens over the cache as it is and note where they look."""
    reading = Reading(work, by)
    yield from work.steps(work.prompt.missing, watch=reading)
    work.notes[by] = reading.scores()
