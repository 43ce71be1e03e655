"""How much the chunks of a prompt shaped each other's KV (Cache-Craft, SIGMOD'25), measured while it is prefilled.

Made from one log-sum-exp a segment, layer by layer; no table of attention is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.attention import segment_masses

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model


@dataclass
class Influence:
    """Statistics of one chunk, summed over the layers seen so far; attention is the mean over heads.

    Attributes
    ----------
    span : (int, int)
        Where it stands.
    before : list of (int, int)
        The chunks before it, in order.
    inter : Tensor
        Attention mass that its tokens put on each of these, ``[len(before)]``.
    intra : float
        What they put on the chunk itself.
    external : Tensor
        What each token put on all chunks before, a mean over layers, ``[n]``: Cache-Craft's w_i.
    """

    span: tuple[int, int]
    before: list[tuple[int, int]]
    inter: Tensor = field(init=False)
    intra: float = field(default=0.0, init=False)
    external: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.inter = torch.zeros(len(self.before))
        self.external = torch.zeros(self.span[1] - self.span[0])

    @property
    def cci(self) -> float:
        """Contextual influence, in 0.5..1: mean weight of a pair of tokens across chunks, against one inside."""
        size = len(self.external)
        inside = self.intra / size**2
        if not inside:
            return 0.5
        sizes = torch.tensor([stop - start for start, stop in self.before], dtype=torch.float32)
        across = float((self.inter / sizes).sum()) / size
        return 1 / (1 + math.exp(-across / inside))

    def add(self, masses: Tensor, layers: int) -> None:
        """Take in a layer: masses ``[n, len(before) + 1]``, those on the chunk itself last."""
        masses = masses.float().cpu()
        self.inter += masses[:, :-1].sum(0)
        self.intra += float(masses[:, -1].sum())
        self.external += masses[:, :-1].sum(1) / layers


class Influences:
    """A `recompute.Watch` over a full prefill, that measures all chunks of the prompt.

    Parameters
    ----------
    model : Model
    spans : sequence of (int, int)
        The chunks, half-open, in order.
    """

    def __init__(self, model: Model, spans: Sequence[tuple[int, int]]) -> None:
        self._model = model
        self.chunks = [Influence(span, list(spans[:place])) for place, span in enumerate(spans)]

    def __call__(self, layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        for one in self.chunks:
            mine = slice(*one.span)
            masses = segment_masses(queries[mine], keys, rows[mine], self._model.scale, [*one.before, one.span])
            one.add(masses.T, self._model.layers)
