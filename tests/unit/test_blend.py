"""Exact properties of selective recomputation, on a tiny random Llama."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore_connectors.blend import Capture, LayerKV, Prompt, Selector, Span, Work, movable, move, planner
from kvstore_connectors.blend.attention import attend, column_sums, runs, scores, segment_masses
from kvstore_connectors.blend.capture import Chunk, assemble, capture
from kvstore_connectors.blend.carried import carried_from
from kvstore_connectors.blend.influence import Influences
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.prompt import top
from kvstore_connectors.blend.recompute import Pass, empty_cache, prefill
from kvstore_connectors.blend.selectors import relay
from kvstore_connectors.blend.selectors.focused import Focused, focused
from kvstore_connectors.blend.selectors.planner import SELECTORS
from kvstore_connectors.blend.selectors.question import read_question
from kvstore_connectors.blend.selectors.relay import Relay, by_words, false_sinks
from kvstore_connectors.blend.selectors.unseen import unseen

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "vocab_size": 101,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
}

ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "partial": {"partial_rotary_factor": 0.5},
    "interleaved": {"rope_interleave": True},
    "nope layers": {"no_rope_layers": [0, 1, 0, 1]},
}


def tiny(seed: int = 0, **config: Any) -> Llama:
    """A Llama of random weights whose attention is sharp enough for context to matter."""
    made = BASE | config
    rng = torch.Generator().manual_seed(seed)

    def weight(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * gain / math.sqrt(shape[-1])

    hidden, inner = made["hidden_size"], made["intermediate_size"]
    heads, kv_heads = made["num_attention_heads"] * made["head_dim"], made["num_key_value_heads"] * made["head_dim"]
    tensors = {
        "model.embed_tokens.weight": weight(made["vocab_size"], hidden, gain=7),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(made["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for part, rows, columns in (
            ("self_attn.q_proj", heads, hidden),
            ("self_attn.k_proj", kv_heads, hidden),
            ("self_attn.v_proj", kv_heads, hidden),
            ("self_attn.o_proj", hidden, heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{name}{part}.weight"] = weight(
                rows, columns, gain=2 if part.endswith(("q_proj", "k_proj")) else 1
            )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = torch.ones(hidden)
    return Llama(made, tensors)


def words(count: int, seed: int) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


SYSTEM, CHUNKS, QUESTION = words(5, 1), [words(n, 10 + n) for n in (12, 9, 15)], words(6, 2)


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of KL(p || q), of logits, in float64."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def full(model: Llama) -> Tensor:
    """Logits of the question's rows after full prefill."""
    hidden, _ = prefill(model, torch.cat([SYSTEM, *CHUNKS, QUESTION]))
    return model.logits(hidden[-len(QUESTION) :])


def captured(model: Llama, mode: str) -> list[Chunk]:
    if mode == "isolated":
        return [capture(model, chunk) for chunk in CHUNKS]
    if mode == "system":
        return [capture(model, chunk, SYSTEM) for chunk in CHUNKS]
    return [capture(model, chunk, SYSTEM, [words(8, 40 + i), words(7, 50 + i)]) for i, chunk in enumerate(CHUNKS)]


def repaired(model: Llama, mode: str, selector: Selector, share: float) -> tuple[Tensor, Work]:
    """Logits of the question's rows after repair, and the work."""
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
    work = Work(model, prompt, cache)
    for _ in work.repair(selector, share):
        pass
    asked = work.rows >= int(prompt.question[0])
    return model.logits(work.hidden[asked]), work


def drained(steps: Any) -> Any:
    """Run a generator to its end: what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def usable(mode: str) -> Iterator[Selector]:
    return (selector for selector in SELECTORS.values() if mode == "live" or not selector.name.startswith("external"))


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


@pytest.mark.parametrize("mode", ["isolated", "system"])
def test_relay_repairs_false_sinks_before_it_reads(mode: str) -> None:
    model = tiny()
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
    work = Work(model, prompt, cache)
    steps = work.repair(SELECTORS["relay"], 0.5)
    for _ in range(model.layers // 2):
        next(steps)
    sinks = [span.start for span in prompt.spans] if mode == "isolated" else []
    assert false_sinks(prompt).nonzero()[:, 0].tolist() == sinks
    assert (work.changed & prompt.repairable).nonzero()[:, 0].tolist() == sinks
    for _ in steps:
        pass
    count = int(0.5 * prompt.reused + 0.5)
    assert int((work.changed & prompt.repairable).sum()) == count
    assert (count + len(QUESTION)) / prompt.reused <= work.cost <= (count + len(prompt.missing)) / prompt.reused


def test_text_goes_on_where_the_last_chunk_is_looked_at() -> None:
    model = tiny()
    prompt, _ = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    for span in prompt.spans:
        looked = torch.full((len(prompt.ids),), 1e-3)
        looked[span.start + 3] = 1
        assert by_words(prompt, looked) == (span is not prompt.spans[-1])


@pytest.mark.parametrize("lengths", [(4, 4), (6, 6, 6), (6, 6, 6, 6, 6, 6), (20, 5), (5, 20)])
def test_what_is_looked_at_counts_by_how_long_it_is(lengths: tuple[int, ...]) -> None:
    stops = list(itertools.accumulate(lengths))
    spans = tuple(Span(stop - n, stop, Capture.SYSTEM) for n, stop in zip(lengths, stops, strict=True))
    ids = torch.arange(stops[-1] + 3)
    prompt, before, last = Prompt(ids, spans, 0, ids), stops[-2], lengths[-1]

    def beyond(share: float) -> Tensor:
        part = last / stops[-1]
        each = (1 - part) * (1 - share) / before, (part + share * (1 - part)) / last
        return torch.cat([torch.full((before,), each[0]), torch.full((last,), each[1]), torch.ones(3)])

    assert [by_words(prompt, beyond(share)) for share in (0.0, 0.3, 0.36, 0.42, 1.0)] == [1, 1, 0.5, 0, 0]
    assert by_words(prompt, torch.zeros(len(ids))) == 0


def test_a_single_chunk_is_all_that_can_be_looked_at() -> None:
    ids = torch.arange(12)
    assert by_words(Prompt(ids, (Span(2, 9, Capture.ISOLATED),), 0, ids), torch.rand(12)) == 0


def followed(prompt: Prompt, count: int) -> Tensor:
    """What `trail` would repair."""
    model = tiny()
    again, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    light = drained(SELECTORS["trail"].scores(Work(model, again, cache)))  # type: ignore[attr-defined]
    return top(light.masked_fill(~prompt.repairable, -torch.inf), count)


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("said", [(1.0,), (0.5, 1.0), (0.0, 0.5), (0.0, 0.0)])
def test_relay_goes_by_words_where_something_is_asked(said: tuple[float, ...], guess: bool, monkeypatch: Any) -> None:
    """Seen in the middle, reading ends there, else at three quarters; rightly guessed, one pass does all."""
    answers = iter(said)
    monkeypatch.setattr(relay, "by_words", lambda *_: next(answers))
    model, passes = tiny(), []
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)

    class Seen(Work):
        def steps(self, rows: Any, **how: Any) -> Iterator[int]:
            for layer in super().steps(rows, **how):
                passes.append((len(self.rows), layer))
                yield layer

    work, count = Seen(model, prompt, cache, asked=guess), int(0.3 * prompt.reused + 0.5)
    for _ in work.repair(SELECTORS["relay"], 0.3):
        pass
    assert work.asked == (len(said) == 1)
    chosen = (work.changed & prompt.repairable).nonzero()[:, 0]
    assert len(chosen) == count
    assert set(followed(prompt, int(said[-1] * count)).tolist()) <= set(chosen.tolist())
    assert (chosen.tolist() == followed(prompt, count).tolist()) is (said[-1] == 1)
    missing, half, most = len(prompt.missing), model.layers // 2, model.layers * 3 // 4
    repairing = [(missing + count, layer) for layer in range(model.layers)]
    reading = [(missing, layer) for layer in range(half if work.asked else most)]
    if guess:
        reading[:half] = repairing[:half]
    assert passes == (repairing if guess and work.asked else reading + repairing)


def test_relay_reads_alone_where_words_do_not_take_the_whole_budget(monkeypatch: Any) -> None:
    model = tiny()
    nowhere = torch.full((len(SYSTEM) + sum(map(len, CHUNKS)) + len(QUESTION),), -torch.inf)
    monkeypatch.setattr(relay.Trail, "scores", lambda *_: (yield from ()) or nowhere)
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "system"), QUESTION)
    work, read = Work(model, prompt, cache, asked=True), model.layers * 3 // 4
    steps = work.repair(SELECTORS["relay"], 0.3)
    for _ in range(read):
        next(steps)
        assert not bool((work.changed & prompt.repairable).any())
    assert len(list(steps)) == model.layers
    assert int((work.changed & prompt.repairable).sum()) == int(0.3 * prompt.reused + 0.5)


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5, 0.0])
def test_what_relay_repairs_is_what_one_pass_leaves(part: float, guess: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(relay, "by_words", lambda *_: part)
    model = tiny()
    work = Work(model, *assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION), asked=guess)
    for _ in work.repair(SELECTORS["relay"], 0.4):
        pass
    logits = model.logits(work.hidden[-len(QUESTION) :])
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    rows = work.changed.nonzero()[:, 0]
    carried = None if work.asked else carried_from(prompt, model.rotary, rows)
    once = Pass(model, prompt.ids, cache, rows, carried=carried).run()
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
    _, keys, _ = model.qkv(0, model.embed(CHUNKS[0]))
    here = model.rope(0, keys, torch.arange(12))
    moved = move(model.rotary, 0, here, torch.arange(12), there)
    torch.testing.assert_close(moved, model.rope(0, keys, there), rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("name", ["v-deviation", "k-deviation", "question", "initial", "relay"])
def test_shards_choose_the_same_tokens(name: str) -> None:
    """Scores of two head shards, summed as `total` does, choose what the whole model chooses."""
    model = tiny()
    _, whole = repaired(model, "isolated", SELECTORS[name], 0.3)
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, "isolated"), QUESTION)
    barrier = Meeting(2)
    works = [Work(Shard(model, rank, barrier), prompt, shard(cache, rank)) for rank in (0, 1)]
    barrier.run([lambda w=w: [None for _ in w.repair(SELECTORS[name], 0.3)] for w in works])
    for work in works:
        assert torch.equal(work.changed, whole.changed)
        assert torch.equal(work.rows, whole.rows)
        torch.testing.assert_close(work.hidden, whole.hidden, rtol=1e-4, atol=1e-4)


def shard(cache: Any, rank: int) -> list[LayerKV]:
    return [LayerKV(held.keys[:, rank : rank + 1].clone(), held.values[:, rank : rank + 1].clone()) for held in cache]


class Meeting:
    """Threads that exchange tensors: every rank gives one and gets all."""

    def __init__(self, ranks: int) -> None:
        self._given: list[Tensor] = [torch.empty(0)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def all(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self._given[rank] = tensor
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def run(self, parts: list[Callable[[], Any]]) -> None:
        with ThreadPoolExecutor(len(parts)) as pool:
            for done in [pool.submit(part) for part in parts]:
                done.result()


class Shard:
    """One of two ranks: KV head ``rank`` and its three query heads."""

    def __init__(self, model: Llama, rank: int, meeting: Meeting) -> None:
        self._model, self._rank, self._meeting = model, rank, meeting
        self.layers, self.scale, self.rotary = model.layers, model.scale, model.rotary
        self.embed, self.rope, self.logits = model.embed, model.rope, model.logits

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._model.qkv(layer, hidden)
        r = self._rank
        return q[:, 3 * r : 3 * r + 3], k[:, r : r + 1], v[:, r : r + 1]

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        return attend(queries, keys, values, positions, self.scale)

    def looked_at(self, queries: Tensor, keys: Tensor, tokens: int) -> Tensor:
        return column_sums(queries, keys[:tokens], self.scale)

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        return self._model.post(layer, hidden, torch.cat(self._meeting.all(self._rank, attended), 1))

    def total(self, scores: Tensor, how: str) -> Tensor:
        given = torch.stack(self._meeting.all(self._rank, scores))
        return given.sum(0) if how == "sum" else given.amax(0)


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
