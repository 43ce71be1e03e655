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
tokens: a name of two tokens is rarer than each of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.selectors.choice import Choice

if TYPE_CHECKING:
    from kvstore_connectors.blend.prompt import Prompt
    from kvstore_connectors.blend.work import Work

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
    rest: float = 0.1

    def scores(self, work: Work) -> Generator[int, None, torch.Tensor]:
        yield from ()
        prompt = work.prompt
        if repr(self) not in work.notes:
            words = _Words(prompt, self.single)
            found = torch.tensor(self._needed(self._light(prompt, words), words), device=prompt.ids.device)
            work.notes[repr(self)] = found.masked_fill(found <= 0, -torch.inf)
        return work.notes[repr(self)]

    def _light(self, prompt: Prompt, words: _Words) -> list[float]:
        lit = [0.0] * len(words.ids)
        for asked in prompt.question.tolist():
            for there in words.places(asked):
                lit[there] = max(lit[there], words.match(asked, there))
        total = lit = self._spread(lit, words.owner)
        for _ in range(self.hops):
            lit = self._spread(self._hop(lit, words), words.owner)
            total = [max(pair) for pair in zip(total, lit, strict=True)]
        return total

    def _needed(self, light: list[float], words: _Words) -> list[float]:
        """Light where something earlier in another chunk has not been seen, and around there; a little of the rest."""
        owner = words.owner
        needed = [0.0] * len(light)
        for places in words.repeated():
            for at, here in enumerate(places):
                if light[here] >= FAINT:
                    before = [words.match(there, here) for there in places[:at] if owner[there] != owner[here]]
                    needed[here] = max([needed[here], *(light[here] * match for match in before)])
        ahead = _fading(needed, self.ahead, lambda i, j: owner[i] == owner[j])
        back = _fading(needed[::-1], self.back, lambda i, j: owner[-1 - i] == owner[-1 - j])[::-1]
        rows = zip(ahead, back, self._over_seams(light, owner), light, owner, strict=True)
        return [max(parts) + self.rest * lit if chunk >= 0 else 0.0 for *parts, lit, chunk in rows]

    def _over_seams(self, light: list[float], owner: list[int]) -> list[float]:
        """Light that the end of a chunk throws on the next one's beginning."""
        over = [0.0] * len(light)
        for start in range(1, len(owner)):
            if owner[start - 1] < 0 or owner[start - 1] == owner[start] or owner[start] < 0:
                continue
            end = range(max(0, start - self.ahead), start)
            thrown = max(light[i] * (1 - (start - i) / self.ahead) for i in end)
            for at in range(start, min(len(owner), start + self.seam)):
                if owner[at] == owner[start]:
                    over[at] = max(over[at], thrown * (1 - (at - start) / self.seam))
        return over

    def _hop(self, lit: list[float], words: _Words) -> list[float]:
        passed = [0.0] * len(lit)
        for places in words.repeated():
            for here in places:
                if lit[here] < FAINT:
                    continue
                for there in places:
                    if abs(here - there) > self.back:
                        weight = self.fade if here < there else self.fade * self.backward
                        passed[there] = max(passed[there], weight * lit[here] * words.match(here, there))
        return passed

    def _spread(self, lit: list[float], owner: list[int]) -> list[float]:
        """Light fading linearly with distance: onwards across chunks, backwards within one."""
        out = _fading(lit, self.ahead, lambda _, __: True)
        back = _fading(lit[::-1], self.back, lambda i, j: owner[-1 - i] == owner[-1 - j])[::-1]
        return [
            max(ahead, before) if chunk >= 0 else 0.0 for ahead, before, chunk in zip(out, back, owner, strict=True)
        ]


def _fading(lit: list[float], reach: int, joined: Callable[[int, int], bool]) -> list[float]:
    out, peak, at = [0.0] * len(lit), 0.0, 0
    for i, light in enumerate(lit):
        left = peak * (1 - (i - at) / reach) if joined(at, i) else 0.0
        if light >= left:
            peak, at, left = light, i, light
        out[i] = max(0.0, left)
    return out


class _Words:
    """Where the tokens of the chunks stand, and how rare they and pairs of them are: 1 in one window, 0 in all."""

    def __init__(self, prompt: Prompt, single: float) -> None:
        self.ids: list[int] = prompt.ids.tolist()
        self.owner: list[int] = prompt.chunk_of.tolist()
        body = [i for i, chunk in enumerate(self.owner) if chunk >= 0]
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        for i in body:
            self._places[self.ids[i]].append(i)
        alone, paired = (self._rarity(body, words) for words in ([(t,) for t in self.ids], self._pairs()))
        self._alone = {word: (single * rarity) ** 2 for word, rarity in alone.items()}
        self._paired = {word: rarity**2 for word, rarity in paired.items()}

    def places(self, at: int) -> list[int]:
        """Where in the chunks the token of this position stands."""
        return self._places.get(self.ids[at], [])

    def repeated(self) -> Iterable[list[int]]:
        """Places of each token that stands in several and not too many."""
        return (places for places in self._places.values() if 1 < len(places) <= COMMON)

    def match(self, here: int, there: int) -> float:
        """How telling it is that two equal tokens are equal, with the neighbours that are equal too."""
        ids = self.ids
        found = self._alone[(ids[there],)]
        if min(here, there) > 0 and ids[here - 1] == ids[there - 1]:
            found = max(found, self._paired.get((ids[there - 1], ids[there]), 0.0))
        if max(here, there) + 1 < len(ids) and ids[here + 1] == ids[there + 1]:
            found = max(found, self._paired.get((ids[there], ids[there + 1]), 0.0))
        return found

    def _pairs(self) -> list[tuple[int, ...]]:
        return [*zip(self.ids, self.ids[1:], strict=False), (self.ids[-1],)]

    def _rarity(self, body: list[int], words: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        windows = (body[-1] - body[0]) // WINDOW + 1 if body else 1
        seen: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for i in body:
            seen[words[i]].add((i - body[0]) // WINDOW)
        return {word: math.log(windows / len(where)) / math.log(max(2, windows)) for word, where in seen.items()}
