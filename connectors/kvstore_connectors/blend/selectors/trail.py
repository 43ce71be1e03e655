"""Recompute what the question's words lead to, from chunk to chunk: found in the token ids alone, at no cost.

What crosses chunks crosses at names. A question names somebody; the chunk that tells of him names a company; the chunk
that tells of the company answers. Attention of the question shows the first of these steps but hardly the second, since
the tokens of the second chunk have not seen the first yet: that is what repair is for. The ids show both. Rare words of
the question light up where they stand in the chunks; light spreads over the words around, and on into the next chunk,
since a chunk often begins with what the last one ended with; and from every lit rare word it passes to the places where
that word stands again. (Spreading activation, Collins and Loftus 1975; over passages, HippoRAG 2024.)

Light shows the way; what has to be computed again is less. Of two places with the same word only the later one can see
the other, and has not, if they are in different chunks. So tokens count that are lit and have an equal one in an
earlier chunk, and those that light came to over a seam, with the words around them; what is lit besides comes last.

How rare a word is, is counted in the chunks themselves, in windows of `WINDOW` tokens, for tokens and for pairs of
tokens: a name of two tokens is rarer than each of them. A word that stands in one other window only is as rare as a
link can be. In a few hundred tokens "of the" is rare, too, so it counts how common a token is in the language:
vocabularies number tokens in the order in which they were merged, common ones first.

Everything is arrays over the prompt's positions, on the host: a prompt of 32,000 tokens takes some milliseconds. In a
thread beside the one that asks for chunks it is no sooner there: each step is too short to let the interpreter go for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore_connectors.blend.prompt import brought
from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Work

Light = NDArray[np.float64]
Places = NDArray[np.int64]

WINDOW = 32
"""Tokens in a window; a word is rare if few windows have it."""

COMMON = 32
"""A token that stands in more places than this links nothing; it bounds the work at this many steps a token."""

FAINT = 0.05
"""Less light than this goes nowhere."""


@dataclass(frozen=True)
class Trail(Choice):
    """Spreading activation from the question over equal rare tokens.

    Parameters
    ----------
    hops : int
        How often light passes from a word to where it stands again.
    ahead, back : int
        Tokens over which light fades to nothing behind and before a lit token, and need around one that needs repair.
    fade : float
        What is left of light after a hop.
    single : float
        Weight of a token that matches without its neighbours, against a pair.
    backward : float
        Weight of hops to earlier places, whose tokens cannot see the later ones.
    seam : int
        Tokens at the beginning of a chunk over which light from the end of the one before fades.
    rest : float
        Weight of light where nothing is missing.
    """

    name: str = "trail"
    hops: int = 2
    ahead: int = 16
    back: int = 8
    fade: float = 0.9
    single: float = 0.5
    backward: float = 0.6
    seam: int = 32
    rest: float = 0.3

    def scores(self, work: Work) -> Generator[int, None, torch.Tensor]:
        yield from ()
        if repr(self) not in work.notes:
            words = _Words(work.prompt, self.single)
            found = self._needed(self._light(words), words).astype(np.float32)
            found[found <= 0] = -np.inf
            work.notes[repr(self)] = brought(torch.from_numpy(found), work.prompt.ids.device)
        return work.notes[repr(self)]

    def _light(self, words: _Words) -> Light:
        total = lit = self._spread(words.asked(), words)
        for _ in range(self.hops):
            lit = self._spread(self._hop(lit, words), words)
            total = np.maximum(total, lit)
        return total

    def _needed(self, light: Light, words: _Words) -> Light:
        """Light where something earlier in another chunk has not been seen, and around there; a little of the rest."""
        owner, needed = words.owner, np.zeros_like(light)
        here, there, match = words.links(light, back_only=True)  # light came by the match once already
        np.maximum.at(needed, here, np.where(owner[there] != owner[here], light[here] * np.sqrt(match), 0.0))
        parts = (words.faded(needed, self.ahead), words.faded_back(needed, self.back), self._over_seams(light, words))
        return np.where(owner >= 0, np.maximum.reduce(parts) + self.rest * light, 0.0)

    def _over_seams(self, light: Light, words: _Words) -> Light:
        """Light that the end of a chunk throws on the next one's beginning."""
        starts, stops = words.spans[1:][words.spans[1:, 0] == words.spans[:-1, 1]].T[:, :, None]
        before, behind = np.arange(self.ahead) + 1, np.arange(self.seam)
        thrown = (light[np.maximum(starts - before, 0)] * (1 - before / self.ahead)).max(1, keepdims=True)
        reached = starts + behind
        inside = reached < stops
        over = np.zeros_like(light)
        over[reached[inside]] = (thrown * (1 - behind / self.seam))[inside]
        return over

    def _hop(self, lit: Light, words: _Words) -> Light:
        passed = np.zeros_like(lit)
        here, there, match = words.links(lit)
        weight = np.where(here < there, self.fade, self.fade * self.backward)
        np.maximum.at(passed, there, np.where(abs(here - there) > self.back, weight * lit[here] * match, 0.0))
        return passed

    def _spread(self, lit: Light, words: _Words) -> Light:
        """Light fading linearly with distance: onwards across chunks, backwards within one."""
        spread = np.maximum(_fading(lit, np.arange(len(lit)), self.ahead), words.faded_back(lit, self.back))
        return np.where(words.owner >= 0, spread, 0.0)


def _fading(lit: Light, place: Places, reach: int) -> Light:
    """What each light leaves at the places behind it, until one shines at least as bright as what is left there.

    One by one that is a walk; here all are compared at once, each with the last before it that seems to outshine, until
    nothing changes. What is right stays right, and the rest shrinks quickly: some eight rounds.
    """
    shining = lit > 0
    shining[0] = True  # what is before the first is dark
    at = np.flatnonzero(shining)
    light, where = lit[at], place[at]
    number = np.arange(len(at))
    behind, last = np.maximum(number - 1, 0), np.zeros_like(number)
    outshines = np.append(True, light[1:] >= light[:-1] * (1 - np.diff(where) / reach))
    while True:
        np.maximum.accumulate((number * outshines)[:-1], out=last[1:])
        moved = np.flatnonzero(last != behind)
        if not len(moved):
            break
        behind[moved] = before = last[moved]
        outshines[moved] = light[moved] >= light[before] * (1 - (where[moved] - where[before]) / reach)
    over = np.diff(at[outshines], append=len(lit))
    left = np.repeat(light[outshines], over) * (1 - (place - np.repeat(where[outshines], over)) / reach)
    return np.maximum(left, 0.0)


class _Words:
    """Where the tokens of the chunks stand, and how rare they and pairs of them are: 1 in one or two windows, 0 in all.

    Attributes
    ----------
    spans : ndarray of int, [chunks, 2]
    owner : ndarray of int, [n]
        Chunk that each token is in; -1 in none.
    """

    def __init__(self, prompt: Prompt, single: float) -> None:
        ids = prompt.host_ids.numpy()
        self.spans = np.array([(span.start, span.stop) for span in prompt.spans], np.int64).reshape(-1, 2)
        self.owner = prompt.host_chunk_of.numpy()
        start = self.spans.min(initial=len(ids))
        window = np.where(self.owner >= 0, (np.arange(len(ids)) - start) // WINDOW, -1)
        apart = np.cumsum(_begins(self.owner)) * len(ids)
        self._place = np.arange(len(ids)) + apart  # so far from each other that no light passes between chunks
        self._kind, rarity, self._sorted, distinct = _kinds(ids, window)
        telling = ((np.log1p(distinct) / np.log1p(ids.max(initial=1))) ** 4)[self._kind]
        self._alone = (single * rarity) ** 2 * telling
        # Pairs by their second token: one more than there are tokens, the first and the last of them with nothing.
        pairs = np.append(-1, self._kind) * (len(ids) + 1) + np.append(self._kind, -1)
        self._pair, rarity, _, _ = _kinds(pairs, np.append(-1, window))
        self._paired = rarity**2 * np.maximum(np.append(0, telling), np.append(telling, 0))
        count = np.bincount(self._kind[self._sorted], minlength=len(ids))
        self._count, self._first = count[self._kind], (np.cumsum(count) - count)[self._kind]
        self._nth = np.empty_like(self.owner)
        self._nth[self._sorted] = np.arange(len(self._sorted)) - self._first[self._sorted]
        self._question = slice(self.spans.max(initial=0), None)

    def asked(self) -> Light:
        """How telling each token of the chunks is as one of the question's, with the neighbours it has there, too."""
        asked, n = self._question, len(self.owner)
        lit = self._alone * _among(self._kind, self._kind[asked])
        for pair, telling in ((self._pair[:n], self._paired[:n]), (self._pair[1:], self._paired[1:])):
            lit = np.maximum(lit, telling * _among(pair, pair[asked]))
        return np.where(self.owner >= 0, lit, 0.0)

    def faded(self, lit: Light, reach: int) -> Light:
        """Light fading onwards within its chunk."""
        return _fading(lit, self._place, reach)

    def faded_back(self, lit: Light, reach: int) -> Light:
        """Light fading backwards within its chunk."""
        return _fading(lit[::-1], -self._place[::-1], reach)[::-1]

    def links(self, lit: Light, back_only: bool = False) -> tuple[Places, Places, Light]:
        """Every lit token, every place in the chunks where it stands, or only those before, and how well they match.

        Tokens that stand in one place only or in too many are left out.
        """
        linked = np.flatnonzero((lit >= FAINT) & (self._count > 1) & (self._count <= COMMON))
        count = (self._nth if back_only else self._count)[linked]
        here = np.repeat(linked, count)
        there = self._sorted[np.repeat(self._first[linked] - np.cumsum(count) + count, count) + np.arange(len(here))]
        match = np.repeat(self._alone[linked], count)
        for pair, telling in ((self._pair, self._paired), (self._pair[1:], self._paired[1:])):
            equal = pair[there] == np.repeat(pair[linked], count)
            match = np.maximum(match, equal * np.repeat(telling[linked], count))
        return here, there, match


def _kinds(words: Places, window: Places) -> tuple[Places, Light, Places, Places]:
    """What is equal, and how rare: of each word the number of its kind and the rarity; places in windows, by kind; the
    words of the kinds.

    Parameters
    ----------
    words : ndarray of int, [n]
    window : ndarray of int, [n]
        In which window each is counted; -1 in none.
    """
    bits = len(words).bit_length()
    ordered = np.sort(words << bits | np.arange(len(words)))  # all different: equal words stay in order
    place, word = ordered & (1 << bits) - 1, ordered >> bits
    begins = _begins(word)
    number = np.cumsum(begins) - 1
    counted = window[place] >= 0
    kind, at = number[counted], place[counted]
    first = _begins(kind) | _begins(window[at])
    within = np.bincount(kind[first], minlength=number[-1] + 1)
    windows = max(1, window.max() + 1)
    rarity = np.log(windows / np.maximum(within - 1, 1)) / np.log(max(2, windows))  # in how many others, here besides
    kinds = np.empty_like(number)
    kinds[place] = number
    return kinds, np.where(within > 0, rarity, 0.0)[kinds], at, word[begins]


def _begins(values: Places) -> NDArray[np.bool_]:
    """Whether each differs from the one before."""
    begins = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins


def _among(kinds: Places, wanted: Places) -> NDArray[np.bool_]:
    """Which of these numbers, all below their count and one, are among the wanted."""
    found = np.zeros(len(kinds) + 2, np.bool_)
    found[wanted] = True
    return found[kinds]
