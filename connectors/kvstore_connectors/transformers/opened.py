"""A transformers model, opened layer by layer for the blend (`kvstore_connectors.blend.model.Model`).

Its own modules compute, adapters included; only attention and rotation are ours. What comes out is compared with the
model itself once: a decoder that is built in another way is refused, however its modules are named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import DynamicCache

from kvstore.errors import ConfigError
from kvstore_connectors.blend.attention import attend, column_sums
from kvstore_connectors.blend.recompute import prefill
from kvstore_connectors.blend.rope import Turning

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_TOKENS = 24
"""Tokens on which the opened model is compared with the model itself."""

_REMEDY = "Reuse prefixes only: KVStoreCache without Chunks."


class OpenedModel:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM3 and others built alike).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without a PEFT wrapper, in evaluation mode.
    decoder : torch.nn.Module
        Its decoder.

    Raises
    ------
    ConfigError
        If its keys can not be moved, or it does not compute what such a decoder does.
    """

    def __init__(self, model: Any, decoder: Any) -> None:
        self._model, self._decoder = model, decoder
        config = model.config.to_dict()
        self._turning = Turning(config)
        self.rotary = self._turning.rotary
        self._head = model.get_output_embeddings()
        self._layers: list[Any] = list(getattr(decoder, "layers", ()))
        self.layers = len(self._layers)
        attention = getattr(self._layers[0], "self_attn", None) if self._layers else None
        self._dim = int(getattr(attention, "head_dim", 0))
        if not self._dim:
            raise ConfigError(f"chunks: {type(decoder).__name__} is not of the Llama family.", _REMEDY)
        self.scale = float(getattr(attention, "scaling", self._dim**-0.5))
        self._compare()

    # -- the protocol --------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """See `Model.embed`."""
        return self._decoder.embed_tokens(ids)

    def ready(self, rows: Tensor) -> None:
        """See `Model.ready`."""
        self._turning.ready(rows)

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Model.qkv`."""
        module = self._layers[layer]
        attention, x = module.self_attn, module.input_layernorm(hidden)
        parts = (getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, self._dim)) for name in "qkv")
        queries, keys, values = parts
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        return queries, keys, values

    def rope(self, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Model.rope`."""
        return self._turning.rope(layer, queries, keys, positions)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See `Model.attend`."""
        return attend(queries, keys, values, positions, self.scale)

    def looked_at(self, queries: Tensor, keys: Tensor, tokens: int, values: Tensor | None = None) -> Tensor:
        """See `Model.looked_at`."""
        return column_sums(queries, keys[:tokens], self.scale, values)

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """See `Model.post`."""
        module = self._layers[layer]
        hidden = hidden + module.self_attn.o_proj(attended)
        return hidden + module.mlp(module.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self._head(self._decoder.norm(hidden))

    def total(self, scores: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """See `Model.total`."""
        return scores

    # -- the comparison ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _compare(self) -> None:
        ids = torch.arange(SAMPLE_TOKENS, device=self._model.device) % self._model.config.vocab_size
        theirs = DynamicCache(config=self._model.config)
        expected = self._model(ids[None], past_key_values=theirs, use_cache=True).logits[0]
        try:
            hidden, ours = prefill(self, ids)
            found = self.logits(hidden)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"chunks: {type(self._decoder).__name__} can not be opened ({error}).", _REMEDY) from None
        pairs = [(found, expected)]
        for held, layer in zip(ours, theirs.layers, strict=True):
            pairs += [(held.keys, layer.keys[0].transpose(0, 1)), (held.values, layer.values[0].transpose(0, 1))]
        most = 1e-3 if found.dtype is torch.float32 else 5e-2
        if any(a.shape != b.shape or float((a - b).norm()) > most * float(b.norm()) for a, b in pairs):
            raise ConfigError(
                f"chunks: {type(self._decoder).__name__} computes something else than a decoder of the Llama family.",
                _REMEDY,
            )
