"""Which tokens: deviation, choice, merge of layers."""

from __future__ import annotations

import gpu_kit as kit
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore_gpu import deviation, select, slerp


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (77, 8, 128), (1000, 3, 64), (9, 3, 17)])
@pytest.mark.parametrize("relative", [False, True])
def test_deviation_is_the_squared_distance(dtype, shape, relative, device) -> None:
    a, b = (torch.randn(shape, device=device).to(dtype) * 30 for _ in range(2))
    want = (a.double() - b.double()).square().sum((1, 2))
    if relative:
        want = want / a.double().square().sum((1, 2))
    found = deviation.deviation(a, b, relative=relative)
    assert kit.distance(found, want) < 2e-6
    assert torch.equal(found, deviation.deviation(a, b, relative=relative))
    assert not deviation.deviation(a, a.clone()).any()


def best(scores: list[float], wanted: int, forced: list[bool]) -> list[int]:
    """By sorting, as the definition says."""
    key = [
        (0.0 if f else 1.0, 0.0 if s != s else 1.0, -s if s == s else 0.0, i)
        for i, (s, f) in enumerate(zip(scores, forced, strict=True))
    ]
    key = [(f, 0.0, 0.0, i) if not f else (f, n, s, i) for f, n, s, i in key]
    return sorted(entry[3] for entry in sorted(key)[:wanted])


@pytest.mark.parametrize("count", [1, 31, 1000, 8192, 8193, 100_000])
@pytest.mark.parametrize("kind", ["plain", "ties", "negative", "odd"])
def test_the_highest_are_chosen_and_of_equals_the_first(count, kind, device) -> None:
    scores = torch.randn(count)
    if kind == "ties":
        scores = (scores * 3).round()
    elif kind == "negative":
        scores = -scores.abs() - 1e-3
    elif kind == "odd":
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42])
        scores[::3] = odd[torch.randint(0, 6, (len(scores[::3]),))]
    forced = torch.rand(count) < 0.01
    for wanted in {0, 1, count // 7, count // 2, count}:
        for must in (None, forced):
            found = select.top(scores.to(device), wanted, None if must is None else must.to(device))
            flags = [False] * count if must is None else must.tolist()
            assert found.tolist() == best(scores.tolist(), wanted, flags)


def test_heavy_hitters_keep_the_first_the_last_and_the_heaviest(device) -> None:
    mass = torch.rand(4, 300)
    seen = torch.arange(300, 0, -1).float()
    kept = select.heavy_hitters(mass.to(device), seen.to(device), 80, sinks=4, recent=32).tolist()
    assert kept == sorted(kept)
    assert len(kept) == 80
    assert {0, 1, 2, 3, *range(268, 300)} <= set(kept)
    middle = (mass.mean(0) / seen)[4:268]
    assert set(kept) - {0, 1, 2, 3, *range(268, 300)} == {i + 4 for i in middle.topk(44).indices.tolist()}
    with pytest.raises(InvalidParams):
        select.heavy_hitters(mass.to(device), seen.to(device), 20)


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(8, 128), (3, 64), (5, 80), (2, 256), (3, 16)])
@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_a_merge_is_the_arc_between_two_layers(dtype, heads, dim, t, device) -> None:
    lower, upper = (torch.randn(50, heads, dim).to(dtype) for _ in range(2))
    upper[3] = lower[3]
    upper[4] = 2 * lower[4]
    lower[5] = 0
    lower[6], upper[6] = 0, 0
    upper[7] = lower[7] * (1 + 1e-3 * torch.randn(heads, dim)).to(dtype)
    direction, lengths, angle = (x.cpu().double() for x in slerp.merge(lower.to(device), upper.to(device), t))
    a, b = lower.double(), upper.double()
    la, lb = a.norm(dim=-1), b.norm(dim=-1)
    assert kit.distance(lengths, torch.stack([la, lb])) < 1e-6
    ua, ub = a / la.clamp(min=1e-30)[..., None], b / lb.clamp(min=1e-30)[..., None]
    omega = 2 * torch.atan2((ua - ub).norm(dim=-1), (ua + ub).norm(dim=-1))
    omega[5:7] = 0
    assert (angle - omega.mean(-1)).abs().max() < 2e-6
    s = omega.sin().clamp(min=1e-9)[..., None]
    arc = (((1 - t) * omega).sin()[..., None] * ua + (t * omega).sin()[..., None] * ub) / s
    arc = torch.where(omega.sin()[..., None] < 1e-4, (1 - t) * ua + t * ub, arc)
    arc[5] = ub[5]
    arc = arc / arc.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    assert kit.distance(direction, arc) < kit.ROUNDING[dtype] + 2e-6
    assert not direction[6].any()
    one, two = slerp.restore(direction.to(dtype).to(device), lengths.float().to(device))
    assert kit.distance(one, la[..., None] * direction) < kit.ROUNDING[dtype]
    assert kit.distance(two, lb[..., None] * direction) < kit.ROUNDING[dtype]
    assert kit.distance(two[3], upper[3]) < 2 * kit.ROUNDING[dtype]


def test_what_does_not_fit_is_refused(device) -> None:
    x = torch.zeros(4, 2, 64, device=device)
    for call in (
        lambda: deviation.deviation(x, x[:3]),
        lambda: deviation.deviation(x, x.half()),
        lambda: deviation.deviation(x.transpose(0, 1), x.transpose(0, 1)),
        lambda: select.top(x[:, 0, 0].contiguous(), 5),
        lambda: select.top(x[:, 0, 0].double().contiguous(), 2),
        lambda: slerp.merge(x, x, 1.5),
        lambda: slerp.merge(x[..., :60].contiguous(), x[..., :60].contiguous()),
        lambda: slerp.restore(x, torch.zeros(2, 4, 3, device=device)),
    ):
        with pytest.raises(InvalidParams):
            call()
