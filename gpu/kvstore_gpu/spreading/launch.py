"""Checks, then the kernels on the current stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_gpu import checks, jobs
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.spreading import reference
from kvstore_gpu.spreading.reference import COMMON, FAINT, WINDOW

SOURCE = Source("spreading", ["words", "pairs", "kinds", "asked", "tell", "spread", "hop", "missed", "around"])

MOST_TOKENS = 1 << 20
"""Of a prompt: pairs of kinds and places share 64 bits."""


@dataclass(frozen=True)
class Spreading:
    """How light spreads.

    Attributes
    ----------
    hops : int
        How often light passes from a word to where it stands again.
    ahead, back : int
        Tokens over which light fades to nothing behind and before a lit token, and need around one that needs repair.
    fade : float
        What is left of light after a hop.
    single : float
        Weight of a token that matches without its neighbours, against a pair.
    backward : float
        Weight of hops to earlier places, whose tokens cannot see the later ones.
    seam : int
        Tokens at the beginning of a chunk over which light from the end of the one before fades.
    rest : float
        Weight of light where nothing is missing.
    """

    hops: int = 2
    ahead: int = 16
    back: int = 8
    fade: float = 0.9
    single: float = 0.5
    backward: float = 0.6
    seam: int = 24
    rest: float = 0.3


PLAIN = Spreading()


def needed(
    ids: torch.Tensor, owner: torch.Tensor, spans: Sequence[tuple[int, int]], how: Spreading = PLAIN
) -> torch.Tensor:
    """How much each token of the chunks needs repair, by the words of what stands behind the last of them.

    Parameters
    ----------
    ids : Tensor, int64, [token]
        None is negative, or 2^31 and more. This and `owner` are trusted: on a device nobody looks.
    owner : Tensor, int64, [token]
        Which span each token is in; -1 in none.
    spans : sequence of (int, int)
        The chunks, in order, as `owner` says.

    Returns
    -------
    Tensor, float32, [token]
        Minus infinity where nothing leads.

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit, or there are too many tokens.
    """
    checks.tensor(ids, "ids", shape=(None,), dtypes=(torch.int64,))
    n, device = len(ids), ids.device
    checks.tensor(owner, "owner", shape=(n,), dtypes=(torch.int64,), device=device)
    end = 0
    for start, stop in spans:
        if not end <= start < stop <= n:
            raise checks.refuse("spans", f"{start} to {stop} is empty, out of order, or leaves {n} tokens")
        end = stop
    if n > MOST_TOKENS:
        raise checks.refuse("ids", f"{n} tokens, and {MOST_TOKENS} are the most")
    if not spans:
        return torch.full((n,), -torch.inf, device=device)
    if uses_reference(device):
        return reference.needed(ids, owner, spans, how)
    return _Launches(ids, owner, spans, how).run()


class _Launches:
    """One prompt's launches, and the memory between them."""

    def __init__(
        self, ids: torch.Tensor, owner: torch.Tensor, spans: Sequence[tuple[int, int]], how: Spreading
    ) -> None:
        self._ids, self._owner, self._how = ids, owner, how
        self._n, self._device = n, device = len(ids), ids.device
        self._begin, self._asked = spans[0][0], spans[-1][1]
        self._windows = -(-(self._asked - self._begin) // WINDOW)
        self._bits = n.bit_length()  # n + 1 pairs have places up to n
        self._grid = blocks_for(-(-(n + 1) // THREADS), device, None)
        table = torch.tensor(spans, dtype=torch.int32)
        self._spans = jobs.upload(table.numpy().reshape(-1), device, None).view(torch.int32)
        zeros = torch.zeros((6 + how.hops, n + 1), dtype=torch.int32, device=device)
        self._within, self._pair_within, self._total, self._flags = zeros[0], zeros[1], zeros[2], zeros[3:6]
        self._passed = zeros[6:]

    def run(self) -> torch.Tensor:
        """From the ids to the need of each token."""
        n, bits, how, ids, owner = self._n, self._bits, self._how, self._ids, self._owner
        kind, first, count, nth, windows, pair, pair_windows = self._empty(torch.int32, 7)
        keys, word = self._empty(torch.int64, 2)
        alone, paired, lit, spread, found = self._empty(torch.float32, 5)

        self._launch("words", ids, owner, n, self._begin, WINDOW, bits, windows, keys)
        keys = keys[:n].sort().values
        self._launch("kinds", ids, windows, keys, n, bits, kind, first, count, nth, self._within)
        pair_keys = torch.empty_like(word)
        self._launch("pairs", kind, windows, n, bits, word, pair_windows, pair_keys)
        pair_keys = pair_keys.sort().values
        self._launch("kinds", word, pair_windows, pair_keys, n + 1, bits, pair, None, None, None, self._pair_within)
        self._launch("asked", kind, pair, n, self._asked, self._flags)
        told = (kind, self._within, pair, self._pair_within, self._flags)
        self._launch("tell", ids, owner, keys, *told, n, bits, self._windows, how.single, alone, paired, lit)
        links = (pair, alone, paired, n, bits, COMMON, FAINT)
        total = self._total
        self._launch("spread", lit, owner, n, how.ahead, how.back, spread, total)
        for passed in self._passed:
            where = (how.fade, how.backward, how.back, passed)
            self._launch("hop", spread, keys, first, count, *links, *where)
            self._launch("spread", passed, owner, n, how.ahead, how.back, spread, total)
        self._launch("missed", total, owner, keys, first, count, nth, *links, found)
        out = torch.empty(n, dtype=torch.float32, device=self._device)
        reach = (how.ahead, how.back, how.seam, how.rest)
        self._launch("around", found, total, owner, self._spans, n, *reach, out)
        return out

    def _empty(self, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, ...]:
        return torch.empty((count, self._n + 1), dtype=dtype, device=self._device).unbind(0)

    def _launch(self, name: str, *args: torch.Tensor | float | None) -> None:
        SOURCE.launch(name, self._grid, args, self._device)
