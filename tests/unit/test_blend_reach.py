"""How far up a model reads chunks is found out, and no further up is a question repaired."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blend_kit import CHUNKS, QUESTION, SYSTEM, captured, tiny

from kvstore_connectors.blend import Work
from kvstore_connectors.blend import reach as reaching
from kvstore_connectors.blend.capture import assemble
from kvstore_connectors.blend.reach import reach_of
from kvstore_connectors.blend.selectors.planner import SELECTORS
from kvstore_connectors.blend.trial import Sample


def sample(tokens: int = 60) -> Sample:
    ids = torch.randint(0, 90, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    return Sample("made up", SYSTEM, tuple(ids), QUESTION, SYSTEM[:0])


@pytest.mark.parametrize("reads", [1, 2, 3, 6])
def test_layers_that_read_nothing_are_found(reads: int, monkeypatch: Any) -> None:
    model = tiny(num_hidden_layers=6)
    whole = model.attend

    def attend(layer: int, queries: Any, *rest: Any) -> Any:
        out = whole(layer, queries, *rest)
        return out if layer < reads else torch.zeros_like(out)

    monkeypatch.setattr(model, "attend", attend)
    monkeypatch.setattr(reaching, "LEAST", 0.0)
    monkeypatch.setattr(reaching, "LITTLE", 1e-3)  # weights are random: any layer reads about as much as another
    assert reach_of(model, [sample(), sample(44)]) == reads


def test_all_layers_where_nothing_can_be_told(monkeypatch: Any) -> None:
    model = tiny()
    monkeypatch.setattr(reaching, "LEAST", 1e9)
    assert reach_of(model, [sample()]) == model.layers
    monkeypatch.setattr(reaching, "LEAST", 0.0)
    assert reach_of(model, [sample(9)]) == model.layers  # too short to say something again
    assert reach_of(model, []) == model.layers


@pytest.mark.parametrize(("measured", "counts"), [(None, 4), (0, 3), (3, 3), (4, 4), (99, 4)])
def test_what_is_known_too_late_is_not_gone_by(measured: int | None, counts: int) -> None:
    """Whether something is asked shows in the middle of the layers."""
    model = tiny()
    work = Work(model, *assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION), reach=measured)
    assert (model.layers, work.reach) == (4, counts)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_more_tokens_in_fewer_layers_cost_the_same(share: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("kvstore_connectors.blend.selectors.relay.by_words", lambda *_: 1.0)
    model = tiny()
    costs, changed = [], []
    for reach in (None, 3):
        parts = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
        work = Work(model, *parts, asked=True, reach=reach)
        for _ in work.repair(SELECTORS["relay"], share):
            pass
        costs.append(work.cost)
        changed.append(int((work.changed & work.prompt.repairable).sum()))
    one = 1 / sum(map(len, CHUNKS))
    assert costs[0] - one <= costs[1] <= costs[0]
    assert changed[1] == min(changed[0] * 4 // 3, sum(map(len, CHUNKS)))


def test_words_that_lead_to_less_than_could_be_saved_are_enough(monkeypatch: Any) -> None:
    monkeypatch.setattr("kvstore_connectors.blend.selectors.relay.by_words", lambda *_: 1.0)
    model = tiny()
    parts = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    work = Work(model, *parts, reach=3)
    count = int(0.3 * work.prompt.reused + 0.5)
    lit = work.prompt.repairable.nonzero()[-count - 1 :, 0]
    light = torch.full((len(work.prompt.ids),), -torch.inf).index_fill(0, lit, 1.0)
    monkeypatch.setattr("kvstore_connectors.blend.selectors.relay.Trail.scores", lambda *_: (yield from ()) or light)
    for _ in work.repair(SELECTORS["relay"], 0.3):
        pass
    assert work.asked
    assert (work.changed & work.prompt.repairable).nonzero()[:, 0].tolist() == lit.tolist()
