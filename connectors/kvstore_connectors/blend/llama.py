"""The Llama family as plain torch: the reference that tests and quality figures run on, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as functional

from kvstore_connectors.blend.attention import attend, column_sums
from kvstore_connectors.blend.rope import Turning

if TYPE_CHECKING:
    from torch import Tensor


class Llama:
    """A Llama (SmolLM2, Mistral without a window) from its Hugging Face configuration and tensors.

    Parameters
    ----------
    config : mapping
        Fields of ``config.json``.
    tensors : mapping of str to Tensor
        Weights under their Hugging Face names; moved nowhere, so they choose device and dtype.

    Raises
    ------
    ConfigError
        If chunks of this model cannot be moved.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._weights = tensors
        self._heads = int(config["num_attention_heads"])
        self._kv_heads = int(config["num_key_value_heads"])
        self._dim = int(config.get("head_dim") or config["hidden_size"] // self._heads)
        self._eps = float(config["rms_norm_eps"])
        self._turning = Turning(config)
        self.rotary = self._turning.rotary
        self.layers = int(config["num_hidden_layers"])
        self.scale = self._dim**-0.5
        self._embedding = tensors["model.embed_tokens.weight"]
        self._head = tensors.get("lm_head.weight", self._embedding)

    def embed(self, ids: Tensor) -> Tensor:
        return self._embedding[ids]

    def ready(self, rows: Tensor) -> None:
        """See `Model.ready`."""
        self._turning.ready(rows)

    def qkv(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        q, k, v = (self._linear(x, f"model.layers.{layer}.self_attn.{name}_proj") for name in "qkv")
        shape = (len(hidden), self._kv_heads, self._dim)
        return q.view(len(hidden), self._heads, self._dim), k.view(shape), v.view(shape)

    def rope(self, layer: int, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Model.rope`."""
        return self._turning.rope(layer, queries, keys, positions)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        return attend(queries, keys, values, positions, self.scale)

    def looked_at(self, queries: Tensor, keys: Tensor, tokens: int, values: Tensor | None = None) -> Tensor:
        """See `Model.looked_at`."""
        return column_sums(queries, keys[:tokens], self.scale, values)

    def post(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        name = f"model.layers.{layer}"
        hidden = hidden + self._linear(attended, f"{name}.self_attn.o_proj")
        x = self._norm(hidden, f"{name}.post_attention_layernorm")
        gate = functional.silu(self._linear(x, f"{name}.mlp.gate_proj"))
        return hidden + self._linear(gate * self._linear(x, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(self._norm(hidden, "model.norm"), self._head)

    def total(self, scores: Tensor, how: Literal["sum", "max"]) -> Tensor:
        return scores

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        return wide.to(x.dtype) * self._weights[f"{name}.weight"]
