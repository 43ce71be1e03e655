"""`trail` against its definition: the same choices, token by token in plain Python."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_connectors.blend.prompt import Capture, Prompt, Span, top
from kvstore_connectors.blend.selectors.trail import Trail
from kvstore_gpu.spreading import COMMON, FAINT, WINDOW

AHEAD, BACK, FADE, SINGLE, BACKWARD, SEAM, REST, HOPS = 16, 8, 0.9, 0.5, 0.6, 24, 0.3, 2


def defined(prompt: Prompt) -> list[float]:
    """The score of every token, by the words of the module."""
    ids, owner = prompt.ids.tolist(), prompt.chunk_of.tolist()
    body = [i for i, chunk in enumerate(owner) if chunk >= 0]
    places = defaultdict[int, list[int]](list)
    windows = defaultdict[tuple[int, ...], set[int]](set)
    for i in body:
        places[ids[i]].append(i)
        windows[ids[i],].add((i - body[0]) // WINDOW)
        windows[ids[i], ids[i + 1]].add((i - body[0]) // WINDOW)
    count = (body[-1] - body[0]) // WINDOW + 1 if body else 1
    rare = {word: math.log(count / max(1, len(where) - 1)) / math.log(max(2, count)) for word, where in windows.items()}
    telling = ((np.log1p(ids) / np.log1p(max(1, *ids))) ** 4).tolist()
    linked = [some for some in places.values() if 1 < len(some) <= COMMON]

    def match(a: int, b: int) -> float:
        found = (SINGLE * rare[ids[b],]) ** 2 * telling[b]
        if min(a, b) > 0 and ids[a - 1] == ids[b - 1]:
            found = max(found, rare.get((ids[b - 1], ids[b]), 0.0) ** 2 * max(telling[b - 1 : b + 1]))
        if max(a, b) + 1 < len(ids) and ids[a + 1] == ids[b + 1]:
            found = max(found, rare.get((ids[b], ids[b + 1]), 0.0) ** 2 * max(telling[b : b + 2]))
        return found

    def spread(lit: list[float]) -> list[float]:
        fading = zip(faded(lit, AHEAD, lambda *_: True), faded_back(lit, owner), owner, strict=True)
        return [max(ahead, back) if chunk >= 0 else 0.0 for ahead, back, chunk in fading]

    def hop(lit: list[float]) -> list[float]:
        passed = [0.0] * len(ids)
        for a, b in ((a, b) for some in linked for a in some for b in some if lit[a] >= FAINT and abs(a - b) > BACK):
            passed[b] = max(passed[b], (FADE if a < b else FADE * BACKWARD) * lit[a] * match(a, b))
        return passed

    lit = [0.0] * len(ids)
    for asked, there in ((a, b) for a in prompt.question.tolist() for b in places[ids[a]]):
        lit[there] = max(lit[there], match(asked, there))
    light = lit = spread(lit)
    for _ in range(HOPS):
        lit = spread(hop(lit))
        light = [max(pair) for pair in zip(light, lit, strict=True)]
    needed = [0.0] * len(ids)
    for a, b in ((a, b) for some in linked for a in some for b in some if light[b] >= FAINT and a < b):
        if owner[a] != owner[b]:
            needed[b] = max(needed[b], light[b] * math.sqrt(match(a, b)))
    parts = (faded(needed, AHEAD, lambda i, j: owner[i] == owner[j]), faded_back(needed, owner), seams(light, owner))
    return [max(*three) + REST * light[i] if owner[i] >= 0 else 0.0 for i, three in enumerate(zip(*parts, strict=True))]


def faded(lit: list[float], reach: int, joined: Callable[[int, int], bool]) -> list[float]:
    return [
        max(lit[j] * (1 - (i - j) / reach) if joined(j, i) else 0.0 for j in range(max(0, i - reach + 1), i + 1))
        for i in range(len(lit))
    ]


def faded_back(lit: list[float], owner: list[int]) -> list[float]:
    return faded(lit[::-1], BACK, lambda i, j: owner[-1 - i] == owner[-1 - j])[::-1]


def seams(light: list[float], owner: list[int]) -> list[float]:
    over = [0.0] * len(light)
    for start in range(1, len(owner)):
        if 0 <= owner[start - 1] < owner[start]:
            thrown = max(light[i] * (1 - (start - i) / AHEAD) for i in range(max(0, start - AHEAD), start))
            for at in range(start, min(start + SEAM, len(owner))):
                over[at] = thrown * (1 - (at - start) / SEAM) if owner[at] == owner[start] else 0.0
    return over


def scores(prompt: Prompt) -> torch.Tensor:
    steps: Any = Trail().scores(SimpleNamespace(prompt=prompt, notes={}))  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as end:
        next(steps)
    return end.value.value


def drawn(seed: int) -> Prompt:
    """Chunks side by side or with gaps, of few or many different words, some of them computed exactly."""
    rng = np.random.default_rng(seed)
    n, chunks, asked = int(rng.integers(30, 700)), int(rng.integers(1, 8)), int(rng.integers(1, 12))
    few = int(rng.choice([4, 50, 500, 20_000]))
    ids = np.minimum(rng.zipf(1.3, n), few) if rng.random() < 0.4 else rng.integers(0, few, n)
    exact = int(rng.integers(0, 5))
    apart = rng.random() < 0.5
    size = 2 * chunks if apart else chunks + 1
    cuts = np.sort(rng.choice(np.arange(exact, n - asked), size, replace=False)).tolist()
    pairs = zip(cuts[::2], cuts[1::2], strict=True) if apart else pairwise(cuts)
    kinds = [Capture.EXACT if rng.random() < 0.2 else Capture.SYSTEM for _ in cuts]
    spans = tuple(Span(start, stop, kind) for (start, stop), kind in zip(pairs, kinds, strict=False))
    return Prompt(torch.from_numpy(ids.astype(np.int64)), spans, exact)


@pytest.mark.parametrize("seed", range(60))
def test_the_same_as_token_by_token(seed: int) -> None:
    prompt = drawn(seed)
    wanted = torch.tensor(defined(prompt))
    wanted = wanted.masked_fill(wanted <= 0, -torch.inf)
    found = scores(prompt)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for share in (0.02, 0.15, 0.5):
        count = int(share * prompt.reused + 0.5)
        chosen = (top(one.masked_fill(~prompt.repairable, -torch.inf), count) for one in (found, wanted))
        assert torch.equal(*chosen)


def test_all_words_different_but_the_one_that_is_asked() -> None:
    ids = torch.arange(200)
    ids[-1] = ids[150]
    found = scores(Prompt(ids, (Span(0, 100, Capture.SYSTEM), Span(100, 199, Capture.SYSTEM))))
    assert found.argmax() == 150
    assert (found > -torch.inf).nonzero()[:, 0].tolist() == list(range(143, 166))


def test_of_equal_names_in_two_chunks_the_later_one_comes_first() -> None:
    ids = torch.arange(402)
    ids[320:322] = ids[50:52] = torch.tensor([9_001, 9_002])
    ids[-2:] = torch.tensor([9_001, 9_002])
    found = scores(Prompt(ids, tuple(Span(i, i + 99, Capture.ISOLATED) for i in (0, 100, 200, 300))))
    assert found[320:322].min() > 0.3
    assert found[50:52].max() < found[320:322].min() / 2


def test_common_words_of_a_language_lead_nowhere_near_as_far_as_names() -> None:
    """Two pairs of words stand equally often; vocabularies have the common ones first."""
    ids = torch.arange(10_000, 10_402)
    for place in (50, 320, 398):
        ids[place : place + 4] = torch.tensor([300, 301, 40_000, 40_001])[
            [0, 1, 2, 3] if place != 320 else [2, 3, 0, 1]
        ]
    ids[150:152] = torch.tensor([300, 301])
    ids[250:252] = torch.tensor([40_000, 40_001])
    found = scores(Prompt(ids, tuple(Span(i, i + 99, Capture.ISOLATED) for i in (0, 100, 200, 300))))
    assert found[250:252].min() > 3 * found[150:152].max()


def test_nothing_in_chunks_is_nothing_to_choose() -> None:
    assert (scores(Prompt(torch.arange(9), (), exact=3)) == -torch.inf).all()


def test_a_word_that_stands_once_more_links_as_well_in_few_windows_as_in_many() -> None:
    def need(chunks: int) -> float:
        ids = torch.arange(10_000, 10_000 + 32 * chunks + 2)
        ids[[3, 32 * chunks]] = 50_001
        ids[[4, 32 * chunks + 1]] = 50_002
        ids[5], ids[6] = ids[75], ids[76] = 50_003, 50_004
        spans = tuple(Span(32 * i, 32 * i + 32, Capture.SYSTEM) for i in range(chunks))
        return float(scores(Prompt(ids, spans))[76])

    assert need(4) == pytest.approx(need(12))
    assert need(4) > 0.3
