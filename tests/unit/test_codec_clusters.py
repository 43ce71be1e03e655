"""Clusters of keys: what is kept of them is right, and what a query leaves out is what gets next to no attention."""

from __future__ import annotations

import pytest
import torch

from kvstore.codecs import clusters
from kvstore.codecs.clusters import Squeezed
from kvstore.errors import CannotEncode

DIM = 32
SCALE = DIM**-0.5


def clustered(count: int, around: int, seed: int = 0, spread: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys around some directions, in a random order, and which direction each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(around, DIM, generator=generator) * 3
    of = torch.randint(0, around, (count,), generator=generator)
    return centres[of] + spread * torch.randn(count, DIM, generator=generator), of


def test_an_index_holds_every_key_once_and_true_means() -> None:
    keys, _ = clustered(600, 12)
    values = torch.arange(600.0)[:, None].expand(-1, DIM)
    index = clusters.build(keys, values, Squeezed())
    assert torch.equal(index.order.sort().values, torch.arange(600))
    assert torch.equal(index.keys, keys[index.order])
    assert torch.equal(index.values[:, 0].long(), index.order)
    assert int(index.sizes.sum()) == int(index.group_sizes.sum()) == 600
    assert bool((index.parent.diff() >= 0).all())
    for number, (start, size) in enumerate(zip(index.starts.long().tolist(), index.sizes.long().tolist(), strict=True)):
        torch.testing.assert_close(index.means[number], index.keys[start : start + size].mean(0))
    for group in range(len(index.group_means)):
        rows = torch.cat([index.keys[int(s) : int(s + n)] for s, n, p in
                          zip(index.starts, index.sizes, index.parent, strict=True) if p == group])  # fmt: skip
        torch.testing.assert_close(index.group_means[group], rows.mean(0), atol=1e-5, rtol=1e-4)


def test_equal_keys_share_a_cluster() -> None:
    keys, of = clustered(400, 8, spread=0.0)
    index = clusters.build(keys, keys, Squeezed(clusters=20, groups=5))
    assert len(index.means) > 1
    found: dict[int, set[int]] = {}
    for number, (start, size) in enumerate(zip(index.starts.long().tolist(), index.sizes.long().tolist(), strict=True)):
        for direction in set(of[index.order[start : start + size]].tolist()):
            found.setdefault(direction, set()).add(number)
    assert all(len(numbers) == 1 for numbers in found.values())


def test_shares_times_sizes_are_one() -> None:
    keys, _ = clustered(500, 10)
    index = clusters.build(keys, keys, Squeezed())
    queries = torch.randn(7, DIM) * 4
    for means, sizes in ((index.means, index.sizes), (index.group_means, index.group_sizes)):
        found = clusters.shares(queries, means, sizes, SCALE)
        torch.testing.assert_close((found * sizes).sum(1), torch.ones(7))


def test_rows_of_clusters_are_where_their_keys_are() -> None:
    keys, of = clustered(400, 8, spread=0.0)
    index = clusters.build(keys, keys, Squeezed(clusters=20, groups=5))
    chosen = torch.zeros(len(index.means), dtype=torch.bool)
    assert not len(clusters.rows_of(index, chosen))
    chosen[[0, 2]] = True
    rows = clusters.rows_of(index, chosen)
    inside = index.starts.long()[[0, 2]], index.sizes.long()[[0, 2]]
    assert rows.tolist() == [int(s) + i for s, n in zip(*inside, strict=True) for i in range(int(n))]
    directions = {int(one) for one in of[index.order[rows]]}
    assert sorted(index.order[rows].tolist()) == [i for i, one in enumerate(of.tolist()) if one in directions]
    assert torch.equal(clusters.rows_of(index, ~(chosen & False)), torch.arange(400))


@pytest.mark.parametrize("wrong", [{"groups": 60}, {"sparsity": 100}, {"coarse": 80}, {"window": 0}, {"clusters": 0}])
def test_rules_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(CannotEncode):
        Squeezed(**wrong)
