"""Spreading activation in torch, on any device: what the kernels give, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_gpu.spreading.launch import Spreading

WINDOW = 32
"""Tokens in a window; a word is rare if few windows have it."""

COMMON = 32
"""A token that stands in more places than this links nothing; it bounds the work at this many steps a token."""

FAINT = 0.05
"""Less light than this goes nowhere."""


def needed(ids: Tensor, owner: Tensor, spans: Sequence[tuple[int, int]], how: Spreading) -> Tensor:
    """See `launch.needed`."""
    words = _Words(ids, owner, spans, how)
    total = lit = words.spread(words.asked())
    for _ in range(how.hops):
        lit = words.spread(_hop(lit, words, how))
        total = total.maximum(lit)
    found = _around(total, words, how).float()
    return found.masked_fill_(found <= 0, -torch.inf)


def _hop(lit: Tensor, words: _Words, how: Spreading) -> Tensor:
    here, there, match = words.links(lit)
    back, near = here > there, (here - there).abs() <= how.back
    passed = (lit[here] * match * how.fade).mul_(1 - (1 - how.backward) * back).masked_fill_(near, 0.0)
    return torch.zeros_like(lit).scatter_reduce_(0, there, passed, "amax")


def _around(light: Tensor, words: _Words, how: Spreading) -> Tensor:
    """Light where something earlier in another chunk has not been seen, and around there; a little of the rest."""
    here, there, match = words.links(light, back_only=True)  # light came by the match once already
    missed = (light[here] * match.sqrt_()).mul_(words.owner[there] != words.owner[here])
    need = torch.zeros_like(light).scatter_reduce_(0, here, missed, "amax")
    around = words.ahead.faded(need).maximum(words.back.faded(need)).maximum(_over_seams(light, words, how))
    return around.add_(light, alpha=how.rest).mul_(words.inside)


def _over_seams(light: Tensor, words: _Words, how: Spreading) -> Tensor:
    """Light that the end of a chunk throws on the next one's beginning."""
    start, stop = words.seams.T[:, :, None]
    ending = torch.arange(1, how.ahead + 1, device=light.device)
    behind = torch.arange(how.seam, device=light.device)
    thrown = (light[(start - ending).clamp(min=0)] * (1 - ending / how.ahead)).amax(1, keepdim=True)
    reached = start + behind
    thrown = thrown * (1 - behind / how.seam) * (reached < stop)
    reached.clamp_(max=len(light) - 1)
    return torch.zeros_like(light).scatter_reduce_(0, reached.flatten(), thrown.flatten(), "amax")


class _Fading:
    """Light fading linearly with distance: at each place the brightest that is left of any within reach.

    Parameters
    ----------
    owner : Tensor
        Chunk of each place: light stays in its own.
    reach : int
        Places after which nothing is left: onwards, or, if negative, backwards.
    """

    def __init__(self, owner: Tensor, reach: int) -> None:
        size = abs(reach)
        self._around = (size - 1, 0) if reach > 0 else (0, size - 1)
        left = torch.arange(1, size + 1, dtype=torch.float64, device=owner.device) / size
        there = pad(owner, self._around, value=-1).unfold(0, size, 1)
        self._left = (left if reach > 0 else left.flip(0)) * (there == owner[:, None])

    def faded(self, lit: Tensor) -> Tensor:
        """Of light at each place, what is left at each."""
        return (pad(lit, self._around).unfold(0, len(self._left.T), 1) * self._left).amax(1)


class _Words:
    """Where the tokens of the chunks stand, and how rare they and pairs of them are: 1 in one or two windows, 0 in all.

    Attributes
    ----------
    owner : Tensor of int64, [n]
        Chunk that each token is in; -1 in none.
    inside : Tensor of bool, [n]
        Whether it is in one.
    seams : Tensor of int64, [chunks - 1 at most, 2]
        Begin and end of chunks that stand right behind another.
    ahead, back : _Fading
        Within chunks.
    """

    def __init__(self, ids: Tensor, owner: Tensor, spans: Sequence[tuple[int, int]], how: Spreading) -> None:
        device = ids.device
        self.owner, self.inside = owner, owner >= 0
        self.ahead, self.back = _Fading(owner, how.ahead), _Fading(owner, -how.back)
        self._onwards = _Fading(torch.zeros_like(owner), how.ahead)
        seams = [one for before, one in pairwise(spans) if before[1] == one[0]]
        self.seams = torch.tensor(seams, dtype=torch.int64, device=device).view(-1, 2)
        first, self._asked = spans[0][0], spans[-1][1]
        windows = -(-(self._asked - first) // WINDOW)
        self._places = torch.arange(len(ids), device=device)
        window = ((self._places - first) // WINDOW).masked_fill_(~self.inside, -1)
        self._kinds = kinds = _Kinds.of(ids, window, windows)
        # Pairs by their second token: one more than there are tokens, the first and the last of them with nothing.
        left, right = (pad(kinds.number, side, value=-1) for side in ((1, 0), (0, 1)))
        pairs = _Kinds.of(left * (len(ids) + 1) + right, pad(window, (1, 0), value=-1), windows)
        common = (ids.double().log1p() / ids.max().clamp(min=1).double().log1p()) ** 4
        paired = pairs.rarity**2 * pad(common, (1, 0)).maximum(pad(common, (0, 1)))
        # Of each place its word, the pair that ends with it, and the one that begins: what they are, what they tell.
        self._names = torch.stack([kinds.number, pairs.number[:-1], pairs.number[1:]])
        self._telling = torch.stack([(how.single * kinds.rarity) ** 2 * common, paired[:-1], paired[1:]])

    def asked(self) -> Tensor:
        """How telling each token of the chunks is as one of the question's, with the neighbours it has there, too."""
        there = torch.zeros((3, len(self.owner) + 1), dtype=torch.bool, device=self.owner.device)
        there.scatter_(1, self._names[:, self._asked :], True)
        return (self._telling * there.gather(1, self._names)).amax(0).mul_(self.inside)

    def spread(self, lit: Tensor) -> Tensor:
        """Light fading onwards across chunks, and backwards within one."""
        return self._onwards.faded(lit).maximum(self.back.faded(lit)).mul_(self.inside)

    def links(self, lit: Tensor, back_only: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Every lit token, every place in the chunks where it stands, or only those before, and how well they match.

        Tokens that stand in one place only or in too many are left out. Waits for the device, to know how many.
        """
        kinds = self._kinds
        count = (kinds.nth if back_only else kinds.count) * ((lit >= FAINT) & kinds.links)
        here = self._places.repeat_interleave(count)
        before = count.cumsum(0) - count
        there = kinds.places[torch.arange(len(here), device=lit.device).add_((kinds.first - before)[here])]
        equal = self._names[:, there] == self._names[:, here]
        return here, there, (equal * self._telling[:, here]).amax(0)


@dataclass(frozen=True)
class _Kinds:
    """Which words are equal, where they stand in windows, and how rare they are; of each word, ``[n]``.

    Attributes
    ----------
    number : Tensor
        Of its kind, from 0.
    rarity : Tensor
    places : Tensor
        Of all words by kind, those in windows in order and behind those that are in none.
    first, count : Tensor
        Where in `places` those of its kind begin that are in windows, and their number.
    nth : Tensor
        Which of these it is, where it is one.
    links : Tensor
        Whether these are several, and not too many.
    """

    number: Tensor
    rarity: Tensor
    places: Tensor
    first: Tensor
    count: Tensor
    nth: Tensor
    links: Tensor

    @staticmethod
    def of(words: Tensor, window: Tensor, windows: int) -> _Kinds:
        """Of words, the window that each is counted in, -1 for none, and the number of windows."""
        n = len(words)
        bits, order = n.bit_length(), torch.arange(n, device=words.device)
        ordered = ((words * 2 + (window >= 0) << bits) + order).sort().values  # all different, so in order of places
        places, word = ordered & (1 << bits) - 1, ordered >> bits
        counted, kind = word & 1, word >> 1
        number = _begins(kind).cumsum(0) - 1
        begins = counted * (_begins(kind) | _begins(window[places]))  # in a window: those in none come before
        tally = torch.zeros((3, n), dtype=torch.int64, device=words.device)
        tally.index_add_(1, number, torch.stack([torch.ones_like(counted), counted, begins]))
        whole, count, within = tally
        rarity = (windows / (within - 1).clamp_(min=1)).log_().div_(math.log(max(2, windows))) * (within > 0)
        kinds, nth = torch.empty((2, n), dtype=torch.int64, device=words.device).scatter_(
            1, places.expand(2, n), torch.stack([number, order])
        )
        first, count = (whole.cumsum(0) - count)[kinds], count[kinds]
        return _Kinds(kinds, rarity.double()[kinds], places, first, count, nth - first, (count > 1) & (count <= COMMON))


def _begins(values: Tensor) -> Tensor:
    """Whether each differs from the one before."""
    return pad(values[1:] != values[:-1], (1, 0), value=True)
