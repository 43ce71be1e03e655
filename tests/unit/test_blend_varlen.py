"""Scattered queries by sequences of an engine's attention: the same as under a mask, whatever the positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_connectors.blend import varlen as module
from kvstore_connectors.blend.attention import attend, column_sums, scores
from kvstore_connectors.blend.varlen import PAGE, Ending, Plan, attend_by_runs, looked_at_by_kernel
from kvstore_connectors.vllm.blend_varlen import reading_kernel

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.35


def paged(queries, keys, values, sequences, scale, *, causal):
    """Attention of sequences over pages, by its definition; a query that sees nothing would be an error here."""
    out, mass = torch.empty_like(queries), torch.empty(queries.shape[1], len(queries))
    assert sequences.pages.shape[0] == len(sequences.keys) == len(sequences.begins) - 1
    assert sequences.pages.min() >= 0
    assert sequences.pages.max() < len(keys)
    assert sequences.most_keys == sequences.keys.max()
    for row, (begin, end) in enumerate(zip(sequences.begins[:-1], sequences.begins[1:], strict=True)):
        count, seen = int(end - begin), int(sequences.keys[row])
        assert 0 < count <= sequences.longest
        assert seen > 0
        k, v = (side[sequences.pages[row].long()].flatten(0, 1)[:seen] for side in (keys, values))
        at = torch.arange(seen - count, seen) if causal else torch.full((count,), seen - 1)
        table = scores(queries[begin:end], k, at, scale)
        mass[:, begin:end] = table.logsumexp(-1)
        repeated = v.repeat_interleave(HEADS // KV_HEADS, 1).float()
        out[begin:end] = torch.einsum("hqk,khd->qhd", table.softmax(-1), repeated)
    return out, mass


@st.composite
def positions(draw):
    """Rising positions: runs of any length, gaps of any length."""
    at, out = draw(st.integers(0, 60)), []
    for _ in range(draw(st.integers(1, 12))):
        run = draw(st.integers(1, 30))
        out += range(at, at + run)
        at += run + draw(st.integers(1, 90))
    return torch.tensor(out)


@settings(max_examples=40, deadline=None)
@given(positions(), st.integers(0, 40), st.sampled_from([(8, 32), (128, 512), (3, 64)]))
def test_the_same_as_under_a_mask(at, behind, sizes) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "BLOCK_QUERIES", sizes[0])
    patch.setattr(module, "BLOCK_KEYS", sizes[1])
    tokens = -(-(int(at[-1]) + 1 + behind) // PAGE) * PAGE
    queries = torch.randn(len(at), HEADS, DIM)
    keys, values = (torch.randn(tokens, KV_HEADS, DIM) for _ in range(2))
    with patch.context():
        plan = Plan.of(at, at.device)
        found = attend_by_runs(paged, queries, keys, values, plan, SCALE)
    patch.undo()
    torch.testing.assert_close(found, attend(queries, keys, values, at, SCALE), atol=2e-6, rtol=1e-5)


def test_blocks_are_bounded_and_cover_all_queries() -> None:
    at = torch.cat([torch.arange(0, 300), torch.arange(1000, 30_000, 7)])
    plan = Plan.of(at, at.device)
    assert plan.before is not None
    assert plan.before.longest <= module.BLOCK_QUERIES
    assert plan.within.most_keys <= module.BLOCK_KEYS
    assert int(plan.within.begins[-1]) == len(at) == plan.alone + int(plan.before.begins[-1])


@pytest.mark.parametrize(("first", "count"), [(0, 60), (0, 1), (2900, 64), (31, 2000)])
def test_one_run_needs_one_call(first: int, count: int) -> None:
    plan = Plan.of(torch.arange(first, first + count), torch.device("cpu"))
    assert plan.before is None
    assert (plan.alone, plan.within.longest, plan.within.most_keys) == (count, count, first + count)


@pytest.mark.parametrize(("tokens", "asked"), [(700, 40), (16, 16), (513, 1)])
def test_where_the_last_queries_look(tokens: int, asked: int) -> None:
    room = -(-tokens // PAGE) * PAGE
    queries = torch.randn(asked, HEADS + 2 * KV_HEADS, 64).bfloat16()[:, :HEADS]  # as an engine's projection gives them
    keys = torch.randn(room, KV_HEADS, 64).bfloat16()
    keys[tokens:] = torch.nan  # memory behind the prompt is nobody's
    end = Ending.of(asked, tokens, torch.device("cpu"))
    found = looked_at_by_kernel(paged, queries, keys, end, 0.125)
    right = column_sums(queries, keys[:tokens], 0.125)
    assert found.shape == (KV_HEADS, tokens)
    torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-2)
    values = torch.randn(room, KV_HEADS, 64).bfloat16()
    values[tokens:] = torch.nan
    weighed = looked_at_by_kernel(paged, queries, keys, end, 0.125, values)
    torch.testing.assert_close(weighed, found * values[:tokens].float().norm(dim=-1).T, atol=1e-3, rtol=1e-2)
    assert float(found.sum()) == pytest.approx(asked * HEADS, rel=1e-3)


@pytest.mark.parametrize("wrong", ["", "raises", "is off"])
def test_a_kernel_is_used_for_reading_only_if_it_is_right(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*given, values):
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        return real(*given, values=values) * (1.1 if wrong == "is off" else 1)

    real = module.column_sums
    monkeypatch.setattr(module, "column_sums", kernel)
    shape = (HEADS, KV_HEADS, 64, torch.bfloat16, torch.device("cpu"))
    assert reading_kernel(paged, *shape) is (None if wrong else paged)
    assert reading_kernel(None, *shape) is None
