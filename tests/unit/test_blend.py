"""Exact properties of selective recomputation, on a tiny random Llama."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blend_kit import BASE, CHUNKS, QUESTION, ROPES, SYSTEM, captured, full, kl, repaired, tiny, usable, words
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore_connectors.blend import Capture, LayerKV, Prompt, Span, Work, movable, move, planner
from kvstore_connectors.blend.attention import attend, runs, scores, segment_masses
from kvstore_connectors.blend.capture import assemble, capture
from kvstore_connectors.blend.influence import Influences
from kvstore_connectors.blend.prompt import top
from kvstore_connectors.blend.recompute import Pass, empty_cache, prefill
from kvstore_connectors.blend.selectors.planner import SELECTORS


@pytest.mark.parametrize("mode", ["isolated", "system", "live"])
def test_all_recomputed_is_full_prefill(mode: str) -> None:
    model = tiny()
    for selector in usable(mode):
        logits, work = repaired(model, mode, selector, 1.0)
        assert kl(full(model), logits) < 1e-6
        exact = len(CHUNKS[0]) if mode == "system" else 0
        assert work.cost == pytest.approx(1 - exact / sum(map(len, CHUNKS)))


@pytest.mark.parametrize("mode", ["isolated", "system", "live"])
def test_repair_helps_and_costs_what_was_asked(mode: str) -> None:
    model = tiny()
    reference = full(model)
    for selector in usable(mode):
        logits, work = repaired(model, mode, selector, 0.8)
        before, none = repaired(model, mode, selector, 0.0)
        if selector.name != "trail":  # which goes by words alone, and to random weights words mean nothing
            assert kl(reference, logits) < kl(reference, before)
        reading = len(work.prompt.missing) / work.prompt.reused if getattr(selector, "reads_question", False) else 0
        assert 0 < work.cost - none.cost <= 0.85 + reading


def test_first_chunk_behind_the_prefix_is_exact() -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system")[:1], QUESTION)
    assert prompt.spans[0].capture is Capture.EXACT
    _, exact = prefill(model, prompt.ids)
    span = slice(prompt.spans[0].start, prompt.spans[0].stop)
    for held, true in zip(cache, exact, strict=True):
        torch.testing.assert_close(held.keys[span], true.keys[span], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(held.values[span], true.values[span], rtol=1e-5, atol=1e-5)
    work = Work(model, prompt, cache)
    for _ in work.repair(planner(prompt), 0.5):
        pass
    whole, _ = prefill(model, prompt.ids)
    assert kl(model.logits(whole[-6:]), model.logits(work.hidden[-6:])) < 1e-6
    assert not work.changed[span].any()


@pytest.mark.parametrize("rope", ROPES)
def test_moved_keys_are_keys_computed_there(rope: str) -> None:
    model = tiny(**ROPES[rope])
    there = torch.arange(200, 212)
    queries, keys, _ = model.qkv(0, model.embed(CHUNKS[0]))
    _, here = model.rope(0, queries, keys, torch.arange(12))
    moved = move(model.rotary, 0, here, torch.arange(12), there)
    torch.testing.assert_close(moved, model.rope(0, queries, keys, there)[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(move(model.rotary, 0, here, there, there), here)
    by_steps = move(model.rotary, 0, move(model.rotary, 0, here, torch.arange(12), there + 7), there + 7, there)
    torch.testing.assert_close(by_steps, moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_all_recomputed_is_full_prefill_for_every_rope(rope: str) -> None:
    model = tiny(**ROPES[rope])
    logits, _ = repaired(model, "isolated", SELECTORS["question"], 1.0)
    assert kl(full(model), logits) < 1e-6


@pytest.mark.parametrize("kept", [0.1, 0.5])
def test_rows_before_and_at_the_check_are_exact(kept: float) -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    for _ in Work(model, prompt, cache).repair(SELECTORS["v-deviation"], kept):
        pass
    _, exact = prefill(model, prompt.ids)
    for layer in (0, 1):
        torch.testing.assert_close(cache[layer].keys, exact[layer].keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache[layer].values, exact[layer].values, rtol=1e-5, atol=1e-5)


def test_nothing_behind_a_position_changes_it() -> None:
    """What two published implementations get wrong: a recomputed token must not see keys behind its own."""
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    rows = torch.tensor([3, 8, 9, 14, 22, 23, 24])
    copies = [[LayerKV(held.keys.clone(), held.values.clone()) for held in cache] for _ in range(2)]
    for held in copies[1]:
        held.keys[15:] = torch.randn_like(held.keys[15:]) * 9
        held.values[15:] = torch.randn_like(held.values[15:]) * 9
    one, other = (Pass(model, prompt.ids, copy, rows).run() for copy in copies)
    assert torch.equal(one.hidden[:4], other.hidden[:4])
    assert not torch.allclose(one.hidden[4:], other.hidden[4:])


def test_runs_as_sequences_are_the_dense_mask() -> None:
    rng = torch.Generator().manual_seed(3)
    queries, keys, values = (torch.randn(30, heads, 16, generator=rng) for heads in (6, 2, 2))
    rows = torch.tensor([0, 1, 5, 6, 7, 20, 29])
    assert runs(rows) == [(0, 2), (5, 8), (20, 21), (29, 30)]
    dense = attend(queries[rows], keys, values, rows, 0.25)
    pieces = []
    for start, stop in runs(rows):  # each run: the stock bottom-right causal mask over the keys up to its end
        causal = torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
        table = torch.einsum("qhd,khd->hqk", queries[start:stop], keys[:stop].repeat_interleave(3, 1)) * 0.25
        weights = table.masked_fill(~causal, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, values[:stop].repeat_interleave(3, 1)).flatten(1))
    torch.testing.assert_close(dense, torch.cat(pieces), rtol=1e-5, atol=1e-5)


def test_segment_masses_are_sums_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_connectors.blend.attention._MASK_ELEMENTS", 400)  # several pieces
    rng = torch.Generator().manual_seed(4)
    queries, keys = torch.randn(20, 6, 16, generator=rng), torch.randn(20, 2, 16, generator=rng)
    segments = [(0, 3), (3, 11), (11, 20)]
    masses = segment_masses(queries, keys, torch.arange(20), 0.25, segments)
    weights = scores(queries, keys, torch.arange(20), 0.25).softmax(-1)
    expected = torch.stack([weights[..., a:b].sum(-1).mean(0) for a, b in segments])
    torch.testing.assert_close(masses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masses.sum(0), torch.ones(20), rtol=1e-5, atol=1e-5)


def test_influence_is_what_the_attention_matrix_says() -> None:
    model = tiny()
    ids = torch.cat([SYSTEM, *CHUNKS, QUESTION])
    spans = [(5, 17), (17, 26), (26, 41)]
    measured, tables = Influences(model, spans), []

    def watch(layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        measured(layer, rows, queries, keys)
        tables.append(scores(queries, keys, rows, model.scale).softmax(-1).mean(0))

    prefill(model, ids, watch=watch)
    weights = torch.stack(tables)  # layer, query, key
    for one in measured.chunks:
        start, stop = one.span
        size = stop - start
        inter = [float(weights[:, start:stop, a:b].sum()) for a, b in one.before]
        assert one.inter.tolist() == pytest.approx(inter, rel=1e-4)
        before = weights[:, start:stop, 5:start].sum(-1).mean(0)
        torch.testing.assert_close(one.external, before, rtol=1e-4, atol=1e-6)
        across = sum(mass / (size * (b - a)) for mass, (a, b) in zip(inter, one.before, strict=True))
        inside = float(weights[:, start:stop, start:stop].sum()) / size**2
        assert one.cci == pytest.approx(1 / (1 + math.exp(-across / inside)), rel=1e-4)
        assert 0.5 <= one.cci < 1
    assert measured.chunks[0].cci == 0.5  # nothing stands before it


def test_chunks_in_another_order_are_the_same_rows_elsewhere() -> None:
    """Values do not know where they stand, and keys differ by their rotation only."""
    model = tiny()
    chunks = captured(model, "isolated")
    order = [2, 0, 1]
    prompt, cache = assemble(model, model.rotary, SYSTEM, chunks, QUESTION)
    other, moved = assemble(model, model.rotary, SYSTEM, [chunks[place] for place in order], QUESTION)
    for place, span in zip(order, other.spans, strict=True):
        first = prompt.spans[place]
        old, new = torch.arange(first.start, first.stop), torch.arange(span.start, span.stop)
        for layer, (a, b) in enumerate(zip(cache, moved, strict=True)):
            assert torch.equal(a.values[old], b.values[new])
            back = move(model.rotary, layer, b.keys[new], new, old)
            torch.testing.assert_close(back, a.keys[old], rtol=1e-5, atol=1e-5)


def test_chunks_do_not_see_each_other() -> None:
    """Without repair, changing one chunk changes no row of another."""
    model = tiny()
    chunks = captured(model, "isolated")
    _, cache = assemble(model, model.rotary, SYSTEM, chunks, QUESTION)
    other = capture(model, words(len(CHUNKS[0]), 99))
    _, changed = assemble(model, model.rotary, SYSTEM, [other, *chunks[1:]], QUESTION)
    for a, b in zip(cache, changed, strict=True):
        assert torch.equal(a.keys[17:], b.keys[17:])
        assert torch.equal(a.values[17:], b.values[17:])


def test_layers_that_come_late_give_the_same_and_failures_end_cleanly() -> None:
    model = tiny()
    for selector in usable("isolated"):
        reference, _ = repaired(model, "isolated", selector, 0.3)
        prompt, whole = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
        waited: list[int] = []
        cache = [
            LayerKV(torch.full_like(held.keys, torch.nan), torch.full_like(held.values, torch.nan)) for held in whole
        ]

        def arrive(layer: int, cache: list[LayerKV] = cache, whole: Any = whole, waited: list[int] = waited) -> None:
            cache[layer].keys.copy_(whole[layer].keys)
            cache[layer].values.copy_(whole[layer].values)
            waited.append(layer)

        work = Work(model, prompt, cache, arrive)
        for _ in work.repair(selector, 0.3):
            pass
        assert waited == [0, 1, 2, 3]
        torch.testing.assert_close(model.logits(work.hidden[-6:]), reference, rtol=0, atol=0)

        def fail(layer: int, arrive: Callable[[int], None] = arrive) -> None:
            if layer == 2:
                raise TimeoutError("layer 2 never came")
            arrive(layer)

        with pytest.raises(TimeoutError, match="layer 2"):
            for _ in Work(model, prompt, cache, fail).repair(selector, 0.3):
                pass


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic NTK"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "LongRoPE"),
        ({"rope_scaling": {"type": "su"}}, "LongRoPE"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "M-RoPE"),
        ({"position_embedding_type": "absolute"}, "absolute"),
        ({"rope_theta": None}, "absolute or unknown"),
    ],
)
def test_what_cannot_be_moved_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    made = {key: value for key, value in (BASE | config).items() if value is not None}
    with pytest.raises(ConfigError, match=reason):
        movable(made)


def test_prompts_that_make_no_sense_are_refused() -> None:
    ids = words(20, 5)
    for spans, exact in (
        ([(2, 2)], 0),
        ([(2, 6), (5, 9)], 0),
        ([(4, 21)], 0),
        ([(2, 6)], 3),
        ([(4, 20)], 0),
    ):
        with pytest.raises(ConfigError):
            Prompt(ids, tuple(Span(a, b, Capture.ISOLATED) for a, b in spans), exact)
    with pytest.raises(ConfigError, match="external mass"):
        Prompt(ids, (Span(0, 4, Capture.LIVE, torch.ones(3)),))
    prompt = Prompt(ids, (Span(0, 4, Capture.LIVE),))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        list(Work(tiny(), prompt, empty_cache(tiny(), ids)).repair(SELECTORS["question"], 1.5))
    with pytest.raises(ConfigError, match="no external mass"):
        list(Work(tiny(), prompt, empty_cache(tiny(), ids)).repair(SELECTORS["external"], 0.5))


def test_ties_go_to_the_lower_position() -> None:
    assert top(torch.tensor([1.0, 3.0, 3.0, -torch.inf, 3.0]), 2).tolist() == [1, 2]
    assert top(torch.tensor([1.0, -torch.inf]), 2).tolist() == [0]
