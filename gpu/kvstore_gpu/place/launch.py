"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvstore_gpu import checks, host, jobs
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TURN, Source, blocks_for, uses_reference
from kvstore_gpu.place import reference
from kvstore_gpu.rope.launch import WIDTHS, Turn, turning

TILE = 8
"""Tokens that a thread block takes of a piece at once, as in the kernel."""

SOURCE = Source("place", turning("place"), TURN)

PIECE = np.dtype(
    [("from", "<u8"), ("side", "<i8"), ("row", "<i4"), ("tokens", "<i4"), ("moved", "<i4"), ("unused", "<i4")]
)

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, ``[row, head, dim]`` each, dense."""


class Piece(NamedTuple):
    """Tokens of one block that stand together in the prompt.

    Attributes
    ----------
    block_tokens : int
        Tokens in the block.
    first, tokens : int
        Which of them.
    row : int
        Where the first goes.
    moved : bool
        Whether that is not where they were computed; if it is, keys keep their bytes.
    """

    block_tokens: int
    first: int
    tokens: int
    row: int
    moved: bool = True


def place(
    rows: Rows,
    pieces: Sequence[Piece],
    blocks: Sequence[torch.Tensor] | torch.Tensor,
    turn: Turn,
    *,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copy pieces to their rows and turn the keys.

    Parameters
    ----------
    rows : sequence of (Tensor, Tensor), [row, head, dim]
        K and V of each layer.
    pieces : sequence of Piece
    blocks : sequence of Tensor, uint8, [nbytes], or Tensor
        Of each piece its block, ``[layer][K|V][token][head][dim]`` of the layers that are placed: on the rows' device,
        or host memory that is registered with it (`kvstore_gpu.host`). One tensor has them one after the other.
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
    table, sizes = _check(rows, pieces, turn)
    offsets = _check_blocks(blocks, sizes)
    if uses_reference(keys.device):
        parts = blocks.split(sizes.tolist()) if isinstance(blocks, torch.Tensor) else blocks
        reference.place(rows, pieces, parts, turn.cos, turn.sin, turn.interleaved, turn.skipped_layers)
        return
    found = host.addresses([blocks] if isinstance(blocks, torch.Tensor) else blocks, keys.device)
    table["from"] += np.array(found, np.uint64) + offsets
    tiles = -(-int(table["tokens"].max()) // TILE)
    bases = np.array([side.data_ptr() for layer in rows for side in layer], "<u8")
    skipped = jobs.constant(bytes(layer in turn.skipped_layers for layer in range(len(rows))), keys.device)
    args = (
        jobs.upload(table, keys.device, stream), len(table), tiles, jobs.upload(bases, keys.device, stream), len(rows),
        keys.stride(0) * keys.element_size(), keys.shape[1], keys.shape[2], turn.cos.shape[1], turn.cos, turn.sin,
        skipped,
    )  # fmt: skip
    name = f"place<{FLOATS[keys.dtype]}, {str(turn.interleaved).lower()}, {_width(keys, table, bases, turn)}>"
    grid = blocks_for(len(table) * tiles * len(rows) * 2, keys.device, None)
    SOURCE.launch(name, grid, args, keys.device, stream=stream)


def _width(keys: torch.Tensor, table: np.ndarray, bases: np.ndarray, turn: Turn) -> int:
    """Elements that all addresses and the rotary part allow a thread to take at once."""
    wide, pairs, dim = WIDTHS[FLOATS[keys.dtype]], turn.cos.shape[1], keys.shape[2]
    fits = dim % wide == 0 and (2 * pairs if turn.interleaved else pairs) % wide == 0
    if fits and not (bases % np.uint64(16)).any() and not (table["from"] % np.uint64(16)).any():
        return wide
    return 2 if turn.interleaved else 1


def _check(rows: Rows, pieces: Sequence[Piece], turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """Refuse what does not fit; the kernel's table, of places within blocks, and how many bytes these have."""
    keys = rows[0][0]
    if keys.dim() != 3 or keys.dtype not in FLOATS:
        raise checks.refuse("keys", f"{tuple(keys.shape)} of {keys.dtype}: [row, head, dim] of floats is needed")
    for layer, sides in enumerate(rows):
        for name, side in zip(("keys", "values"), sides, strict=True):
            checks.tensor(
                side, f"{name} of layer {layer}", shape=tuple(keys.shape), dtypes=(keys.dtype,), device=keys.device
            )
    told = np.array(pieces, np.int64).reshape(-1, 5)
    room, first, tokens, row, moved = told.T
    if ((first < 0) | (tokens < 1) | (first + tokens > room)).any():
        raise checks.refuse("first", "a piece leaves its block, or is empty")
    if ((row < 0) | (row + tokens > len(keys))).any():
        raise checks.refuse("row", f"a piece leaves the {len(keys)} rows")
    for name, values in (("cos", turn.cos), ("sin", turn.sin)):
        checks.tensor(values, name, shape=(len(pieces), None), dtypes=(torch.float32,), device=keys.device, align=16)
    if turn.cos.shape != turn.sin.shape or 2 * turn.cos.shape[1] > keys.shape[2]:
        raise checks.refuse("turn", f"tables {tuple(turn.cos.shape)} and {tuple(turn.sin.shape)}")
    table = np.zeros(len(pieces), PIECE)
    table["from"], table["side"] = first * keys[0].nbytes, room * keys[0].nbytes
    table["row"], table["tokens"], table["moved"] = row, tokens, moved
    return table, len(rows) * 2 * room * keys[0].nbytes


def _check_blocks(blocks: Sequence[torch.Tensor] | torch.Tensor, sizes: np.ndarray) -> np.ndarray:
    """Refuse blocks that have other sizes; where each begins in the tensor that it is in."""
    if not isinstance(blocks, torch.Tensor) and len(blocks) != len(sizes):
        raise checks.refuse("blocks", f"{len(blocks)} for {len(sizes)} pieces")
    wanted = [int(sizes.sum())] if isinstance(blocks, torch.Tensor) else sizes.tolist()
    for block, nbytes in zip([blocks] if isinstance(blocks, torch.Tensor) else blocks, wanted, strict=True):
        if block.dtype != torch.uint8 or block.shape != (nbytes,) or not block.is_contiguous():
            raise checks.refuse("block", f"{tuple(block.shape)} of {block.dtype}: {nbytes} bytes are needed")
    starts = np.cumsum(sizes) - sizes
    return (starts if isinstance(blocks, torch.Tensor) else np.zeros_like(starts)).astype(np.uint64)
