"""The move, as it is defined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvstore_gpu.rope.reference import turn

if TYPE_CHECKING:
    from kvstore_gpu.place.launch import Piece, Rows


def place(
    rows: Rows,
    pieces: Sequence[Piece],
    blocks: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    skipped: frozenset[int],
) -> None:
    """Copy tokens of blocks into rows, keys turned; what does not turn keeps its bytes."""
    shape = rows[0][0].shape[1:]
    for index, (piece, stored_as) in enumerate(zip(pieces, blocks, strict=True)):
        block = stored_as.view(rows[0][0].dtype).view(len(rows), 2, piece.block_tokens, *shape)
        here = slice(piece.row, piece.row + piece.tokens)
        for layer, (keys, values) in enumerate(rows):
            stored, values[here] = block[layer, :, piece.first : piece.first + piece.tokens]
            turned = piece.moved and layer not in skipped
            keys[here] = turn(stored, cos[index : index + 1], sin[index : index + 1], interleaved) if turned else stored
