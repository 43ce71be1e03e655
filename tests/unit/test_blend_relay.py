"""What the question looks at, what a token has not seen, and how `relay` and the planner choose by them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blend_kit import CHUNKS, QUESTION, SYSTEM, captured, drained, repaired, tiny
from torch import Tensor

from kvstore_connectors.blend import Capture, LayerKV, Prompt, Span, Work, planner
from kvstore_connectors.blend.capture import assemble
from kvstore_connectors.blend.carried import carried_from
from kvstore_connectors.blend.prompt import top
from kvstore_connectors.blend.recompute import Pass
from kvstore_connectors.blend.selectors import relay
from kvstore_connectors.blend.selectors.focused import Focused, focused
from kvstore_connectors.blend.selectors.planner import SELECTORS
from kvstore_connectors.blend.selectors.question import read_question
from kvstore_connectors.blend.selectors.relay import Relay, by_words, looked_beyond
from kvstore_connectors.blend.selectors.unseen import unseen


@pytest.mark.parametrize("mode", ["isolated", "system"])
def test_relay_repairs_false_sinks_before_it_reads(mode: str) -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
    work = Work(model, prompt, cache)
    steps = work.repair(SELECTORS["relay"], 0.5)
    for _ in range(model.layers // 2):
        next(steps)
    sinks = [span.start + i for span in prompt.spans for i in (0, 1)] if mode == "isolated" else []
    assert prompt.false_sinks.tolist() == sinks
    assert (work.changed & prompt.repairable).nonzero()[:, 0].tolist() == sinks
    for _ in steps:
        pass
    count = int(0.5 * prompt.reused + 0.5)
    assert int((work.changed & prompt.repairable).sum()) == count
    most = count + len(prompt.missing) + len(sinks)
    assert (count + len(QUESTION)) / prompt.reused <= work.cost <= most / prompt.reused


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_few_layers_is_repaired_though_little_of_it_is_read_first(layers: int) -> None:
    model = tiny(num_hidden_layers=layers)
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    work = Work(model, prompt, cache)
    for _ in work.repair(SELECTORS["relay"], 0.5):
        pass
    assert int((work.changed & prompt.repairable).sum()) == int(0.5 * prompt.reused + 0.5)


def test_text_goes_on_where_the_last_chunk_is_looked_at() -> None:
    model = tiny()
    prompt, _ = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    for span in prompt.spans:
        looked = torch.full((len(prompt.ids),), 1e-3)
        looked[span.start + 3] = 1
        assert by_words(float(looked_beyond(prompt, looked))) == (span is not prompt.spans[-1])


@pytest.mark.parametrize("lengths", [(4, 4), (6, 6, 6), (6, 6, 6, 6, 6, 6), (20, 5), (5, 20)])
def test_what_is_looked_at_counts_by_how_long_it_is(lengths: tuple[int, ...]) -> None:
    stops = list(itertools.accumulate(lengths))
    spans = tuple(Span(stop - n, stop, Capture.SYSTEM) for n, stop in zip(lengths, stops, strict=True))
    ids = torch.arange(stops[-1] + 3)
    prompt, before, last = Prompt(ids, spans), stops[-2], lengths[-1]

    def beyond(share: float) -> Tensor:
        part = last / stops[-1]
        each = (1 - part) * (1 - share) / before, (part + share * (1 - part)) / last
        return torch.cat([torch.full((before,), each[0]), torch.full((last,), each[1]), torch.ones(3)])

    for share, part in ((0.0, 1), (0.3, 1), (0.36, 0.5), (0.42, 0), (1.0, 0)):
        assert by_words(float(looked_beyond(prompt, beyond(share)))) == part
    assert by_words(float(looked_beyond(prompt, torch.zeros(len(ids))))) == 0


def test_a_single_chunk_is_all_that_can_be_looked_at() -> None:
    prompt = Prompt(torch.arange(12), (Span(2, 9, Capture.ISOLATED),))
    assert by_words(float(looked_beyond(prompt, torch.rand(12)))) == 0


def followed(prompt: Prompt, count: int) -> Tensor:
    """What `trail` would repair."""
    model = tiny()
    again, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    light = drained(SELECTORS["trail"].scores(Work(model, again, cache)))  # type: ignore[attr-defined]
    return top(light.masked_fill(~prompt.repairable, -torch.inf), count)


@pytest.mark.parametrize("reach", [None, 1, 3])
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("said", [(1.0,), (0.5, 1.0), (0.0, 0.5), (0.0, 0.0)])
def test_relay_goes_by_words_where_something_is_asked(
    said: tuple[float, ...], guess: bool, reach: int | None, monkeypatch: Any
) -> None:
    """Seen in the middle, reading ends there, else at three quarters; rightly guessed, one pass does all. What is asked
    is repaired as far as the model reads, which is more than half of its layers, and as many more tokens."""
    answers = iter(said)
    monkeypatch.setattr(relay, "by_words", lambda *_: next(answers))
    model, passes = tiny(), []
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)

    class Seen(Work):
        def steps(self, rows: Any, **how: Any) -> Iterator[int]:
            for layer in super().steps(rows, **how):
                passes.append((len(self.rows), layer))
                yield layer

    work, count = Seen(model, prompt, cache, asked=guess, reach=reach), int(0.3 * prompt.reused + 0.5)
    for _ in work.repair(SELECTORS["relay"], 0.3):
        pass
    assert work.asked == (len(said) == 1)
    reached = model.layers if reach is None else 3
    many = count * model.layers // reached
    if work.asked:
        count = many
    chosen = (work.changed & prompt.repairable).nonzero()[:, 0]
    assert len(chosen) == count
    assert set(followed(prompt, int(said[-1] * count)).tolist()) <= set(chosen.tolist())
    assert (chosen.tolist() == followed(prompt, count).tolist()) is (said[-1] == 1)
    missing, half, most = len(prompt.missing), model.layers // 2, model.layers * 3 // 4
    repairing = [(missing + count * (not work.asked or i < reached), i) for i in range(model.layers)]
    reading = [(missing, layer) for layer in range(half + 1 if work.asked else max(most, half + 1))]
    if guess:
        reading[: half + 1] = [(missing + many, layer) for layer in range(half + 1)]
    assert passes == (repairing if guess and work.asked else reading + repairing)


def test_relay_reads_alone_where_words_do_not_take_the_whole_budget(monkeypatch: Any) -> None:
    model = tiny()
    nowhere = torch.full((len(SYSTEM) + sum(map(len, CHUNKS)) + len(QUESTION),), -torch.inf)
    monkeypatch.setattr(relay.Trail, "scores", lambda *_: (yield from ()) or nowhere)
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    work, read = Work(model, prompt, cache, asked=True), max(model.layers * 3 // 4, model.layers // 2 + 1)
    steps = work.repair(SELECTORS["relay"], 0.3)
    for _ in range(read):
        next(steps)
        assert not bool((work.changed & prompt.repairable).any())
    assert len(list(steps)) == model.layers
    assert int((work.changed & prompt.repairable).sum()) == int(0.3 * prompt.reused + 0.5)


@pytest.mark.parametrize("reach", [None, 3])
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5, 0.0])
def test_what_relay_repairs_is_what_one_pass_leaves(
    part: float, guess: bool, reach: int | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(relay, "by_words", lambda *_: part)
    model = tiny()
    parts = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    work = Work(model, *parts, asked=guess, reach=reach)
    for _ in work.repair(SELECTORS["relay"], 0.4):
        pass
    logits = model.logits(work.hidden[-len(QUESTION) :])
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    rows = work.changed.nonzero()[:, 0]
    carried = carried_from(prompt, model.rotary, rows)
    only = {"reach": reach, "beyond": prompt.missing} if work.asked and reach else {}
    once = Pass(model, prompt.ids, cache, rows, carried=carried, **only).run()
    torch.testing.assert_close(logits, model.logits(once.hidden[-len(logits) :]), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(work.cache, cache, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-5, atol=1e-5)


def test_relay_prefers_what_has_not_been_seen(monkeypatch: Any) -> None:
    """Of the places that text which goes on looks at alike, the first ones of a chunk are repaired."""
    monkeypatch.setattr(relay, "by_words", lambda *_: 0.0)
    model = tiny()
    _, work = repaired(model, "system", Relay(light=0.0), 0.3)
    _, flat = repaired(model, "system", SELECTORS["question"], 0.3)
    share = unseen(work.prompt)
    chosen, by_attention = (one.changed & one.prompt.repairable for one in (work, flat))
    assert float(share[chosen].mean()) > float(share[by_attention].mean())


@pytest.mark.parametrize("mode", ["isolated", "system", "live"])
def test_unseen_falls_within_a_chunk_and_grows_with_what_is_before_it(mode: str) -> None:
    model = tiny()
    prompt, _ = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
    share = unseen(prompt)
    assert (share[prompt.chunk_of < 0] == 0).all()
    assert (share[~prompt.repairable] == 0).all()
    for span in prompt.spans[1:]:
        inside = share[span.start : span.stop]
        missing = span.start - (0 if mode == "isolated" else len(SYSTEM))
        assert inside.tolist() == pytest.approx(
            [1 - math.log(1 + t) / math.log(1 + t + missing) for t in range(len(inside))]
        )
        assert inside[0] == 1
        assert (inside.diff() < 0).all()
    seconds = torch.stack([share[span.start + 1] for span in prompt.spans])
    assert (seconds.diff() > 0).all()


def test_values_count_where_the_question_looks() -> None:
    """Attention that fetches nothing is no reason to repair: values of length 0 score 0, twice the length twice."""
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    for held in cache:
        held.values[20] = 0
    work = Work(model, prompt, cache)
    drained(read_question(work, "value"))
    drained(read_question(work, "mean"))
    assert work.notes["value"][20] == 0
    assert work.notes["mean"][20] > 0
    others = torch.arange(len(SYSTEM), int(prompt.question[0]))
    assert (work.notes["value"][others[others != 20]] > 0).all()


def test_the_largest_gap_parts_what_is_looked_at() -> None:
    assert focused(torch.tensor([0.1, 3.0, 0.2, 2.5])) == {1, 3}
    assert focused(torch.tensor([1.0])) == {0}
    assert focused(torch.tensor([1.0, 1.0])) == {0}


@pytest.mark.parametrize("steady", [1, 2, 9])
def test_chunks_that_are_not_looked_at_are_left_as_they_were(steady: int) -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    before = [LayerKV(held.keys.clone(), held.values.clone()) for held in cache]
    work = Work(model, prompt, cache)
    seen = set[int]()
    for _ in work.repair(Focused(SELECTORS["question"], "focused", steady), 0.9):  # type: ignore[arg-type]
        seen |= set(prompt.chunk_of[work.rows].tolist())
    left = set(prompt.chunk_of[work.rows].tolist())
    assert (left == seen) == (steady == 9)  # of four layers, nine never agree
    for index, span in enumerate(prompt.spans):
        if index not in left:
            rows = slice(span.start, span.stop)
            assert torch.equal(cache[-1].values[rows], before[-1].values[rows])
    assert torch.equal(work.rows[-len(QUESTION) :], prompt.question)


def test_the_planner_reads_the_question_where_one_is_asked() -> None:
    model = tiny()
    chosen = {}
    for mode in ("isolated", "live"):
        for asked in (QUESTION, QUESTION[:1]):
            prompt, _ = assemble(model, model.rotary, SYSTEM, captured(model, mode), asked)
            chosen[mode, len(asked)] = planner(prompt).name
    assert chosen == {
        ("isolated", 6): "relay", ("live", 6): "relay", ("isolated", 1): "unseen", ("live", 1): "external"
    }  # fmt: skip
