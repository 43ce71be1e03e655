"""What `auto` is: repair where words lead, read the question over that, repair what it looks at and what is missing.

Three hints, none of which computes anything over the chunks, are put together.

- Equal rare words (`trail`) show the way from chunk to chunk, also where attention can not: what a first chunk points
  to in a second is looked at only when both have been repaired. Part of the budget goes by them, before anything is
  read.
- Attention of the question (ProphetKV), by the size of the values that it fetches: a place that is looked at for want
  of a better one has small values, and repairing it changes nothing. It is read with the first part repaired, and with
  the first token of every isolated chunk: that one is a sink only because it stood first, and all of these together
  would draw half of the attention.
- What a token has not seen (`unseen`): where attention and ignorance meet, reuse hurts.

A fact of which one half is repaired can be worse than one of which nothing is, so a token also counts by those around.
The first part and the reading are one pass, so reading costs the question's tokens once more and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from kvstore_connectors.blend.prompt import Capture, brought, top
from kvstore_connectors.blend.selectors.question import Reading
from kvstore_connectors.blend.selectors.trail import Trail
from kvstore_connectors.blend.selectors.unseen import unseen

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Work

NEAR = 3
"""Tokens on either side that count as those around."""


@dataclass(frozen=True)
class Relay:
    """Words first, then what the question looks at, where most is missing.

    Parameters
    ----------
    lead : float
        Part of the budget that goes by words alone.
    light : float
        How much more a token counts that the words light up fully, against one they do not lead to.
    """

    name: str = "relay"
    lead: float = 0.5
    light: float = 10.0

    @property
    def reads_question(self) -> bool:
        """Whether choosing computes the question's tokens once more."""
        return True

    def repair(self, work: Work, count: int) -> Iterator[int]:
        prompt = work.prompt
        light = (yield from Trail().scores(work)).masked_fill(~prompt.repairable, -torch.inf)
        sinks = false_sinks(prompt)
        first = top(light.masked_fill(sinks, torch.inf), min(count, int(self.lead * count + 0.5) + int(sinks.sum())))
        reading = Reading(work, "value")
        yield from work.steps(work.with_missing(first), watch=reading)
        needed = (reading.scores() * unseen(prompt) * (1 + self.light * light.clamp(min=0))).sqrt()
        around = avg_pool1d(needed[None], 2 * NEAR + 1, 1, NEAR, count_include_pad=False)[0]
        left = prompt.repairable.clone()
        left[first] = False
        rest = top((needed + around / 2).masked_fill(~left, -torch.inf), count - len(first))
        if len(rest):
            yield from work.steps(work.with_later(rest))


def false_sinks(prompt: Prompt) -> Tensor:
    """Mask ``[n]`` of the tokens that drew attention because nothing stood before them, where now something does."""
    mask = torch.zeros(len(prompt.ids), dtype=torch.bool)
    mask[[span.start for span in prompt.spans if span.capture is Capture.ISOLATED and span.start]] = True
    return brought(mask, prompt.ids.device)
