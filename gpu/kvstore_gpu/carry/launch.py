"""Checks, then the kernels on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kvstore_gpu import checks, jobs
from kvstore_gpu.carry import reference
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import THREADS, Source, uses_reference
from kvstore_gpu.rope import Turn

SEGMENT = 64
"""Tokens that one thread block goes through."""

WIDE = 4
"""Rotary pairs, or half as many dimensions, that a thread has where they lie so; else one."""

STYLES = (f"false, {WIDE}", "false, 1", "true, 1")
SOURCE = Source(
    "carry", [f"{name}<{kind}, {i}>" for name in ("sums", "carry") for kind in FLOATS.values() for i in STYLES]
)


@dataclass(frozen=True, eq=False)
class Carried:
    """From where to where it is carried in a prompt: the same in all layers.

    Attributes
    ----------
    rows : int
        How many are recomputed.
    row_of : Tensor, int32, [token]
        Which recomputed row each token is; -1 for none.
    weights : Tensor, float32, [token]
        How far off each is, compared with others; 0 or less: nothing is learned from it or added to it.
    before : Tensor, float32, [segment]
        Squared weights of the recomputed tokens before each segment in its span, added up.
    segments : Tensor, int32, [segment, 3]
        Where each begins and ends, and the first segment of its span.
    turn : Turn
        By each token's position.
    strength, ridge : float
        Of the estimate, how much is added; what evidence nothing has, in squared weights.
    """

    rows: int
    row_of: torch.Tensor
    weights: torch.Tensor
    before: torch.Tensor
    segments: torch.Tensor
    turn: Turn
    strength: float
    ridge: float

    @staticmethod
    def of(
        spans: Sequence[tuple[int, int]],
        rows: torch.Tensor,
        weights: torch.Tensor,
        turn: Turn,
        *,
        strength: float = 1.0,
        ridge: float = 1.0,
    ) -> Carried:
        """For recomputed tokens at positions `rows` (int64, no position twice), without waiting for the device.

        Raises
        ------
        InvalidParams
            If spans leave the tokens or overlap, or something has the wrong shape, type or device.
        """
        device, tokens = rows.device, len(weights)
        checks.tensor(rows, "rows", shape=(None,), dtypes=(torch.int64,))
        checks.tensor(weights, "weights", shape=(None,), dtypes=(torch.float32,), device=device)
        for name, values in (("cos", turn.cos), ("sin", turn.sin)):
            checks.tensor(values, name, shape=(tokens, None), dtypes=(torch.float32,), device=device)
        if not strength >= 0.0 or not ridge >= 0.0:
            raise checks.refuse("strength or ridge", f"{strength}, {ridge}: at least 0 is needed")
        segments, end = [], 0
        for start, stop in spans:
            if not end <= start < stop <= tokens:
                raise checks.refuse("spans", f"{start} to {stop} is empty, out of order, or leaves {tokens} tokens")
            first, end = len(segments), stop
            segments += [(at, min(at + SEGMENT, stop), first) for at in range(start, stop, SEGMENT)]
        table = np.array(segments, np.int32).reshape(-1, 3)
        row_of = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        row_of[rows] = torch.arange(len(rows), dtype=torch.int32, device=device)
        squares = torch.where(row_of >= 0, weights.clamp(min=0).square(), 0.0).cumsum(0, dtype=torch.float64)
        total = torch.cat([squares.new_zeros(1), squares])
        placed = jobs.upload(table.reshape(-1), device, None).view(torch.int32).view(-1, 3)
        starts = placed[:, 0].long()
        before = (total[starts] - total[starts[placed[:, 2].long()]]).float()
        return Carried(len(rows), row_of, weights, before, placed, turn, strength, ridge)

    @cached_property
    def steps(self) -> reference.Steps:
        """What the reference does, made once."""
        return reference.steps(self, torch.float32)


def carry(
    fresh_keys: torch.Tensor,
    fresh_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    carried: Carried,
    *,
    layer: int = 0,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Shift what is kept of a layer by what the recomputed rows tell; the rows themselves are left as they were.

    Parameters
    ----------
    fresh_keys, fresh_values : Tensor, [row, head, dim]
        Recomputed; keys turned for their positions. Each row is dense, rows may be further apart.
    keys, values : Tensor, [token, head, dim]
        Kept, of the same type, changed in place; there may be more tokens than `carried` has. ``dim`` is even.
    carried : Carried
    layer : int
        Whether its keys have positions.

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.kv(keys, "keys", (None, None, None))
    checks.kv(values, "values", tuple(keys.shape), keys)
    _, heads, dim = keys.shape
    checks.multiple(dim, 2, "dim")
    for name, one in (("fresh_keys", fresh_keys), ("fresh_values", fresh_values)):
        if one.shape != (carried.rows, heads, dim) or one.dtype != keys.dtype or one.device != keys.device:
            raise checks.refuse(name, f"{one.dtype} {tuple(one.shape)} on {one.device} where the rows are needed")
        if one.stride()[1:] != (dim, 1):
            raise checks.refuse(name, f"strides {one.stride()} are not those of dense rows")
    turn, count = carried.turn, len(carried.segments)
    if len(keys) < len(carried.weights) or 2 * turn.cos.shape[1] > dim or carried.weights.device != keys.device:
        raise checks.refuse("carried", f"{len(carried.weights)} tokens, {turn.cos.shape[1]} pairs do not fit the keys")
    turned = layer not in turn.skipped_layers
    if uses_reference(keys.device):
        reference.carry(fresh_keys, keys, carried.steps, turned=turned, interleaved=turn.interleaved)
        reference.carry(fresh_values, values, carried.steps, turned=False, interleaved=turn.interleaved)
        return
    if not count:
        return
    found = torch.empty((count, heads, dim, 2), dtype=torch.float32, device=keys.device)
    pairs = turn.cos.shape[1] if turned else 0
    strides = fresh_keys.stride(0), fresh_values.stride(0)
    both = (fresh_keys, fresh_values, *strides, keys, values, carried.row_of, carried.weights)
    table = (turn.cos, turn.sin)
    width = 1 if turn.interleaved or not _wide(fresh_keys, fresh_values, dim, pairs) else WIDE
    kind = f"<{FLOATS[keys.dtype]}, {str(turn.interleaved).lower()}, {width}>"
    grid = (count, -(-heads * dim // width // THREADS))
    args = (*both, carried.segments, heads, dim, pairs, *table, found)
    SOURCE.launch(f"sums{kind}", grid, args, keys.device, stream=stream)
    args = (*both, carried.before, carried.segments, heads, dim, pairs, *table,
            float(carried.strength), float(carried.ridge), found)  # fmt: skip
    SOURCE.launch(f"carry{kind}", grid, args, keys.device, stream=stream)


def _wide(fresh_keys: torch.Tensor, fresh_values: torch.Tensor, dim: int, pairs: int) -> bool:
    """Whether a thread's part of every row is one access, and turns as a whole or not at all."""
    rows = (one.stride(0) % WIDE == 0 and one.data_ptr() % (WIDE * one.element_size()) == 0
            for one in (fresh_keys, fresh_values))  # fmt: skip
    return dim % (2 * WIDE) == 0 and pairs % WIDE == 0 and all(rows)
