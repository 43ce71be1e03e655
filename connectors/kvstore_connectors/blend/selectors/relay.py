"""What `auto` is: read the question, then repair where words lead, and what is looked at and has not been seen.

Three hints, none of which computes anything over the chunks, are put together.

- Equal rare words (`trail`) show the way from chunk to chunk, also where attention can not: what a first chunk points
  to in a second is looked at only when both have been repaired.
- Attention of the question (ProphetKV), by the size of the values that it fetches: a place that is looked at for want
  of a better one has small values, and repairing it changes nothing. It is read with the first token of every isolated
  chunk repaired: that one is a sink only because it stood first, and all of these together would draw half of it.
- What a token has not seen (`unseen`): where attention and ignorance meet, reuse hurts.

The three are multiplied. Who asks something looks for it in all chunks, and then the budget goes by words alone
as far as they lead, the rest by the product. Text that goes on looks at what is right before it: where the last chunk
has much more of the attention than its part of the text, all goes by the product. In between each gets half: of either,
half costs much less than nothing.

What is asked for is looked up in some layers, and repairing chunks above these changes no answer. Where that is known
(`blend.reach`), questions are repaired up to there, and as many more tokens as that saves.

Which of the two it is shows in the second quarter of the layers, as a rule. Where something is asked and words take the
whole budget, reading ends there; else it goes on to three quarters of the layers, which tell as much as all. One pass
then repairs what was chosen, and the question with it. Where the prompt before asked, this one is believed to ask, too:
words are repaired while the question is read, and if that is so the pass goes on to the end. If not, what words led to
is put back as it was, since half repaired is worse than not at all.

What the repaired tokens differ by is carried on to those behind them (`blend.carried`).

A fact of which one half is repaired can be worse than one of which nothing is, so a token asked for also counts by
those around. Reading costs half of the question's tokens once more, or three quarters, or nothing where it was rightly
believed that something is asked; where it was not, half of the share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from kvstore_connectors.blend.prompt import brought, fetched, top
from kvstore_connectors.blend.selectors.question import Reading
from kvstore_connectors.blend.selectors.trail import Trail
from kvstore_connectors.blend.selectors.unseen import unseen

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Work

NEAR = 3
"""Tokens on either side that count as those around."""

ASKED, GOES_ON = 1 / 3, 0.4
"""Of the attention that the last chunk would not have by its part of the text: up to there something is asked, and from
there on text goes on."""


@dataclass(frozen=True)
class Relay:
    """By words, by attention of the question, and by what has not been seen.

    Parameters
    ----------
    light : float
        How much more a token counts that the words light up fully, against one they do not lead to.
    """

    name: str = "relay"
    light: float = 10.0

    @property
    def reads_question(self) -> bool:
        """Whether choosing computes the question's tokens once more."""
        return True

    def repair(self, work: Work, count: int) -> Iterator[int]:
        prompt, layers = work.prompt, work.model.layers
        half, most = layers // 2, layers * 3 // 4
        light = yield from Trail().scores(work)  # while the first layers are on their way to a device
        sinks = brought(prompt.false_sinks[:count], prompt.ids.device)
        left = prompt.repairable.clone()
        left[sinks] = False
        many, count = count * layers // work.reach - len(sinks), count - len(sinks)

        reading, alone = Reading(work, "value"), work.with_missing(sinks)
        words = top(light.masked_fill(~left, -torch.inf), many)
        full = len(words) >= count
        tries = full and work.asked
        rows = work.with_missing(torch.cat([sinks, words])) if tries else alone
        steps = work.steps(rows, watch=reading, tries=tries, carries=tries, reaches=tries)
        yield from islice(steps, half)
        beyond = fetched(looked_beyond(prompt, reading.scores(range(half // 2, half))))
        yield from islice(steps, 1)  # that a device has something to do until the host knows
        work.asked = full and by_words(float(beyond())) == 1
        if tries and work.asked:
            work.accept()
            reading.stop()
            yield from steps
            return
        if tries:
            work.take_back(alone)
        if not work.asked:
            yield from islice(steps, max(0, most - half - 1))
            looked = reading.scores()
            part = by_words(float(looked_beyond(prompt, looked)))
            words = top(light.masked_fill(~left, -torch.inf), int(part * count))
            left[words] = False
            needed = self._needed(prompt, light, looked, part == 1)
            words = torch.cat([words, top(needed.masked_fill(~left, -torch.inf), count - len(words))])
        rows = work.with_missing(torch.cat([sinks, words]))
        yield from work.steps(rows, carries=True, reaches=work.asked)

    def _needed(self, prompt: Prompt, light: Tensor, looked: Tensor, asked: bool) -> Tensor:
        """How much each position asks for repair."""
        needed = (looked * unseen(prompt) * (1 + self.light * light.clamp(min=0))).sqrt()
        if asked:
            needed += avg_pool1d(needed[None], 2 * NEAR + 1, 1, NEAR, count_include_pad=False)[0] / 2
        return needed


def looked_beyond(prompt: Prompt, looked: Tensor) -> Tensor:
    """How much more the question looks at the last chunk than at others of its length: 0 for no more, 1 for at nothing
    else; not a number where nothing is looked at."""
    last, first = prompt.spans[-1], prompt.spans[0].start
    part = (last.stop - last.start) / sum(span.stop - span.start for span in prompt.spans)
    share = looked[last.start : last.stop].sum() / looked[first : last.stop].sum()
    return (share - part) / (1 - part) if part < 1 else torch.ones_like(share)


def by_words(beyond: float) -> float:
    """Part of the budget that goes by words: all where the question asks, nothing where it is text that goes on.

    Told by `looked_beyond`.
    """
    if beyond <= ASKED:
        return 1.0
    return 0.5 if beyond < GOES_ON else 0.0  # where nothing is looked at at all, too
