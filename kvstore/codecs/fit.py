"""Fitting a basis to a model: second moments of its KV and of its loss, collected a text at a time.

The Kullback-Leibler divergence that a small error e of a token's KV causes is e F e / 2, with F the second moment of
the gradient, at that KV, of the log-probability of tokens drawn from the model (Fisher's information). With C the
covariance of the KV, the basis is that of F^1/2 C F^1/2: components are uncorrelated, and an error of one unit costs
the same in each of them. Shannon's reverse water-filling then says that one step size serves all components, and that
components below it are not coded: no bits are left to allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore.codecs.basis import Basis, Part, read_basis, width
from kvstore.errors import CannotEncode

SHARED = 0.1
"""Share of F's diagonal that is added to it: what the calibration texts did not ask for may be asked for later."""
FLOOR = 1e-3


@dataclass(slots=True)
class _Sums:
    rows: int
    total: torch.Tensor
    data: torch.Tensor
    loss: torch.Tensor
    asked: int


def _sums(size: int, device: torch.device | str) -> _Sums:
    square = torch.zeros(size, size, dtype=torch.float64, device=device)
    return _Sums(0, square[0].clone(), square, square.clone(), 0)


class Moments:
    """Sums over the tokens of calibration texts, of which a basis is made.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
        Shape of the model's KV.
    span : int
        Layers of a group.
    joint : bool
        Keys and values in one basis instead of two.
    device : torch.device or str
        Where the sums are kept, in float64.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, span: int, *, joint: bool, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= span <= layers:
            raise CannotEncode(f"groups of {span} layers do not fit a model of {layers}.")
        self.shape = (layers, kv_heads, head_dim)
        self.span, self.kinds = span, ("kv",) if joint else ("k", "v")
        self._sums: list[list[_Sums]] = []
        for first in range(0, layers, span):
            sizes = [width(kind, min(span, layers - first), kv_heads * head_dim) for kind in self.kinds]
            self._sums.append([_sums(size, device) for size in sizes])

    def add(self, block: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        """Add the KV of a text, keys before RoPE, and the gradient of a log-probability at it.

        Parameters
        ----------
        block : torch.Tensor
            ``[layer][K|V][token][kv_head][dim]``, without sinks.
        gradient : torch.Tensor, optional
            As ``block``.
        """
        for group, first in zip(self._sums, range(0, self.shape[0], self.span), strict=True):
            for kind, sums in zip(self.kinds, group, strict=True):
                rows = self._rows(block, first, kind)
                sums.rows += len(rows)
                sums.total += rows.sum(0)
                sums.data += rows.T @ rows
                if gradient is not None:
                    slopes = self._rows(gradient, first, kind)
                    sums.loss += slopes.T @ slopes
                    sums.asked += len(slopes)

    def _rows(self, block: torch.Tensor, first: int, kind: str) -> torch.Tensor:
        part = block[first : first + self.span]
        part = part if kind == "kv" else part[:, :1] if kind == "k" else part[:, 1:]
        return part.permute(2, 0, 1, 3, 4).reshape(part.shape[2], -1).to(self._sums[0][0].data)

    def basis(self, *, rotary: str, model: str, revision: str, finest: float) -> Basis:
        """The basis, with all components that a step of ``finest`` (in its units) would code.

        Raises
        ------
        CannotEncode
            Fewer tokens were seen than a group has elements, so most of the basis would be noise.
        """
        groups = tuple(tuple(_part(sums, finest) for sums in group) for group in self._sums)
        layers, kv_heads, head_dim = self.shape
        made = Basis(layers, kv_heads, head_dim, self.span, self.kinds, groups, rotary, model, revision)
        return read_basis(made.to_bytes())  # rounded, as everybody else will have it


def _part(sums: _Sums, finest: float) -> Part:
    n = len(sums.total)
    if sums.rows < n:
        raise CannotEncode(f"{sums.rows} tokens were seen, but a group of layers has {n} elements: give more texts.")
    mean = sums.total / sums.rows
    spread = sums.data / sums.rows - torch.outer(mean, mean)
    loss = torch.eye(n, dtype=spread.dtype, device=spread.device)
    if sums.asked:
        loss = sums.loss / sums.asked
        diagonal = loss.diagonal().clone()
        loss = loss + torch.diag(SHARED * diagonal + FLOOR * diagonal.mean())
    values, vectors = torch.linalg.eigh(loss)
    root = values.clamp(min=float(values[-1]) * 1e-12).sqrt()
    half, back = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    found, turn = torch.linalg.eigh(half @ spread @ half)
    deviation, turn = found.clamp(min=0).sqrt().flip(0), turn.flip(1)
    rank = max(1, int((deviation >= finest).sum()))
    turn = turn[:, :rank]
    return Part(*(x.float().cpu() for x in (mean, half @ turn, turn.T @ back, deviation[:rank])))
