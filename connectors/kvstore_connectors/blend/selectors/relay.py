"""Repair what the question's words lead to, then let the question look again and repair what it sees now.

Two kinds of hints, each blind where the other sees. Equal rare words (`trail`) show the way from chunk to chunk before
anything is computed, but only where the same words stand. Attention of the question (ProphetKV) needs no equal words,
but sees one step: what a first chunk points to in a second shows only when the first has been repaired. So the first
part of the budget goes by words, and the question reads the prompt with that part repaired; what it looks at gets the
rest. The reading costs the question's tokens once more; it is part of the work's cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from kvstore_connectors.blend.prompt import top
from kvstore_connectors.blend.selectors.choice import Choice
from kvstore_connectors.blend.selectors.question import Reading
from kvstore_connectors.blend.selectors.trail import Trail

if TYPE_CHECKING:
    from kvstore_connectors.blend.work import Work


@dataclass(frozen=True)
class Relay:
    """A choice that needs no reading, then what the question looks at.

    Parameters
    ----------
    lead : float
        Part of the budget that goes by the first choice, at most.
    by : {"mean", "peak"}
        How attention of the question is measured, as in `Question`.
    """

    name: str = "relay"
    first: Choice = field(default_factory=Trail)
    lead: float = 0.5
    by: Literal["mean", "peak"] = "mean"

    @property
    def reads_question(self) -> bool:
        """Whether choosing computes the question's tokens once more."""
        return True

    def repair(self, work: Work, count: int) -> Iterator[int]:
        prompt = work.prompt
        scores = yield from self.first.scores(work)
        known = top(scores.masked_fill(~prompt.repairable, -torch.inf), int(self.lead * count + 0.5))
        reading = Reading(work, self.by)
        yield from work.steps(work.with_missing(known), watch=reading)
        left = prompt.repairable.clone()
        left[known] = False
        seen = top(reading.scores().masked_fill(~left, -torch.inf), count - len(known))
        if len(seen):
            yield from work.steps(work.with_later(seen))
