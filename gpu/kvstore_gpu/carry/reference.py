"""The differences, carried on as it is defined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore.codecs.scratch import scratch
from kvstore_gpu.rope.reference import turn

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
    last : Tensor, int64, [others]
        For each token of these spans, which of the first was the last before it; any if none was.
    gain : Tensor, [others, 1, 1]
        How much of the sum up to that one it gets; 0 if none was, and where a token is recomputed itself.
    targets : list of (slice, slice)
        Where these tokens are, among themselves and in the cache: one run of adjacent spans after the other.
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
    done = 0
    for start, stop in spans.values():
        mine, weight = tells[start:stop], weights[start:stop]
        here = mine.nonzero()[:, 0] + start
        if not len(here):
            continue
        before = mine.cumsum(0)
        squares = torch.where(mine, weight.square(), 0.0).cumsum(0)
        told.append(here)
        last.append(done + (before - 1).clamp(min=0))
        known = (carried.row_of[start:stop] < 0) & (before > 0)
        gain.append(torch.where(known, carried.strength * weight / (squares + carried.ridge), 0.0))
        parts.append(slice(done, done + len(here)))
        _join(targets, start, stop)
        done += len(here)
    nothing = torch.zeros(0, dtype=torch.int64)
    at = torch.cat([nothing, *told])
    places = torch.cat([nothing, *(torch.arange(where.start, where.stop) for _, where in targets)])
    cos, sin = (one.to(dtype) for one in (carried.turn.cos, carried.turn.sin))
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


def _join(targets: list[tuple[slice, slice]], start: int, stop: int) -> None:
    """Add a span to the last run, if it goes on from there: a few large steps are faster than many small ones."""
    at = 0
    if targets:
        mine, place = targets[-1]
        at = mine.stop
        if place.stop == start:
            targets[-1] = slice(mine.start, at + stop - start), slice(place.start, stop)
            return
    targets.append((slice(at, at + stop - start), slice(start, stop)))


def carry(fresh: torch.Tensor, kept: torch.Tensor, todo: Steps, *, turned: bool, interleaved: bool) -> None:
    """Keys, or values, in place."""
    if not todo.parts:
        return
    dtype = todo.weights.dtype
    away = fresh.index_select(0, todo.rows).to(dtype) - kept.index_select(0, todo.told).to(dtype)
    if turned:
        away = turn(away, *todo.back, interleaved, scratch("what is told", tuple(away.shape), dtype))
    away.mul_(todo.weights)
    for part in todo.parts:
        away[part] = away[part].cumsum(0)
    room = len(todo.last), *kept.shape[1:]
    shift = torch.index_select(away, 0, todo.last, out=scratch("what is carried on", room, dtype))
    if turned:
        shift = turn(shift, *todo.on, interleaved, scratch("what is carried on, turned", room, dtype))
    for mine, place in todo.targets:
        if kept.dtype == dtype:
            kept[place].addcmul_(shift[mine], todo.gain[mine])
        else:  # of two types it would take three times as long
            kept[place] += shift[mine].mul_(todo.gain[mine])
