"""How far up a model reads what stands in its prompt: above that, repairing chunks changes no answer.

A few layers look names and facts up; those above them work on what was found. So where something is asked, tokens of
chunks are recomputed up to there only, and as many more of them as that saves. Which layers these are is measured: the
model continues a passage that stands in a chunk, while values of all chunks are in disorder from one layer on. Up to
the last layer that reads, it can not; above, it hardly matters. (Attention knockout: M. Geva, J. Bastings, K. Filippova
and A. Globerson, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", EMNLP 2023. Here
values change places, so that every layer gets what it is used to.) SmolLM2-135M reads in 24 of 30 layers, by
short prompts of some texts in up to 26, tuned to answer or not: docs/chunks.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.prompt import LayerKV
from kvstore_connectors.blend.recompute import Pass, prefill
from kvstore_connectors.blend.trial import divergence

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.trial import Sample

COPIED, SEEN = 40, 8
"""Tokens of a passage that are said again, and how many of them the model has seen before it can know which it is."""

REACHED = 3
"""Prompts that are enough to tell."""

LITTLE = 0.04
"""Of the divergence with disorder in all layers: what disorder in the layers above may cost. A layer too many costs
little, a layer too few the answers: the last one that reads is worth two and a half times this, and more."""

LEAST = 0.5
"""Nats that disorder in all layers costs a model that reads at all."""


@torch.no_grad()
def reach_of(model: Model, samples: Sequence[Sample]) -> int:
    """Number of layers, from the first on, in which this model reads chunks.

    Parameters
    ----------
    model : Model
    samples : sequence of Sample
        Prompts of any text; a few are enough. Their questions are not used.

    Returns
    -------
    int
        All layers where nothing else can be told: of too short chunks, or by a model that reads nothing.
    """
    trials = [trial for trial in (_Copying.of(model, sample) for sample in samples) if trial is not None]
    if not trials or (whole := _mean(trials, 0)) < LEAST:
        return model.layers
    low, high = 0, model.layers  # disorder from the lower one on costs much, from the upper one on little
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _mean(trials, middle) <= LITTLE * whole else (middle, high)
    return high


class _Copying:
    """A prompt that ends with the beginning of something one of its chunks says.

    Parameters
    ----------
    ids : Tensor
    first, last : int
        Where the chunks begin and end.
    """

    def __init__(self, model: Model, ids: Tensor, first: int, last: int) -> None:
        self._model, self._ids = model, ids
        self._rows = torch.arange(last, len(ids), device=ids.device)
        hidden, self._cache = prefill(model, ids)
        self._wanted = model.logits(hidden[last + SEEN :])
        order = torch.randperm(last - first, generator=torch.Generator().manual_seed(0)) + first
        self._disorder = []
        for held in self._cache:
            values = held.values.clone()
            values[first:last] = held.values[order.to(ids.device)]
            self._disorder.append(LayerKV(held.keys, values))

    @classmethod
    def of(cls, model: Model, sample: Sample) -> _Copying | None:
        """From the middle of the sample's middle chunk; None if that is too short."""
        chunk = sample.chunks[len(sample.chunks) // 2]
        said = chunk[len(chunk) // 4 :][:COPIED]
        if len(said) <= SEEN:
            return None
        first, last = len(sample.system), len(sample.system) + sum(map(len, sample.chunks))
        return cls(model, torch.cat([sample.system, *sample.chunks, said]), first, last)

    def cost(self, layer: int) -> float:
        """Divergence, in nats a token, with values in disorder from this layer on."""
        cache = [*self._cache[:layer], *self._disorder[layer:]]
        again = Pass(self._model, self._ids, cache, self._rows).run()
        return divergence(self._wanted, self._model.logits(again.hidden[SEEN:]))


def _mean(trials: Sequence[_Copying], layer: int) -> float:
    return sum(trial.cost(layer) for trial in trials) / len(trials)
