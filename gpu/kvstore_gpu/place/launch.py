"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_gpu import checks, host, jobs
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TURN, Source, blocks_for, uses_reference
from kvstore_gpu.place import reference
from kvstore_gpu.rope.launch import WIDTHS, Turn

TILE = 8
"""Tokens that a thread block takes of a piece at once, as in the kernel."""

SOURCE = Source(
    "place",
    [
        f"place<{kind}, {style}, {width}>"
        for kind, wide in WIDTHS.items()
        for style, narrow in (("false", 1), ("true", 2))
        for width in (wide, narrow)
    ],
    TURN,
)

PIECE = np.dtype(
    [("from", "<u8"), ("side", "<i8"), ("row", "<i4"), ("tokens", "<i4"), ("moved", "<i4"), ("unused", "<i4")]
)

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, ``[row, head, dim]`` each, dense."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one block that stand together in the prompt.

    Attributes
    ----------
    block : Tensor, uint8, [nbytes]
        ``[layer][K|V][token][head][dim]`` of the layers that are placed: on the rows' device, or host memory that is
        registered with it (`kvstore_gpu.host`).
    block_tokens : int
        Tokens in the block.
    first, tokens : int
        Which of them.
    row : int
        Where the first goes.
    moved : bool
        Whether that is not where they were computed; if it is, keys keep their bytes.
    """

    block: torch.Tensor
    block_tokens: int
    first: int
    tokens: int
    row: int
    moved: bool = True


def place(rows: Rows, pieces: Sequence[Piece], turn: Turn, *, stream: torch.cuda.Stream | None = None) -> None:
    """Copy pieces to their rows and turn the keys.

    Parameters
    ----------
    rows : sequence of (Tensor, Tensor), [row, head, dim]
        K and V of each layer.
    pieces : sequence of Piece
    turn : Turn
        One row a piece; ``skipped_layers`` are counted from the first layer of ``rows``.
    stream : torch.cuda.Stream, optional
        Instead of the current one.

    Raises
    ------
    InvalidParams
        If something does not fit: a block has another size, a piece leaves its block or the rows, the table is of
        another number of pieces.
    """
    if not rows or not pieces:
        return
    keys = rows[0][0]
    _check(rows, pieces, turn)
    if uses_reference(keys.device):
        reference.place(rows, pieces, turn.cos, turn.sin, turn.interleaved, turn.skipped_layers)
        return
    table = _table(pieces, keys)
    tiles = -(-max(piece.tokens for piece in pieces) // TILE)
    bases = jobs.upload(np.array([side.data_ptr() for layer in rows for side in layer], "<u8"), keys.device, stream)
    skipped = jobs.constant(bytes(layer in turn.skipped_layers for layer in range(len(rows))), keys.device)
    args = (
        jobs.upload(table, keys.device, stream), len(table), tiles, bases, len(rows),
        keys.stride(0) * keys.element_size(), keys.shape[1], keys.shape[2], turn.cos.shape[1], turn.cos, turn.sin,
        skipped,
    )  # fmt: skip
    name = f"place<{FLOATS[keys.dtype]}, {str(turn.interleaved).lower()}, {_width(rows, table, turn)}>"
    grid = blocks_for(len(table) * tiles * len(rows) * 2, keys.device, None)
    SOURCE.launch(name, grid, args, keys.device, stream=stream)


def _table(pieces: Sequence[Piece], keys: torch.Tensor) -> np.ndarray:
    row = keys[0].nbytes
    table = np.zeros(len(pieces), PIECE)
    begins = np.array(host.addresses([piece.block for piece in pieces], keys.device), np.uint64)
    table["from"] = begins + np.array([piece.first * row for piece in pieces], np.uint64)
    table["side"] = [piece.block_tokens * row for piece in pieces]
    table["row"] = [piece.row for piece in pieces]
    table["tokens"] = [piece.tokens for piece in pieces]
    table["moved"] = [piece.moved for piece in pieces]
    return table


def _width(rows: Rows, table: np.ndarray, turn: Turn) -> int:
    """Elements that all addresses and the rotary part allow a thread to take at once."""
    keys = rows[0][0]
    wide, pairs, dim = WIDTHS[FLOATS[keys.dtype]], turn.cos.shape[1], keys.shape[2]
    fits = dim % wide == 0 and (2 * pairs if turn.interleaved else pairs) % wide == 0
    aligned = all(side.data_ptr() % 16 == 0 for layer in rows for side in layer)
    if fits and aligned and not (table["from"] % np.uint64(16)).any():
        return wide
    return 2 if turn.interleaved else 1


def _check(rows: Rows, pieces: Sequence[Piece], turn: Turn) -> None:
    keys = rows[0][0]
    for layer, sides in enumerate(rows):
        for name, side in zip(("keys", "values"), sides, strict=True):
            checks.tensor(
                side, f"{name} of layer {layer}", shape=tuple(keys.shape), dtypes=(keys.dtype,), device=keys.device
            )
    if keys.dim() != 3 or keys.dtype not in FLOATS:
        raise checks.refuse("keys", f"{tuple(keys.shape)} of {keys.dtype}: [row, head, dim] of floats is needed")
    for piece in pieces:
        nbytes = len(rows) * 2 * piece.block_tokens * keys[0].nbytes
        if piece.block.dtype != torch.uint8 or piece.block.shape != (nbytes,) or not piece.block.is_contiguous():
            raise checks.refuse(
                "block", f"{tuple(piece.block.shape)} of {piece.block.dtype}: {nbytes} bytes are needed"
            )
        if piece.first < 0 or piece.tokens < 1 or piece.first + piece.tokens > piece.block_tokens:
            raise checks.refuse("first", f"{piece.tokens} tokens from {piece.first} on in {piece.block_tokens}")
        if piece.row < 0 or piece.row + piece.tokens > len(keys):
            raise checks.refuse("row", f"{piece.tokens} tokens from {piece.row} on where there are {len(keys)} rows")
    for name, values in (("cos", turn.cos), ("sin", turn.sin)):
        checks.tensor(values, name, shape=(len(pieces), None), dtypes=(torch.float32,), device=keys.device, align=16)
    if turn.cos.shape != turn.sin.shape or 2 * turn.cos.shape[1] > keys.shape[2]:
        raise checks.refuse("turn", f"tables {tuple(turn.cos.shape)} and {tuple(turn.sin.shape)}")
