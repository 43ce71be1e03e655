"""Attention in pieces, and in vLLM's pages, is attention: the same numbers as the reference, at true positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore_connectors.blend.attention import PIECE, attend_fused, attend_in_pieces
from kvstore_connectors.vllm import blend_paged
from kvstore_connectors.vllm.blend_paged import PAGE, PagedAttention, paged_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, PIECE, PIECE + 1, 3 * PIECE - 5, 400])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
def test_the_same_as_the_reference(count: int, heads: int, kv_heads: int) -> None:
    seeded = torch.Generator().manual_seed(count)
    keys, values = (torch.randn(400, kv_heads, 16, generator=seeded) for _ in range(2))
    queries = torch.randn(count, heads, 16, generator=seeded)
    positions = torch.randperm(400, generator=seeded)[:count].sort().values
    mine = attend_in_pieces(queries, keys, values, positions, 0.25)
    torch.testing.assert_close(mine, attend_fused(queries, keys, values, positions, 0.25), atol=1e-5, rtol=1e-4)


def test_what_stands_behind_a_query_is_nothing_to_it() -> None:
    keys, values = torch.randn(100, 2, 8), torch.randn(100, 2, 8)
    queries, positions = torch.randn(3, 4, 8), torch.tensor([10, 50, 90])
    before = attend_in_pieces(queries, keys, values, positions, 0.3)
    keys[51:], values[51:] = torch.randn(49, 2, 8), torch.nan
    after = attend_in_pieces(queries[:2], keys, values, positions[:2], 0.3)
    torch.testing.assert_close(before[:2], after, atol=1e-6, rtol=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    keys, values, queries = torch.randn(300, 2, 16), torch.randn(300, 2, 16), torch.randn(5, 4, 16)
    positions = torch.tensor([0, 1, 99, 200, 299])
    q, k, v = (one.to(torch.bfloat16) for one in (queries, keys, values))
    mine = attend_in_pieces(q, k, v, positions, 0.25)
    assert mine.dtype == torch.bfloat16
    wide = attend_fused(q.float(), k.float(), v.float(), positions, 0.25)
    torch.testing.assert_close(mine.float(), wide, atol=1e-2, rtol=1e-2)


def made(heads: int = 9, kv_heads: int = 3, dtype: torch.dtype = torch.float32) -> PagedAttention:
    found = paged_attention(heads, kv_heads, 32, dtype, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (4, 1)])
def test_runs_in_pages_are_the_same_as_the_reference_prompt_after_prompt(heads: int, kv_heads: int) -> None:
    paged = made(heads, kv_heads)
    seeded = torch.Generator().manual_seed(heads)
    for tokens, count in ((400, 400), (PAGE, 1), (700, 90), (130, 60), (3 * PAGE, 3)):  # in pages that were used
        keys, values = (torch.randn(tokens + 16, kv_heads, 32, generator=seeded) for _ in range(2))
        positions = torch.randperm(tokens, generator=seeded)[:count].sort().values
        for _ in range(2):  # another layer
            queries = torch.randn(count, heads, 32, generator=seeded)
            mine = paged(queries, keys, values, positions, 0.25)
            right = attend_fused(queries, keys, values, positions, 0.25)
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)
            keys, values = keys.flip(0), values.flip(0)


def test_pages_of_a_long_prompt_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_paged, "KEPT_BYTES", 4 * PAGE * 32 * 2 * 4)  # of four pages
    paged, sizes = made(1, 1), []
    for tokens in (4 * PAGE, PAGE, 9 * PAGE, 3 * PAGE):
        keys, queries = torch.randn(tokens, 1, 32), torch.randn(1, 1, 32)
        paged(queries, keys, keys, torch.tensor([tokens - 1]), 0.25)
        sizes.append(len(paged._pages))
    assert sizes[2:] == [9, 3]


def test_runs_in_pages_in_half_precision() -> None:
    keys, values, queries = (torch.randn(300, heads, 32).to(torch.bfloat16) for heads in (2, 2, 4))
    positions = torch.cat([torch.arange(7), torch.tensor([99, 200]), torch.arange(250, 300)])
    mine = made(4, 2, torch.bfloat16)(queries[: len(positions)], keys, values, positions, 0.25)
    wide = attend_fused(queries[: len(positions)].float(), keys.float(), values.float(), positions, 0.25)
    torch.testing.assert_close(mine.float(), wide, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("broken", ["raises", "sees its future"])
def test_a_vllm_whose_operation_does_something_else_is_not_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _custom_ops = pytest.importorskip("vllm._custom_ops")
    right = _custom_ops.cpu_attention_with_kv_cache

    def other(**how: Any) -> None:
        if broken == "raises":
            raise TypeError("an argument that is not known")
        right(**{**how, "causal": False})

    monkeypatch.setattr(_custom_ops, "cpu_attention_with_kv_cache", other)
    assert paged_attention(4, 2, 32, torch.float32, CPU) is None


def test_not_on_a_device() -> None:
    assert paged_attention(4, 2, 32, torch.bfloat16, torch.device("meta")) is None
