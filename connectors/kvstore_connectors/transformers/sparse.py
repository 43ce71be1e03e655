"""Decoding that reads a part of a context: what `shadow` and `squeezed` have in common.

The first pass computes the prompt with full attention; then each layer makes an index of its keys. From there on a
single token attends to what its queries choose out of the index, and to all that is not in it: the last tokens of the
prompt and what was generated. A pass of several tokens reads everything. Such a cache serves the one who made it: it is
never stored and never shared. One prompt at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from kvstore.errors import InvalidParams
from kvstore_connectors.transformers.attention import Detour
from kvstore_connectors.transformers.support import base_model, check_model


class SparseLayer(DynamicLayer):
    """A layer of such a cache; ``keys`` and ``values`` are those of the tokens that are not in the index.

    Attributes
    ----------
    seen : int
        Tokens so far: the position of the next one.
    indexed : bool
        Whether the first pass is over.
    touched : int
        Bytes of keys, values and index that the last step read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.indexed = False
        self.touched = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens; what a pass of several tokens attends to."""
        if key_states.shape[0] != 1:
            raise InvalidParams(
                f"sparse decoding: a batch of {key_states.shape[0]} prompts.", "Decode them one by one."
            )
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        if not self.indexed or key_states.shape[2] == 1:
            return keys, values
        known = self.everything()
        return torch.cat([known[0], keys], 2), torch.cat([known[1], values], 2)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A pass of several tokens sees all of them."""
        return self.seen + query_length, 0

    def keep_from(self, token: int, sinks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[token, kv_head, dim]`` of the tokens before that one, but for some sinks at the beginning,
        which from now on are in the index only."""
        taken = tuple(part[0, :, sinks:token].transpose(0, 1) for part in (self.keys, self.values))
        self.keys, self.values = (
            torch.cat([part[:, :, : min(sinks, token)], part[:, :, token:]], 2) for part in (self.keys, self.values)
        )
        self.indexed = True
        return taken[0], taken[1]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what is in the index cannot be taken back, as assisted decoding would."""
        raise InvalidParams("sparse decoding: tokens cannot be taken back.", "Use a DynamicCache.")

    @property
    def exact_nbytes(self) -> int:
        """Bytes of what is not in the index."""
        return nbytes(self.keys, self.values)

    @abstractmethod
    def index(self, queries: torch.Tensor, scale: float) -> None:
        """Make the index, after the first pass, of which these are the queries ``[query, head, dim]``."""

    @abstractmethod
    def everything(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[1, kv_head, token, dim]`` of what is in the index, in order."""

    @abstractmethod
    def attend(self, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Output ``[head, dim]`` of attention for the newest token's query ``[head, dim]``."""


class SparseCache(Cache):
    """A cache for one `generate` whose steps read a part of the prompt; entered while the model computes with it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `KVStoreCache` takes.
    layers : sequence of SparseLayer

    Raises
    ------
    ConfigError
        The model's KV is not plain attention KV.
    """

    def __init__(self, model: Any, layers: Sequence[SparseLayer]) -> None:
        self._model = base_model(model)
        check_model(self._model)
        super().__init__(layers=list(layers))
        self._detour = Detour(self._model, self._attention, "sdpa")

    @property
    def touched(self) -> int:
        """Bytes that the last step read."""
        return sum(layer.touched for layer in self.layers)

    def __enter__(self) -> Self:
        self._detour.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._detour.__exit__(*exc)

    def _attention(
        self, inner: Any, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        layer: Any = self.layers[module.layer_idx]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        if layer.indexed and query.shape[2] == 1:
            return layer.attend(query[0, :, 0], scale)[None, None].to(query.dtype), None
        out = inner(module, query, key, value, *rest, **options)
        if not layer.indexed:
            layer.index(query[0].transpose(0, 1), scale)
            if module.layer_idx == len(self.layers) - 1:
                self.complete()
        return out

    def complete(self) -> None:
        """Called once, when every layer has its index."""


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Output ``[head, dim]`` for queries ``[head, dim]`` over keys and values ``[kv_head, token, dim]``."""
    grouped = query.view(len(keys), -1, query.shape[-1]).to(keys.dtype)
    return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(query.shape)


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(one.numel() * one.element_size() for one in tensors)
