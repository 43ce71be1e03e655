"""Sums of attention at true positions, keys from low rank, scores of centroids: against float64."""

from __future__ import annotations

import gpu_kit as kit
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore.rope import rotary
from kvstore_gpu import centroid, colsum, lowrank, segments
from kvstore_gpu.centroid.reference import scores as exact_scores
from kvstore_gpu.colsum.reference import column_sums as exact_sums
from kvstore_gpu.lowrank.reference import reconstruct as exact_keys
from kvstore_gpu.queries import dense

HALVES = (torch.bfloat16, torch.float16)
SHAPES = [(4, 4), (8, 2), (9, 3), (6, 1)]
"""Heads, KV heads."""


class Case:
    """Queries at scattered positions over a sequence in pages."""

    def __init__(self, layout, heads, kv_heads, dim, dtype, tokens, positions, device) -> None:
        self.keys, self.values = kit.views(layout, 20, 16, kv_heads, dim, dtype, device)
        self.table = torch.randperm(20)[: -(-tokens // 16)].int().to(device)
        self.tokens, self.scale = tokens, dim**-0.5
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        projected = (2 * torch.randn(len(positions), heads + 2 * kv_heads, dim, device=device)).to(dtype)
        self.queries = projected[:, :heads]  # as an engine's projection gives them

    def arguments(self):
        return self.table, self.tokens, self.scale

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of sums of exponentials, and the column sums."""
        keys, queries, at = (
            dense(self.keys, self.table, self.tokens).double().cpu(),
            self.queries.double().cpu(),
            self.positions.cpu(),
        )
        scores = torch.einsum("qhd,khd->qhk", queries, keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1))
        hidden = torch.arange(len(keys))[None, :] > at[:, None]
        lse = (scores * self.scale).masked_fill(hidden[:, None, :], -torch.inf).logsumexp(-1)
        return lse, exact_sums(queries, at, lse, keys, self.scale)


SCATTERED = [
    ("all", 70, list(range(70))),
    ("few", 300, [0, 1, 17, 63, 64, 65, 128, 200, 255, 299]),
    ("one", 131, [130]),
    ("first", 40, [0]),
    ("runs", 257, [*range(30, 61), *range(190, 257)]),
]


@pytest.mark.parametrize(("tokens", "positions"), [case[1:] for case in SCATTERED], ids=[case[0] for case in SCATTERED])
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", ["nhd", "side by side", "hnd"])
def test_each_key_gets_the_attention_of_the_queries_behind_it(
    tokens, positions, heads, kv_heads, dim, dtype, layout, device
):
    case = Case(layout, heads, kv_heads, dim, dtype, tokens, positions, device)
    lse, sums = case.exact()
    given = lse.float().t().contiguous().t().to(device)  # heads before queries, as attention gives it
    mass = colsum.column_sums(case.queries, case.positions, given, case.keys, *case.arguments())
    assert kit.distance(mass, sums) < 2e-5
    assert not mass[:, positions[-1] + 1 :].any()
    assert abs(float(mass.sum()) - len(positions) * heads) < 1e-3 * len(positions) * heads
    values = {"values": case.values}
    weighed = colsum.column_sums(case.queries, case.positions, given, case.keys, *case.arguments(), **values)
    lengths = dense(case.values, case.table, tokens).double().cpu().norm(dim=-1).T
    assert kit.distance(weighed, sums * lengths) < 2e-5


def test_masses_of_segments_add_up_to_one(device) -> None:
    scores = torch.randn(6, 50, 90, dtype=torch.float64) * 3
    bounds = [(0, 20), (20, 21), (21, 90)]
    parts = torch.stack([scores[..., a:b].logsumexp(-1) for a, b in bounds])
    whole = scores.logsumexp(-1)
    found = segments.masses(parts.float().to(device), whole.float().to(device))
    assert (found.sum(0) - 1).abs().max() < 1e-5
    wanted = torch.stack([scores.softmax(-1)[..., a:b].sum(-1).mean(0) for a, b in bounds])
    assert kit.distance(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 80])
@pytest.mark.parametrize("rank", [16, 41, 160])
@pytest.mark.parametrize(("interleaved", "share"), [(False, 1.0), (True, 0.5), (False, 0.5), (False, 0.0)])
def test_keys_from_low_rank_are_turned_to_their_positions(dtype, dim, rank, interleaved, share, device) -> None:
    tokens, heads, rows = 300, 3, 77
    left, right = (torch.randn(*shape).bfloat16() for shape in ((tokens, rank), (heads, dim, rank)))
    chosen = torch.stack([torch.randperm(tokens)[:rows] for _ in range(heads)]).int()
    turning = rotary({"rope_theta": 10000.0, "head_dim": dim, "partial_rotary_factor": share or 1.0})
    cos, sin = turning.table(torch.arange(tokens) + 5000)
    if not share:  # a layer without positions
        cos, sin = cos[:, :0].contiguous(), sin[:, :0].contiguous()
    wanted = exact_keys(left.double(), right.double(), chosen, cos.double(), sin.double(), interleaved)
    moved = [one.to(device) for one in (lowrank.padded(left), lowrank.padded(right), chosen, cos, sin)]
    found = lowrank.reconstruct(*moved, dtype, interleaved=interleaved)
    assert found.dtype == dtype
    assert kit.distance(found, wanted) < kit.ROUNDING[dtype]


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "dim"), [(8, 2, 300, 128), (9, 3, 33, 64), (4, 4, 1, 80), (2, 1, 700, 256)]
)
def test_scores_of_centroids(dtype, heads, kv_heads, count, dim, device) -> None:
    query, centroids = (torch.randn(*shape).to(dtype) for shape in ((heads, dim), (kv_heads, count, dim)))
    sizes = torch.randint(0, 40, (kv_heads, count)).float()
    sizes[:, 0] = 3
    wanted = exact_scores(query.double(), centroids.double(), sizes.double(), dim**-0.5)
    found = centroid.scores(query.to(device), centroids.to(device), sizes.to(device), dim**-0.5)
    assert kit.distance(found, wanted) < 2e-5
    assert not found.cpu()[sizes == 0].any()
    if heads == kv_heads:
        assert ((found.cpu() * sizes).sum(1) - 1).abs().max() < 1e-5


def test_large_logits_do_not_overflow(device) -> None:
    query = torch.full((2, 64), 30.0, device=device)
    centroids = torch.full((1, 5, 64), 30.0, device=device)
    found = centroid.scores(query, centroids, torch.full((1, 5), 2.0, device=device), 1.0)
    assert torch.allclose(found.cpu(), torch.full((1, 5), 0.1))


def test_what_does_not_fit_is_refused(device) -> None:
    case = Case("nhd", 4, 2, 64, torch.float16, 100, [3, 50], device)
    lse = torch.zeros(2, 4, device=device)
    good = [case.queries, case.positions, lse, case.keys, *case.arguments()]
    for place, wrong in (
        (0, case.queries.float()),
        (0, case.queries[:, :3].contiguous()),
        (0, case.queries.transpose(1, 2)),
        (0, case.queries[:, ::2]),
        (1, case.positions.long()),
        (2, lse[:, :3].contiguous()),
        (3, case.keys.transpose(2, 3)),
        (4, case.table.long()),
        (5, 113),
        (5, 0),
    ):
        with pytest.raises(InvalidParams):
            colsum.column_sums(*good[:place], wrong, *good[place + 1 :])
    for wrong in (case.values.float(), case.values[:, :8], case.values.transpose(2, 3)):
        with pytest.raises(InvalidParams):
            colsum.column_sums(*good, values=wrong)
    with pytest.raises(InvalidParams):
        segments.masses(torch.zeros(2, 3, 4, device=device), torch.zeros(3, 5, device=device))
    left, right = torch.zeros(9, 24, device=device).bfloat16(), torch.zeros(2, 64, 24, device=device).bfloat16()
    table, chosen = torch.zeros(9, 32, device=device), torch.zeros(2, 3, device=device).int()
    with pytest.raises(InvalidParams):
        lowrank.reconstruct(left, right, chosen, table, table, torch.bfloat16)
    with pytest.raises(InvalidParams):
        lowrank.reconstruct(left[:, :16].half(), right[:, :, :16].half(), chosen, table, table, torch.float16)
    with pytest.raises(InvalidParams):
        centroid.scores(left, right, torch.zeros(2, 64, device=device), 1.0)
