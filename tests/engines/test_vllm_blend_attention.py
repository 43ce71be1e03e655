"""Attention in pieces is attention: the same numbers as the reference, at true positions."""

from __future__ import annotations

import pytest
import torch

from kvstore_connectors.blend.attention import PIECE, attend_fused, attend_in_pieces


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
    assert torch.equal(before[:2], after)


def test_half_precision_is_summed_in_float32() -> None:
    keys, values, queries = torch.randn(300, 2, 16), torch.randn(300, 2, 16), torch.randn(5, 4, 16)
    positions = torch.tensor([0, 1, 99, 200, 299])
    q, k, v = (one.to(torch.bfloat16) for one in (queries, keys, values))
    mine = attend_in_pieces(q, k, v, positions, 0.25)
    assert mine.dtype == torch.bfloat16
    wide = attend_fused(q.float(), k.float(), v.float(), positions, 0.25)
    torch.testing.assert_close(mine.float(), wide, atol=1e-2, rtol=1e-2)
