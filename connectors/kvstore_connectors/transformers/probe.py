"""What a model says about its own KV: the KV of a text, what comes next given some KV, and how much each part matters.

For calibration and evaluation, not for serving. Works with any decoder that `support.check_model` takes: keys and
values are read where the model writes them into its cache, queries where it hands them to its attention function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstore.errors import ConfigError
from kvstore.rope import Rotary, rotary
from kvstore_connectors.transformers.attention import Detour
from kvstore_connectors.transformers.identity import model_layout
from kvstore_connectors.transformers.support import base_model, check_model


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers, KV heads and head size of a model."""

    layers: int
    kv_heads: int
    head_dim: int


class Probe:
    """A model, asked about KV. Blocks are ``[layer][K|V][token][kv_head][dim]`` in the model's dtype.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On one device, in evaluation mode; its parameters are frozen.

    Raises
    ------
    ConfigError
        If its KV is not plain attention KV, or its rotation depends on the length of the prompt.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_model(model).eval().requires_grad_(False)
        self._decoder = check_model(self.model)
        layout = model_layout(self.model, 256)  # families have other words for the same in their configuration
        self.shape = Shape(layout.layers, layout.kv_heads, layout.head_dim)
        self.rotary: Rotary = rotary(self.model.config.to_dict() | {"head_dim": layout.head_dim})
        self.device = next(self.model.parameters()).device
        self.dtype = next(self.model.parameters()).dtype

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """KV of a text, keys after RoPE."""
        cache = DynamicCache(config=self.model.config)
        self._decoder(torch.tensor([list(tokens)], device=self.device), past_key_values=cache, use_cache=True)
        return torch.stack(
            [torch.stack([part[0].transpose(0, 1) for part in (x.keys, x.values)]) for x in cache.layers]
        )

    def logits(self, block: torch.Tensor, tokens: Sequence[int], *, position: int | None = None) -> torch.Tensor:
        """Next-token logits ``[token, vocabulary]``, float32, of tokens that follow a context of which this is the KV.

        Parameters
        ----------
        block : torch.Tensor
            KV of the context; may require a gradient.
        tokens : sequence of int
            What follows.
        position : int, optional
            Position of the first of ``tokens``, if the block has fewer tokens than the context had.
        """
        return self.logits_of([tuple(layer) for layer in block], tokens, position=position)

    def logits_of(
        self, layers: Sequence[tuple[torch.Tensor, ...]], tokens: Sequence[int], *, position: int | None = None
    ) -> torch.Tensor:
        """As `logits`, with keys and values ``[token, kv_head, dim]`` of each layer; layers may keep other tokens."""
        cache = DynamicCache(config=self.model.config)
        for index, pair in enumerate(layers):
            keys, values = (part.transpose(0, 1)[None].to(self.device, self.dtype) for part in pair)
            cache.update(keys, values, index)
        count = len(layers[0][0])
        start = count if position is None else position
        ids = torch.tensor([list(tokens)], device=self.device)
        places = torch.arange(start, start + len(tokens), device=self.device)[None]
        found = self.model(ids, past_key_values=cache, position_ids=places, use_cache=True)
        return found.logits[0].float()

    def slopes(self, block: torch.Tensor, tokens: Sequence[int], seed: int) -> torch.Tensor:
        """Gradient, at the KV of a context, of the log-probability of tokens drawn from the model after it.

        Parameters
        ----------
        block : torch.Tensor
            KV of the context.
        tokens : sequence of int
            The text that follows; at each of its places a next token is drawn.
        seed : int
            Of the draws.
        """
        leaf = block.detach().clone().requires_grad_(True)
        found = self.logits(leaf, tokens).log_softmax(-1)
        generator = torch.Generator(device=found.device).manual_seed(seed)
        drawn = torch.multinomial(found.detach().exp(), 1, generator=generator)
        return torch.autograd.grad(found.gather(1, drawn).sum(), leaf)[0]

    def before_rope(self, block: torch.Tensor, position: int = 0) -> torch.Tensor:
        """The same KV, or its gradient, with keys turned back, in float32."""
        return self._turned(block, position, back=True)

    def after_rope(self, block: torch.Tensor, position: int = 0) -> torch.Tensor:
        """The mirror of `before_rope`."""
        return self._turned(block, position, back=False)

    def _turned(self, block: torch.Tensor, position: int, *, back: bool) -> torch.Tensor:
        found = block.detach().float().clone()
        table = self.rotary.table(torch.arange(position, position + block.shape[2], device=block.device))
        for layer in set(range(len(found))) - self.rotary.skipped_layers:
            found[layer, 0] = self.rotary.turn(found[layer, 0], table, back=back)
        return found

    @torch.no_grad()
    def queries(self, tokens: Sequence[int], block: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Queries of each layer ``[token, head, dim]``, after RoPE, of a text, behind the KV of a context if given."""
        found: list[torch.Tensor] = []

        def seen(inner: Any, module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
            found.append(query[0].transpose(0, 1))
            return inner(module, query, *rest, **options)

        with Detour(self.model, seen, "sdpa"):
            if block is None:
                self.prefill(tokens)
            else:
                self.logits(block, tokens)
        if len(found) != self.shape.layers:
            raise ConfigError(
                f"{type(self.model).__name__} does not compute attention through transformers' attention functions.",
                "Importance of tokens cannot be measured on it.",
            )
        return found
