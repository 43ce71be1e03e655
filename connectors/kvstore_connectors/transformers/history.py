"""Which tokens a cache holds the KV of, as they were seen going into the model.

Nobody is asked for the tokens afterwards: a list that is one token off would be stored as the truth for everybody.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore_connectors.transformers.identity import version
from kvstore_connectors.transformers.support import Rows

_UNDERSTOOD = ("input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position")

Seen = tuple[torch.Tensor, torch.Tensor | None, int]
"""Token ids [batch, n] of a forward pass, their positions [1 or batch, n], and tokens that were in the cache before."""


class History:
    """Token ids of a cache's positions.

    Forward passes are taken in without waiting for a GPU; `settle` looks at them.

    Parameters
    ----------
    rows : ndarray, int32, [batch, token]
        What is in the cache at the beginning.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.broken = ""
        self._seen: list[Seen] = []
        self._under_way: Seen | None = None

    @property
    def length(self) -> int:
        """Tokens, those not settled included."""
        return self.rows.shape[1] + sum(ids.shape[1] for ids, _, _ in self._seen)

    def begin(self, inputs: Mapping[str, Any], start: int, training: bool) -> None:
        """A forward pass begins with `start` tokens in the cache."""
        self._under_way = None  # a pass that failed is forgotten: if it left anything behind, the cache was changed
        if start != self.length:
            self.spoil(f"the cache holds {start} tokens where {self.length} were seen")
        problem = unsuitable(inputs, training)
        if problem:
            self.spoil(problem)
        if self.broken:
            return
        ids, positions = inputs["input_ids"].detach().clone(), inputs.get("position_ids")
        self._under_way = (ids, None if positions is None else positions.detach().clone(), start)

    def end(self, length: int) -> None:
        """The forward pass is over, and the cache holds `length` tokens."""
        seen, self._under_way = self._under_way, None
        if self.broken or seen is None:
            return
        if length != seen[2] + seen[0].shape[1]:
            self.spoil(f"a forward pass over {seen[0].shape[1]} tokens left {length} in the cache")
            return
        self._seen.append(seen)

    def spoil(self, reason: str) -> None:
        """From now on it is not known what the cache holds; the first reason is kept."""
        self.broken = self.broken or reason

    def settle(self) -> Rows:
        """Token ids of all positions, [batch, token]; worth nothing if `broken` is set afterwards."""
        seen, self._seen = self._seen, []
        parts = [self.rows]
        for ids, positions, start in seen:
            if not _consecutive(positions, start, ids.shape[1]):
                self.spoil("positions were not counted from the beginning")
            parts.append(ids.cpu().numpy().astype("<i4"))
        if not parts[0].size:
            parts = parts[1:] or parts  # the batch may be larger than the prompt it was begun for
        if len({part.shape[0] for part in parts}) > 1:
            self.spoil("the batch changed its size")
        if not self.broken:
            self.rows = np.concatenate(parts, axis=1)
        return self.rows

    def crop(self, length: int) -> None:
        """The last tokens were taken away."""
        self.rows = self.settle()[:, :length]

    def select(self, indices: NDArray[np.integer]) -> None:
        """Prompts of the batch were chosen, repeated, or put in another order."""
        self.rows = self.settle()[indices]

    def copy(self) -> History:
        """The same history, to go on differently."""
        twin = History(self.settle())
        twin.broken = self.broken
        return twin


def unsuitable(inputs: Mapping[str, Any], training: bool) -> str:
    """Why the KV of a forward pass is not what its token ids alone make it, in words; empty if it is."""
    if not isinstance(inputs.get("input_ids"), torch.Tensor):
        return "the model was given embeddings instead of token ids"
    if hides_tokens(inputs.get("attention_mask")):
        return "an attention mask hides tokens, or is not understood"
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and name not in _UNDERSTOOD:
            return f"the model was also given {name!r}, which token ids do not tell of"
    if training:
        return "the model is in training mode"
    return "" if not autocast(inputs["input_ids"].device) else "the model ran under autocast"


def hides_tokens(mask: Any) -> bool:
    """Whether a mask is anything else than none, or ones for every token."""
    return mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all()))


def autocast(device: torch.device) -> bool:
    """Whether types are chosen by autocast, and not by the model."""
    return torch.is_autocast_enabled(device.type)


def _consecutive(positions: torch.Tensor | None, start: int, count: int) -> bool:
    if positions is None:
        return True
    found = positions.cpu().numpy()
    return found.ndim == 2 and found.shape[1] == count and bool((found == np.arange(start, start + count)).all())


class Witness:
    """Tells whether the tensors of a cache are those of a moment ago, and were not written to.

    Parameters
    ----------
    layers : sequence
        Layers of a transformers cache.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        # Weak references: a cache replaces its tensors layer by layer, and the old ones must be free to go at once.
        self._tensors = [(weakref.ref(tensor), version(tensor)) for tensor in _tensors(layers)]

    def agrees(self, layers: Sequence[Any]) -> bool:
        """Whether nothing has changed."""
        now = _tensors(layers)
        return len(now) == len(self._tensors) and all(
            then() is tensor and count == version(tensor)
            for (then, count), tensor in zip(self._tensors, now, strict=True)
        )


def _tensors(layers: Sequence[Any]) -> list[torch.Tensor]:
    return [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
