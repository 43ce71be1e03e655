"""What recomputed tokens differ by, carried on."""

from __future__ import annotations

import gpu_kit as kit
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore.rope import Rotary
from kvstore_gpu.carry import Carried, carry
from kvstore_gpu.rope import Turn

SPANS = ((3, 40), (40, 41), (50, 200), (230, 389))


def defined(fresh, kept, rows, weights, rotary, spans, strength, ridge) -> torch.Tensor:
    """Token by token, in float64; rotary None: no positions."""
    row_of = {at: row for row, at in enumerate(rows.tolist())}
    fresh, kept, out = fresh.double().cpu(), kept.double().cpu(), kept.double().cpu().clone()

    def turned(one: torch.Tensor, at: int, back: bool) -> torch.Tensor:
        if rotary is None:
            return one
        angles = at * torch.tensor(rotary.frequencies, dtype=torch.float64) * (-1 if back else 1)
        count, found = len(angles), one.clone()
        first = slice(0, 2 * count, 2) if rotary.interleaved else slice(0, count)
        second = slice(1, 2 * count, 2) if rotary.interleaved else slice(count, 2 * count)
        found[:, first] = one[:, first] * angles.cos() - one[:, second] * angles.sin()
        found[:, second] = one[:, second] * angles.cos() + one[:, first] * angles.sin()
        return found

    for start, stop in spans:
        total, squares = torch.zeros_like(kept[0]), 0.0
        for at in range(start, stop):
            w = float(weights[at])
            if w > 0 and at in row_of:
                total += w * turned(fresh[row_of[at]] - kept[at], at, True)
                squares += w * w
            elif w > 0 and squares:
                out[at] += strength * w * turned(total / (squares + ridge), at, False)
    return out


@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "pairs"), [(2, 64, 32), (3, 128, 32), (1, 34, 17), (2, 256, 100)])
def test_differences_are_carried_to_what_is_behind_them(dtype, interleaved, heads, dim, pairs, device) -> None:
    tokens = 400
    rotary = Rotary(tuple(100.0 ** (-i / pairs) for i in range(pairs)), interleaved)
    rows = torch.randperm(tokens)[:90].sort().values
    weights = torch.rand(tokens) - 0.1
    kept = [torch.randn((tokens + 16, heads, dim), device=device).to(dtype) for _ in range(2)]
    whole = torch.randn((len(rows), 3 * heads, dim), device=device).to(dtype)  # as a projection gives them
    fresh = [whole[:, heads : 2 * heads], whole[:, 2 * heads :]]
    turn = Turn.of(rotary, torch.arange(tokens, device=device))
    carried = Carried.of(SPANS, rows.to(device), weights.to(device), turn, strength=0.7, ridge=0.5)
    want = [
        defined(one, held, rows, weights, how, SPANS, 0.7, 0.5)
        for one, held, how in zip(fresh, kept, (rotary, None), strict=True)
    ]
    before = [one.clone() for one in kept]
    carry(fresh[0], fresh[1], kept[0], kept[1], carried)
    for found, wanted, was in zip(kept, want, before, strict=True):
        assert kit.distance(found, wanted) < kit.ROUNDING[dtype] + 1e-6
        same = (wanted == was.double().cpu()).all(-1).all(-1)
        assert 100 < int(same.sum()) < tokens
        assert torch.equal(found.cpu()[same], was.cpu()[same])
        assert torch.equal(found.cpu()[rows], was.cpu()[rows])


def test_layers_without_positions_are_not_turned(device) -> None:
    rotary = Rotary((1.0, 0.1), skipped_layers=frozenset({1}))
    turn = Turn.of(rotary, torch.arange(100, device=device))
    rows, weights = torch.tensor([10, 11], device=device), torch.ones(100, device=device)
    carried = Carried.of([(0, 90)], rows, weights, turn)
    kept = torch.zeros((100, 1, 4), device=device)
    keys, values = kept.clone(), kept.clone()
    fresh = torch.randn((2, 1, 4), device=device)
    carry(fresh, fresh, keys, values, carried, layer=1)
    assert torch.equal(keys, values)
    assert kit.distance(keys[12:90], (fresh.sum(0) / 3).expand(78, 1, 4)) < 1e-6
    assert not keys[:12].any()
    assert not keys[90:].any()
    carry(fresh, fresh, kept, values, carried, layer=0)
    assert not torch.equal(kept, keys)


def test_nothing_behind_a_token_changes_it(device) -> None:
    """The causal order holds: what is told at 60 moves only what is behind 60."""
    turn = Turn.of(Rotary((1.0,)), torch.arange(200, device=device))
    rows, weights = torch.tensor([5, 60, 130], device=device), torch.ones(200, device=device)
    carried = Carried.of([(0, 200)], rows, weights, turn)
    fresh = torch.randn((3, 1, 2), device=device)
    found = []
    for change in (0.0, 1.0):
        told = fresh.clone()
        told[1] += change
        keys, values = (torch.zeros((200, 1, 2), device=device) for _ in range(2))
        carry(told, told, keys, values, carried)
        found.append(keys)
    assert torch.equal(found[0][:61], found[1][:61])
    assert not (found[0][61:130] == found[1][61:130]).all(-1).any()


def test_what_does_not_fit_is_refused(device) -> None:
    turn = Turn.of(Rotary((1.0,)), torch.arange(20, device=device))
    rows, weights = torch.tensor([3], device=device), torch.ones(20, device=device)
    for spans in ([(0, 21)], [(5, 5)], [(0, 5), (4, 8)], [(6, 9), (0, 3)], [(-1, 4)]):
        with pytest.raises(InvalidParams, match="spans"):
            Carried.of(spans, rows, weights, turn)
    with pytest.raises(InvalidParams, match="strength or ridge"):
        Carried.of([(0, 5)], rows, weights, turn, ridge=-1.0)
    with pytest.raises(InvalidParams, match="rows"):
        Carried.of([(0, 5)], rows.int(), weights, turn)
    carried = Carried.of([(0, 5)], rows, weights, turn)
    kept, fresh = torch.zeros((20, 1, 2), device=device), torch.zeros((1, 1, 2), device=device)
    with pytest.raises(InvalidParams, match="carried"):
        carry(fresh, fresh, kept[:10].clone(), kept[:10].clone(), carried)
    with pytest.raises(InvalidParams, match="dim"):
        carry(fresh[..., :1].clone(), fresh[..., :1].clone(), kept[..., :1].clone(), kept[..., :1].clone(), carried)
    for wrong in (fresh.half(), torch.zeros((2, 1, 2), device=device), torch.zeros((1, 2, 2), device=device)[:, :, :1]):
        with pytest.raises(InvalidParams, match="fresh_values"):
            carry(fresh, wrong, kept, kept.clone(), carried)
