"""Tokens of chunks to the rows of a prompt: each key turned by its piece's distance, every other byte as it was."""

from __future__ import annotations

import gpu_kit as kit
import pytest
import torch
from test_pages import CONFIGS

from kvstore.errors import InvalidParams
from kvstore.rope import rotary
from kvstore_gpu.place import Piece, place, placing
from kvstore_gpu.rope import Turn

LAYERS, HEADS, ROWS = 3, 3, 120
PIECES = ((16, 0, 16, 100), (16, 3, 9, 1), (5, 2, 1, 60), (40, 1, 39, 20))
"""Tokens of a block, first of them, how many, and the row where they go."""


def rows_of(dim: int, dtype: torch.dtype, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (*(torch.randn(ROWS, HEADS, dim, device=device).to(dtype) for _ in range(2)),)  # type: ignore[misc]
        for _ in range(LAYERS)
    ]


def pieces_of(dim: int, dtype: torch.dtype, device: str, moved: bool = True) -> tuple[list[Piece], list[torch.Tensor]]:
    blocks = [torch.randn(LAYERS * 2 * room * HEADS * dim, device=device).to(dtype) for room, *_ in PIECES]
    return [Piece(*where, moved=moved) for where in PIECES], [block.view(torch.uint8) for block in blocks]


def by_hand(
    rows, pieces, blocks, cos, sin, interleaved, skipped=frozenset()
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pair by pair in float64."""
    out = [tuple(side.cpu().double().clone() for side in layer) for layer in rows]
    dim, pairs = rows[0][0].shape[2], cos.shape[1]
    for index, piece in enumerate(pieces):
        data = blocks[index].cpu().view(rows[0][0].dtype).view(LAYERS, 2, piece.block_tokens, HEADS, dim).double()
        taken = data[:, :, piece.first : piece.first + piece.tokens]
        here = slice(piece.row, piece.row + piece.tokens)
        for layer, (keys, values) in enumerate(out):
            values[here] = taken[layer, 1]
            keys[here] = taken[layer, 0]
            for i in range(pairs if piece.moved and layer not in skipped else 0):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
                x, y = taken[layer, 0, ..., a], taken[layer, 0, ..., b]
                keys[here, ..., a] = x * cos[index, i] - y * sin[index, i]
                keys[here, ..., b] = y * cos[index, i] + x * sin[index, i]
    return out  # type: ignore[return-value]


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_pieces_go_to_their_rows_and_keys_turn(variant, dtype, device) -> None:
    turning, dim = rotary(CONFIGS[variant]), CONFIGS[variant]["head_dim"]
    rows, (pieces, blocks) = rows_of(dim, dtype, device), pieces_of(dim, dtype, device)
    distances = torch.randint(-120_000, 120_000, (len(pieces),))
    angles = distances.double()[:, None] * torch.tensor(turning.frequencies, dtype=torch.float64)
    right = by_hand(rows, pieces, blocks, angles.cos(), angles.sin(), turning.interleaved)
    place(rows, pieces, blocks, Turn.of(turning, distances.to(device)))
    for (keys, values), (true_keys, true_values) in zip(rows, right, strict=True):
        assert kit.distance(keys, true_keys) < kit.ROUNDING[dtype]
        assert torch.equal(values.cpu().double(), true_values)
        untouched = [*range(1), *range(10, 20), 59, *range(61, 100), *range(116, ROWS)]
        assert torch.equal(keys.cpu().double()[untouched], true_keys[untouched])


def test_blocks_in_one_tensor_are_the_same(device) -> None:
    turn = Turn.of(rotary({"head_dim": 64}), torch.arange(len(PIECES), device=device))
    pieces, blocks = pieces_of(64, torch.bfloat16, device)
    one, other = (rows_of(64, torch.bfloat16, device) for _ in range(2))
    for (keys, values), (others_keys, others_values) in zip(one, other, strict=True):
        others_keys.copy_(keys), others_values.copy_(values)
    place(one, pieces, blocks, turn)
    place(other, pieces, torch.cat(blocks), turn)
    assert all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("apart", [False, True])
def test_layers_by_and_by_are_the_same(apart, device) -> None:
    turning = rotary({"head_dim": 64, "no_rope_layers": [1, 0, 1]})
    turn = Turn.of(turning, torch.arange(len(PIECES), device=device) - 40)
    pieces, blocks = pieces_of(64, torch.float16, device)
    one, other = (rows_of(64, torch.float16, device) for _ in range(2))
    for (keys, values), (others_keys, others_values) in zip(one, other, strict=True):
        others_keys.copy_(keys), others_values.copy_(values)
    place(one, pieces, blocks, turn)
    some = placing(other, pieces, turn)
    for group in (range(2, 3), range(2)):
        parts = [block.view(LAYERS, -1)[group.start : group.stop].flatten() for block in blocks]
        some(group, parts if apart else torch.cat(parts))
    assert all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))
    for group in (range(2, 4), range(-1, 1), range(1, 1), range(0, 3, 2)):
        with pytest.raises(InvalidParams):
            some(group, blocks)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_does_not_move_keeps_its_bits_and_layers_without_positions_are_copied(interleaved, device) -> None:
    turning = rotary({"head_dim": 64, "rope_interleave": interleaved, "no_rope_layers": [1, 0, 1]})
    turn = Turn.of(turning, torch.full((len(PIECES),), 77, device=device))
    rows = rows_of(64, torch.bfloat16, device)
    pieces, blocks = pieces_of(64, torch.bfloat16, device, moved=False)
    right = by_hand(rows, pieces, blocks, turn.cos.cpu().double(), turn.sin.cpu().double(), interleaved)
    place(rows, pieces, blocks, turn)
    assert all(torch.equal(rows[layer][0].cpu().double(), right[layer][0]) for layer in range(LAYERS))
    place(rows, [piece._replace(moved=True) for piece in pieces], blocks, turn)
    assert torch.equal(rows[1][0].cpu().double(), right[1][0])
    assert not torch.equal(rows[0][0].cpu().double(), right[0][0])


def test_pieces_that_do_not_fit_are_refused(device) -> None:
    rows, (good, blocks) = rows_of(64, torch.float32, device), pieces_of(64, torch.float32, device)
    before = [side.clone() for layer in rows for side in layer]
    turn = Turn.of(rotary({"head_dim": 64}), torch.zeros(len(good), dtype=torch.int64, device=device))
    wrong = [
        Piece(16, 1, 16, 0), Piece(16, -1, 4, 0), Piece(16, 0, 0, 0), Piece(16, 0, 16, ROWS - 15), Piece(16, 0, 16, -1),
        Piece(15, 0, 15, 0),
    ]  # fmt: skip
    for one in wrong:
        with pytest.raises(InvalidParams):
            place(rows, [one, *good[1:]], blocks, turn)
    for block in (blocks[0][:-1], blocks[0].view(torch.float32), blocks[0][::2]):
        with pytest.raises(InvalidParams):
            place(rows, good, [block, *blocks[1:]], turn)
    with pytest.raises(InvalidParams):
        place(rows, good, blocks[1:], turn)
    for whole in (torch.cat(blocks[1:]), torch.cat(blocks).view(torch.float32), torch.cat([*blocks, *blocks])[::2]):
        with pytest.raises(InvalidParams):
            place(rows, good, whole, turn)
    for table in (
        Turn.of(rotary({"head_dim": 64}), torch.zeros(3, dtype=torch.int64, device=device)),
        Turn.of(rotary({"head_dim": 128}), torch.zeros(len(good), dtype=torch.int64, device=device)),
    ):
        with pytest.raises(InvalidParams):
            place(rows, good, blocks, table)
    with pytest.raises(InvalidParams):
        place([*rows[:-1], (rows[-1][0], rows[-1][1].bfloat16())], good, blocks, turn)
    place(rows, [], [], turn)
    place([], good, blocks, turn)
    assert all(torch.equal(a, b) for a, b in zip(before, (s for layer in rows for s in layer), strict=True))
