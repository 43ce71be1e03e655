"""What recomputed tokens tell of those behind them: how it gets into a blend."""

from __future__ import annotations

import pytest
import torch
from blend_kit import QUESTION, SYSTEM, captured, kl, tiny, words
from torch import Tensor

from kvstore.errors import InternalError
from kvstore_connectors.blend import Capture, LayerKV, Prompt, Span, Work
from kvstore_connectors.blend.capture import assemble
from kvstore_connectors.blend.carried import carried_from
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.recompute import Pass, prefill
from kvstore_connectors.blend.selectors.unseen import unseen

torch.set_grad_enabled(False)


def shifted(model: Llama, prompt: Prompt, exact: list[LayerKV]) -> list[LayerKV]:
    """Exact KV, but that all tokens of a chunk are off the same way, as far as they have not seen what is before."""
    made, share = torch.Generator().manual_seed(5), unseen(prompt)[:, None, None]
    table = model.rotary.table(torch.arange(len(prompt.ids)))
    cache = []
    for held in exact:
        keys, values = held.keys.clone(), held.values.clone()
        for chunk in range(len(prompt.spans)):
            inside = (prompt.chunk_of == chunk)[:, None, None]
            off = torch.randn((2, 1, *keys.shape[1:]), generator=made)
            keys += inside * model.rotary.turn(share * off[0], table)
            values += inside * share * off[1]
        cache.append(LayerKV(keys, values))
    return cache


def away(cache: list[LayerKV], exact: list[LayerKV], rows: Tensor) -> float:
    """Distance of the cached rows from the exact ones."""
    pairs = [
        (mine, theirs)
        for a, b in zip(cache, exact, strict=True)
        for mine, theirs in ((a.keys, b.keys), (a.values, b.values))
    ]
    return sum(float((mine[rows] - theirs[rows]).square().sum()) for mine, theirs in pairs) ** 0.5


def test_chunks_that_are_off_alike_are_brought_back() -> None:
    model, ids = tiny(), words(150, 3)
    prompt = Prompt(ids, (Span(10, 70, Capture.ISOLATED), Span(70, 140, Capture.SYSTEM)))
    hidden, exact = prefill(model, ids)
    want, found = model.logits(hidden[-10:]), []
    for carries in (False, True):
        work, rows = Work(model, prompt, shifted(model, prompt, exact)), torch.arange(10, 140, 3)
        for _ in work.steps(work.with_missing(rows), carries=carries):
            pass
        left = torch.cat([torch.arange(41, 70, 3), torch.arange(101, 140, 3)])
        found.append((away(list(work.cache), exact, left), kl(want, model.logits(work.hidden[-10:]))))
    (off, divergence), (off_carried, divergence_carried) = found
    assert off_carried < 0.7 * off
    assert divergence_carried < 0.7 * divergence


def test_what_is_exact_is_left_and_so_is_what_stands_before() -> None:
    model = tiny()
    ids = words(60, 3)
    prompt = Prompt(ids, (Span(4, 20, Capture.EXACT), Span(20, 40, Capture.SYSTEM), Span(41, 55, Capture.ISOLATED)), 4)
    _, exact = prefill(model, ids)
    cache = [LayerKV(held.keys + 1, held.values + 1) for held in exact]
    rows = torch.tensor([5, 26, 27, 40, 47, *range(55, 60)])
    before = [LayerKV(held.keys.clone(), held.values.clone()) for held in cache]
    Pass(model, ids, cache, rows, carried=carried_from(prompt, model.rotary, rows)).run()
    moved = {
        at
        for old, new in zip(before, cache, strict=True)
        for at in (old.keys != new.keys).flatten(1).any(1).nonzero()[:, 0].tolist()
    }
    assert moved == {*rows.tolist(), *range(28, 40), *range(48, 55)}


@pytest.mark.parametrize("mode", ["isolated", "system", "live"])
def test_nothing_behind_a_position_changes_it(mode: str) -> None:
    """Other tokens, other KV, other rows to recompute behind it: up to there everything stays the same."""
    model, found = tiny(), []
    for change in (False, True):
        prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
        ids, rows, cut = prompt.ids.clone(), [7, 12, 13, 20, 21, 30, *range(41, 47)], 24
        if change:
            ids[cut:] = (ids[cut:] + 1) % 90
            rows.insert(5, 26)
            for held in cache:
                held.keys[cut:], held.values[cut:] = held.keys[cut:] + 1, held.values[cut:] - 1
        at = torch.tensor(rows)
        done = Pass(model, ids, cache, at, carried=carried_from(prompt, model.rotary, at)).run()
        found.append((done.hidden[at < cut], torch.stack([torch.cat([h.keys[:cut], h.values[:cut]]) for h in cache])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_rows_that_may_change_tell_nothing() -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    with pytest.raises(InternalError, match="rows that may change"):
        next(Work(model, prompt, cache).steps(prompt.missing, narrow=lambda *_: None, carries=True))
