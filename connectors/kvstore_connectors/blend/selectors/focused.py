"""Cache-Craft (SIGMOD'25): stop recomputing chunks that the question turns out not to look at.

Layer by layer the question's attention on each chunk is summed. Sorted, the largest gap parts focused chunks from the
others; when the focused ones have been the same for some layers, rows of the others are dropped: behind there they keep
their cached KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.attention import segment_masses
from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Focused:
    """Another choice, cut short where nobody asks.

    Parameters
    ----------
    inner : Choice
        Says which rows are recomputed to begin with.
    steady : int
        Layers for which the focused chunks must have been the same.
    """

    inner: Choice
    name: str
    steady: int = 3

    @property
    def reads_question(self) -> bool:
        """Whether choosing computes the question's tokens once more."""
        return self.inner.reads_question

    def repair(self, work: Work, count: int) -> Iterator[int]:
        rows = yield from self.inner.choose(work, count)
        focus = Focus(work, self.steady)
        yield from work.steps(work.with_missing(rows), narrow=focus.narrow, watch=focus.watch)


class Focus:
    """Which chunks of a prompt the question looks at, as far as the layers passed so far tell."""

    def __init__(self, work: Work, steady: int) -> None:
        self._prompt, self._model, self._steady = work.prompt, work.model, steady
        self._segments = [(span.start, span.stop) for span in work.prompt.spans]
        self._mass = torch.zeros(len(self._segments), device=work.prompt.ids.device)
        self._unchanged = 0
        self._dropped = False
        self.chunks: frozenset[int] = frozenset()

    def watch(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        """See `recompute.Watch`."""
        asking = rows >= self._prompt.question[0]
        masses = segment_masses(queries[asking], keys, rows[asking], self._model.scale, self._segments)
        self._mass += self._model.total(masses.sum(1), "sum")
        found = focused(self._mass)
        self._unchanged = self._unchanged + 1 if found == self.chunks else 1
        self.chunks = found

    def narrow(self, layer: int, rows: Tensor, fresh: LayerKV, cached: LayerKV) -> Tensor | None:
        """See `recompute.Narrow`."""
        if self._dropped or self._unchanged < self._steady:
            return None
        self._dropped = True
        owners = self._prompt.chunk_of[rows]
        kept = owners < 0
        for chunk in self.chunks:
            kept |= owners == chunk
        return kept


def focused(mass: Tensor) -> frozenset[int]:
    """Chunks above the largest gap between sorted masses; all, if there is one only."""
    if len(mass) < 2:
        return frozenset(range(len(mass)))
    order = torch.sort(mass, descending=True, stable=True)
    gap = int((order.values[:-1] - order.values[1:]).argmax())
    return frozenset(order.indices[: gap + 1].tolist())
