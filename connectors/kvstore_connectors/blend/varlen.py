"""Scattered queries through an engine's attention for sequences of different lengths, in two calls and a sum.

Engines have attention that is far faster than a masked one, but it only knows queries that stand together at the end of
their keys. Neighbouring queries are therefore taken in blocks. All keys before a block are seen by all of its queries:
one call without a mask, a sequence for each block. What a query sees inside its block's range is seen by a run of
adjacent queries as by the end of an ordinary sequence: a second call, causal, a sequence for each run. Both calls give
the log-sum-exp of what they saw, and by it the two are weighed (FlashAttention's split keys; FlashDecoding, 2023).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kvstore_connectors.blend.prompt import brought
from kvstore_gpu.colsum import column_sums

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 16
"""Keys in a page: a block's range begins at a page, since the second call reads whole ones."""

BLOCK_QUERIES = 64
BLOCK_KEYS = 512
"""Queries of a block, and keys from its first page to its last query, at most. Longer ranges read less twice in the
first call, and more in the second."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of queries over paged keys, as such attention takes them.

    Attributes
    ----------
    begins : Tensor, int32, [sequences + 1]
        First query of each, and the number of all.
    longest : int
        Queries of the longest.
    keys : Tensor, int32, [sequences]
        Keys that each sees; its queries are the last of them if the call is causal.
    most_keys : int
    pages : Tensor, int32, [sequences, pages]
        Where they lie.
    """

    begins: Tensor
    longest: int
    keys: Tensor
    most_keys: int
    pages: Tensor

    @staticmethod
    def of(begins: np.ndarray, first_keys: np.ndarray, end_keys: np.ndarray, device: torch.device) -> Sequences:
        """From numbers of queries and positions of keys; keys begin at whole pages of one dense cache."""
        keys = end_keys - first_keys
        width = int(-(-keys.max() // PAGE))
        pages = first_keys[:, None] // PAGE + np.arange(width)
        pages = np.minimum(pages, (end_keys[:, None] - 1) // PAGE)  # behind its end a row names pages that are there
        table = np.concatenate([begins, keys, pages.ravel()]).astype(np.int32)
        there = brought(torch.from_numpy(table), device)
        count = len(keys)
        return Sequences(
            begins=there[: count + 1],
            longest=int(np.diff(begins).max()),
            keys=there[count + 1 : 2 * count + 1],
            most_keys=int(keys.max()),
            pages=there[2 * count + 1 :].view(count, width),
        )


class Varlen(Protocol):
    """Attention of sequences over pages of keys."""

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, scale: float, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Output ``[query, head, dim]`` and log-sum-exp, float32 ``[head, query]``; keys ``[page, token, head, dim]``.

        If causal, the last query of a sequence sees all of its keys, the one before one less.
        """
        ...


class Merge(Protocol):
    """Puts two parts of attention over the same queries into one, in place of the first."""

    def __call__(self, out: Tensor, mass: Tensor, other: Tensor, other_mass: Tensor) -> None:
        """Outputs ``[query, head, dim]``, log-sum-exps ``[head, query]``."""
        ...


def merge(out: Tensor, mass: Tensor, other: Tensor, other_mass: Tensor) -> None:
    """See `Merge`; in torch."""
    weight = torch.sigmoid(other_mass - mass).t()[..., None]
    # In float32: next to 1, where one of the two has nearly all, bfloat16 knows no weight of the other.
    out.copy_(torch.lerp(out.float(), other.float(), weight))


@dataclass(frozen=True)
class Plan:
    """How sorted positions fall into sequences.

    Attributes
    ----------
    before : Sequences, optional
        What blocks see before their own range: none if all begin at the first page.
    alone : int
        Queries at the beginning whose blocks have nothing before them.
    within : Sequences
        What runs see within their block's range.
    """

    before: Sequences | None
    alone: int
    within: Sequences

    @staticmethod
    def of(positions: Tensor, device: torch.device) -> Plan:
        """For rising positions in host memory, at least one, and attention on a device."""
        at = positions.numpy()
        if at[-1] - at[0] + 1 == len(at):  # one run sees all before it as the end of an ordinary sequence does
            return Plan(None, len(at), Sequences.of(np.array([0, len(at)]), np.array([0]), at[-1:] + 1, device))
        blocks = _blocks(at)
        start = at[blocks] // PAGE * PAGE  # where the range of each block begins
        breaks = np.flatnonzero(np.diff(at) != 1) + 1
        runs = np.union1d(blocks, breaks)
        of_run = np.searchsorted(blocks, runs, "right") - 1
        ends = np.append(runs[1:], len(at))
        within = Sequences.of(np.append(runs, len(at)), start[of_run], at[ends - 1] + 1, device)
        far = np.flatnonzero(start > 0)
        if not len(far):
            return Plan(None, len(at), within)
        alone = int(blocks[far[0]])
        begins = np.append(blocks[far], len(at)) - alone
        return Plan(Sequences.of(begins, np.zeros_like(far), start[far], device), alone, within)


@dataclass(frozen=True)
class Ending:
    """The last positions of a prompt as one sequence: those of the question.

    Attributes
    ----------
    sequence : Sequences
        One, of these queries, over all keys up to the last.
    positions : Tensor, int32, [query]
    """

    sequence: Sequences
    positions: Tensor

    @staticmethod
    def of(queries: int, tokens: int, device: torch.device) -> Ending:
        """Of so many queries, the last of a prompt of so many tokens."""
        sequence = Sequences.of(np.array([0, queries]), np.array([0]), np.array([tokens]), device)
        return Ending(sequence, torch.arange(tokens - queries, tokens, dtype=torch.int32, device=device))


def _blocks(at: np.ndarray) -> np.ndarray:
    """First query of each block."""
    first, out, places = 0, [], at.tolist()
    while first < len(places):
        out.append(first)
        reach = places[first] // PAGE * PAGE + BLOCK_KEYS
        first = bisect_left(places, reach, first, min(first + BLOCK_QUERIES, len(places)))
    return np.array(out)


def looked_at_by_kernel(
    varlen: Varlen, queries: Tensor, keys: Tensor, end: Ending, scale: float, values: Tensor | None = None
) -> Tensor:
    """As `attention.column_sums`, by an engine's attention, for its log-sum-exp, and a kernel that sums columns.

    Parameters
    ----------
    varlen : Varlen
    queries : Tensor
        ``[n, heads, dim]`` of the last positions.
    keys : Tensor
        ``[keys, kv_heads, dim]``, dense, a multiple of `PAGE` of them; of the queries' type, bfloat16 or float16.
    end : Ending
    values : Tensor, optional
        As the keys.
    """
    pages = keys.view(-1, PAGE, *keys.shape[1:])
    _, mass = varlen(queries, pages, pages, end.sequence, scale, causal=True)
    where = (mass.t(), pages, end.sequence.pages[0], end.sequence.most_keys)
    fetched = None if values is None else values.view(pages.shape)
    return column_sums(queries, end.positions, *where, scale, values=fetched)


def attend_by_runs(
    varlen: Varlen, queries: Tensor, keys: Tensor, values: Tensor, plan: Plan, scale: float, merged: Merge = merge
) -> Tensor:
    """As `attention.attend`, by an engine's attention.

    Parameters
    ----------
    varlen : Varlen
    queries : Tensor
        ``[n, heads, dim]`` at the positions of the plan.
    keys, values : Tensor
        ``[keys, kv_heads, dim]``, dense, a multiple of `PAGE` of them.
    plan : Plan
    merged : Merge
        The engine's, if it has one.

    Returns
    -------
    Tensor
        ``[n, heads * dim]``.
    """
    k, v = (rows.view(-1, PAGE, *rows.shape[1:]) for rows in (keys, values))
    out, mass = varlen(queries, k, v, plan.within, scale, causal=True)
    if plan.before is not None:
        asked = queries[plan.alone :]
        earlier, earlier_mass = varlen(asked, k, v, plan.before, scale, causal=False)
        merged(out[plan.alone :], mass[:, plan.alone :], earlier, earlier_mass)
    return out.flatten(1)
