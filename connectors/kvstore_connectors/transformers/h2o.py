"""Decoding within a budget of tokens: the heaviest stay, the others are dropped as the text grows.

After "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048). Each layer adds up what attention each of its keys gets, head by
head, and drops the least heavy ones when it holds more than the budget (`kvstore.codecs.h2o`). What is dropped is gone,
so such a cache serves the one who made it: it is never stored, and never shared. One prompt at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from kvstore.codecs import importance
from kvstore.codecs.h2o import H2O
from kvstore.errors import InvalidParams
from kvstore_connectors.transformers.attention import Detour
from kvstore_connectors.transformers.leased import LeasedPrompt
from kvstore_connectors.transformers.sparse import nbytes
from kvstore_connectors.transformers.support import base_model, check_model


class HeavyHitterLayer(DynamicLayer):
    """Keys and values of a layer, of the tokens that stay; each KV head keeps its own.

    Attributes
    ----------
    scores : torch.Tensor
        ``[kv_head, token]``: attention that each kept key has got.
    """

    def __init__(self, rule: H2O, by_visibility: bool) -> None:
        super().__init__()
        self._rule, self._by_visibility = rule, by_visibility
        self.seen = 0
        self.scores = torch.zeros(0, 0)
        self._queries = torch.zeros(0, 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens."""
        if key_states.shape[0] != 1:
            raise InvalidParams(f"H2O decoding: a batch of {key_states.shape[0]} prompts.", "Decode them one by one.")
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What is kept, and as if it stood right before the new tokens."""
        kept = 0 if not self.is_initialized else self.keys.shape[2]
        return kept + query_length, self.seen - kept

    def attended(self, queries: torch.Tensor) -> None:
        """Add what these queries ``[query, head, dim]``, the last ones, gave to each key; drop what is too much."""
        keys = self.keys[0].transpose(0, 1)
        count, new = len(keys), len(queries)
        positions = torch.arange(count - new, count, device=keys.device)
        fresh = importance.attention_total(queries, keys, positions)
        grown = (keys.shape[1], count)
        self.scores = _padded(self.scores, grown, fresh) + fresh
        visible = (positions[:, None] >= torch.arange(count, device=keys.device)).sum(0).expand(grown).float()
        self._queries = _padded(self._queries, grown, fresh) + visible
        if count > self._rule.budget:
            self._drop(self._rule.keep(self.scores / self._queries if self._by_visibility else self.scores))

    def begin(self, block: torch.Tensor, shares: torch.Tensor, kept: torch.Tensor, seen: int) -> None:
        """Start with the KV ``[K|V, token, kv_head, dim]`` of the kept ones of so many tokens.

        ``shares`` is the attention that each got as a multiple of an even share, as if from all queries after it.
        """
        keys, values = block.transpose(1, 2)[:, None]
        super().update(keys, values)
        self.seen = seen
        queries = (seen - kept).to(shares)
        self._queries = queries.expand(keys.shape[1], -1)
        self.scores = (shares / seen * queries).expand(keys.shape[1], -1)

    def _drop(self, kept: torch.Tensor) -> None:
        self.scores, self._queries = self.scores.gather(1, kept), self._queries.gather(1, kept)
        index = kept[None, :, :, None].expand(1, -1, -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)


def _padded(known: torch.Tensor, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    out = like.new_zeros(shape)
    if known.numel():
        out[:, : known.shape[1]] = known
    return out


class HeavyHitterCache(Cache):
    """A cache for one `generate` that holds a budget of tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `KVStoreCache` takes. While the cache is entered, its attention is watched.
    rule : H2O
        Budget, recent tokens and sinks.
    by_visibility : bool
        Weigh a key by its mean over the queries that could see it, instead of by H2O's own sum, by which early tokens
        win.

    Raises
    ------
    ConfigError
        The model's KV is not plain attention KV.

    Examples
    --------
    >>> with HeavyHitterCache(model, H2O(budget=512, recent=128)) as past:    # doctest: +SKIP
    ...     out = model.generate(**inputs, past_key_values=past)
    """

    def __init__(self, model: Any, rule: H2O, *, by_visibility: bool = True) -> None:
        self._model, self._rule = base_model(model), rule
        check_model(self._model)
        layers = int(self._model.config.num_hidden_layers)
        super().__init__(layers=[HeavyHitterLayer(rule, by_visibility) for _ in range(layers)])
        self._detour = Detour(self._model, self._attention, "sdpa")

    @property
    def kept(self) -> int:
        """Most tokens that a layer holds."""
        return max(layer.keys.shape[2] if layer.is_initialized else 0 for layer in self.layers)

    def begin(self, stored: LeasedPrompt) -> int:
        """Start with the stored beginning of a prompt; how many tokens of it were copied.

        Only those are that stay by the importance stored with them, the same ones in every layer and head: an H2O that
        happens before the transfer. The first pass computes what follows.

        Raises
        ------
        InvalidParams
            The blocks were stored without importance.
        LeaseExpired
            They are gone.
        """
        if not stored.tokens:
            return 0
        if stored.importance is None:
            raise InvalidParams(
                "H2O decoding: this prompt was stored without importance.",
                "Store it with KVStoreCache(importance=True).",
            )
        kept = self._rule.keep(stored.importance)
        for layer, block in zip(self.layers, stored.tokens_of(kept).to(self._model.device), strict=True):
            layer.begin(block, stored.importance[kept].to(block.device), kept, stored.tokens)
        return len(kept)

    @property
    def touched(self) -> int:
        """Bytes of keys and values that a step reads."""
        return sum(nbytes(layer.keys, layer.values) for layer in self.layers if layer.is_initialized)

    def __enter__(self) -> HeavyHitterCache:
        self._detour.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._detour.__exit__(*exc)

    def _attention(self, inner: Any, module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        out = inner(module, query, *rest, **options)
        self.layers[module.layer_idx].attended(query[0].transpose(0, 1))
        return out
