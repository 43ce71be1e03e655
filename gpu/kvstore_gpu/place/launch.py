"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    [("from", "<u8"), ("side", "<i8"), ("before", "<i8"), ("row", "<i4"), ("tokens", "<i4"), ("moved", "<i4"),
     ("unused", "<i4")]
)  # fmt: skip

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, ``[row, head, dim]`` each, dense."""

Blocks = Sequence[torch.Tensor] | torch.Tensor
"""A block a piece, or one tensor that has them one after the other."""

Place = Callable[[range, Blocks], None]
"""Places some layers, given these and the blocks as far as they hold them."""


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
    rows: Rows, pieces: Sequence[Piece], blocks: Blocks, turn: Turn, *, stream: torch.cuda.Stream | None = None
) -> None:
    """Copy pieces to their rows and turn the keys: `placing` and all layers at once."""
    if rows and pieces:
        placing(rows, pieces, turn, stream=stream)(range(len(rows)), blocks)


def placing(rows: Rows, pieces: Sequence[Piece], turn: Turn, *, stream: torch.cuda.Stream | None = None) -> Place:
    """`place` in two steps: what is checked and uploaded once, and the launches, each for some layers.

    Parameters
    ----------
    rows : sequence of (Tensor, Tensor), [row, head, dim]
        K and V of each layer, of at least one.
    pieces : sequence of Piece
        At least one.
    turn : Turn
        One row a piece; ``skipped_layers`` are counted from the first layer of ``rows``.
    stream : torch.cuda.Stream, optional
        Instead of the current one, then and now.

    Returns
    -------
    callable
        Given the layers to place, and of each piece its block, uint8 ``[nbytes]``, ``[layer][K|V][token][head][dim]``
        of these layers: on the rows' device, or host memory that is registered with it (`kvstore_gpu.host`).

    Raises
    ------
    InvalidParams
        If something does not fit: a piece leaves its block or the rows, the table is of another number of pieces; when
        called, a block has another size, or a layer is not there.
    """
    keys = rows[0][0]
    table, sides = _check(rows, pieces, turn)
    if uses_reference(keys.device):
        return partial(_by_reference, rows, pieces, sides, turn)
    return _Placing(rows, table, sides, turn, stream)


def _by_reference(
    rows: Rows, pieces: Sequence[Piece], sides: np.ndarray, turn: Turn, layers: range, blocks: Blocks
) -> None:
    _check_blocks(len(rows), layers, sides, blocks)
    parts = blocks.split((2 * len(layers) * sides).tolist()) if isinstance(blocks, torch.Tensor) else blocks
    skipped = frozenset(one - layers.start for one in turn.skipped_layers)
    reference.place(rows[layers.start : layers.stop], pieces, parts, turn.cos, turn.sin, turn.interleaved, skipped)


class _Placing:
    """See `placing`; by the kernel."""

    def __init__(
        self, rows: Rows, table: np.ndarray, sides: np.ndarray, turn: Turn, stream: torch.cuda.Stream | None
    ) -> None:
        keys, device = rows[0][0], rows[0][0].device
        self._keys, self._layers, self._stream = keys, len(rows), stream
        self._table, self._sides = table, sides
        bases = np.array([side.data_ptr() for layer in rows for side in layer], "<u8")
        self._there, self._bases = jobs.upload(table, device, stream), jobs.upload(bases, device, stream)
        self._skipped = jobs.constant(bytes(layer in turn.skipped_layers for layer in range(len(rows))), device)
        self._tiles = -(-int(table["tokens"].max()) // TILE)
        self._wide = _fits_wide(keys, turn) and not any((n % 16).any() for n in (bases, table["from"], table["before"]))
        self._turn = turn
        self._shape = keys.stride(0) * keys.element_size(), keys.shape[1], keys.shape[2], turn.cos.shape[1]

    def __call__(self, layers: range, blocks: Blocks) -> None:
        _check_blocks(self._layers, layers, self._sides, blocks)
        table, base, wide = self._there, np.uint64(0), self._wide
        if isinstance(blocks, torch.Tensor):
            (address,) = host.addresses([blocks], self._keys.device)
            base, wide = np.uint64(address), wide and address % 16 == 0
        else:
            apart, found = self._table.copy(), np.array(host.addresses(blocks, self._keys.device), np.uint64)
            apart["from"] += found
            apart["before"] = 0
            table, wide = jobs.upload(apart, self._keys.device, self._stream), wide and not (found % 16).any()
        bases, skipped = self._bases[16 * layers.start :], self._skipped[layers.start :]
        turn, count = self._turn, len(self._table)
        args = (table, base, count, self._tiles, bases, skipped, len(layers), *self._shape, turn.cos, turn.sin)
        kind, width = FLOATS[self._keys.dtype], _width(self._keys, turn, wide)
        grid = blocks_for(count * self._tiles * len(layers) * 2, self._keys.device, None)
        name = f"place<{kind}, {str(turn.interleaved).lower()}, {width}>"
        SOURCE.launch(name, grid, args, self._keys.device, stream=self._stream)


def _fits_wide(keys: torch.Tensor, turn: Turn) -> bool:
    """Whether a thread may take 16 bytes at once of a head and its rotary part."""
    wide, pairs = WIDTHS[FLOATS[keys.dtype]], turn.cos.shape[1]
    return keys.shape[2] % wide == 0 and (2 * pairs if turn.interleaved else pairs) % wide == 0


def _width(keys: torch.Tensor, turn: Turn, wide: bool) -> int:
    """Elements that a thread takes at once."""
    return WIDTHS[FLOATS[keys.dtype]] if wide else 2 if turn.interleaved else 1


def _check(rows: Rows, pieces: Sequence[Piece], turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """Refuse what does not fit; the kernel's table, and the bytes of one side of each block."""
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
    sides = room * keys[0].nbytes
    table["from"], table["side"], table["before"] = first * keys[0].nbytes, sides, np.cumsum(sides) - sides
    table["row"], table["tokens"], table["moved"] = row, tokens, moved
    return table, sides


def _check_blocks(there: int, layers: range, sides: np.ndarray, blocks: Blocks) -> None:
    """Refuse layers that are not there, and blocks that do not have just these."""
    if not 0 <= layers.start < layers.stop <= there or layers.step != 1:
        raise checks.refuse("layers", f"{layers} of {there}")
    sizes = 2 * len(layers) * sides
    if not isinstance(blocks, torch.Tensor) and len(blocks) != len(sizes):
        raise checks.refuse("blocks", f"{len(blocks)} for {len(sizes)} pieces")
    wanted = [int(sizes.sum())] if isinstance(blocks, torch.Tensor) else sizes.tolist()
    for block, nbytes in zip([blocks] if isinstance(blocks, torch.Tensor) else blocks, wanted, strict=True):
        if block.dtype != torch.uint8 or block.shape != (nbytes,) or not block.is_contiguous():
            raise checks.refuse("block", f"{tuple(block.shape)} of {block.dtype}: {nbytes} bytes are needed")
