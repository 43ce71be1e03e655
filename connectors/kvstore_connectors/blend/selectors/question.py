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


def read_question(work: Work) -> Iterator[int]:
    """Compute the question's tokens over the cache as it is and note where they look, in each way of `Question`."""
    prompt, model = work.prompt, work.model
    mean, peak, peaks = (torch.zeros(model.layers, len(prompt.ids), device=prompt.ids.device) for _ in range(3))
    asked = int(prompt.question[0])

    def watch(layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        asking = rows >= asked
        table = scores(queries[asking], keys[: len(prompt.ids)], rows[asking], model.scale).softmax(-1)
        mean[layer] = table.sum((0, 1))
        above = table.amax(1) - table.mean(1)
        peak[layer], peaks[layer] = above.amax(0), above.sum(0)

    yield from work.steps(prompt.missing, watch=watch)
    work.notes["mean"], work.notes["peaks"] = (model.total(seen, "sum").sum(0) for seen in (mean, peaks))
    work.notes["peak"] = model.total(peak, "max").sum(0)
