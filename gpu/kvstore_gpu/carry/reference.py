"""The differences, carried on as it is defined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvstore_gpu.carry.launch import Carried


@dataclass(frozen=True)
class Steps:
    """What is the same in all layers, in a precision.

    Attributes
    ----------
    rows, told : Tensor, int64, [tells]
        Recomputed rows that tell something, and their positions.
    weights : Tensor, [tells, 1, 1]
        Theirs.
    parts : list of slice
        Those of each span.
    last : Tensor, int64, [behind]
        For each token behind the first of them in its span, which was the last before it.
    gain : Tensor, [behind, 1, 1]
        How much of the sum up to that one it gets.
    targets : list of (slice, slice)
        Where the tokens of a span are, among these and in the cache.
    back, on : (Tensor, Tensor)
        Cosines and sines that turn the first to position zero, and the latter from there.
    """

    rows: torch.Tensor
    told: torch.Tensor
    weights: torch.Tensor
    parts: list[slice]
    last: torch.Tensor
    gain: torch.Tensor
    targets: list[tuple[slice, slice]]
    back: tuple[torch.Tensor, torch.Tensor]
    on: tuple[torch.Tensor, torch.Tensor]


def steps(carried: Carried, dtype: torch.dtype) -> Steps:
    """What to do, made of what a kernel finds out on its way."""
    weights = carried.weights.clamp(min=0).double()
    tells = (carried.row_of >= 0) & (weights > 0)
    spans: dict[int, tuple[int, int]] = {}
    for start, stop, first in carried.segments.tolist():
        spans[first] = spans.get(first, (start, stop))[0], stop
    told, last, gain, parts, targets = [], [], [], [], []
    done = behind = 0
    for start, stop in spans.values():
        here = tells[start:stop].nonzero()[:, 0] + start
        if not len(here):
            continue
        begin, weight = int(here[0]), weights[int(here[0]) : stop]
        mine = tells[begin:stop]
        told.append(here)
        last.append(done + mine.cumsum(0) - 1)
        squares = torch.where(mine, weight.square(), 0.0).cumsum(0)
        gain.append(
            torch.where(carried.row_of[begin:stop] < 0, carried.strength * weight / (squares + carried.ridge), 0.0)
        )
        parts.append(slice(done, done + len(here)))
        targets.append((slice(behind, behind + stop - begin), slice(begin, stop)))
        done, behind = done + len(here), behind + stop - begin
    nothing = torch.zeros(0, dtype=torch.int64)
    at = torch.cat([nothing, *told])
    places = torch.cat([nothing, *(torch.arange(where.start, where.stop) for _, where in targets)])
    cos, sin = (one.to(dtype)[:, None] for one in (carried.turn.cos, carried.turn.sin))
    return Steps(
        rows=carried.row_of[at].long(),
        told=at,
        weights=weights[at].to(dtype)[:, None, None],
        parts=parts,
        last=torch.cat([nothing, *last]),
        gain=torch.cat([weights[:0], *gain]).to(dtype)[:, None, None],
        targets=targets,
        back=(cos[at], -sin[at]),
        on=(cos[places], sin[places]),
    )


def carry(fresh: torch.Tensor, kept: torch.Tensor, todo: Steps, *, turned: bool, interleaved: bool) -> None:
    """Keys, or values, in place."""
    dtype = todo.weights.dtype
    away = fresh.index_select(0, todo.rows).to(dtype) - kept.index_select(0, todo.told).to(dtype)
    if turned:
        turn_(away, *todo.back, interleaved)
    away.mul_(todo.weights)
    for part in todo.parts:
        away[part] = away[part].cumsum(0)
    shift = away.index_select(0, todo.last).mul_(todo.gain)
    if turned:
        turn_(shift, *todo.on, interleaved)
    for mine, place in todo.targets:
        kept[place] += shift[mine]


def turn_(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """Keys ``[token, head, dim]`` turned by a table ``[token, 1, pair]``, in place."""
    pairs = cos.shape[-1]
    part = keys[..., : 2 * pairs]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    new = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(new)
