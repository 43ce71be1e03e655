"""A model's attention, sent past us: to see its queries and keys, or to compute it in another way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore.errors import ConfigError

Around = Callable[..., Any]
"""``around(inner, module, query, key, value, mask, **options)`` gives what ``inner`` of the rest would: output and
weights. Queries are ``[batch, head, query, dim]``, keys and values ``[batch, kv_head, token, dim]``."""

_number = count()


class Detour:
    """Has every layer of a model compute attention through a function of ours, while it is entered.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without a PEFT wrapper.
    around : callable
        See `Around`.
    inner : str
        Attention implementation that ``around`` is given; the model's own by default.

    Raises
    ------
    ConfigError
        The implementation is none that transformers' attention interface knows by name (``eager`` is not).
    """

    def __init__(self, model: Any, around: Around, inner: str = "") -> None:
        self._model, self._around = model, around
        self._inner = inner or str(model.config._attn_implementation)
        if self._inner not in ALL_ATTENTION_FUNCTIONS or self._inner not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ConfigError(
                f"transformers: attention of kind {self._inner!r} cannot be watched.",
                "Load the model with attn_implementation='sdpa'.",
            )
        self._name = f"kvstore_{next(_number)}"
        self._own = ""

    def __enter__(self) -> Detour:
        if self._own:
            raise ConfigError("transformers: this attention is in use already.", "Leave it before it is entered again.")
        inner, around = ALL_ATTENTION_FUNCTIONS[self._inner], self._around

        def attention(module: Any, *rest: Any, **options: Any) -> Any:
            return around(inner, module, *rest, **options)

        self._own = self._model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register(self._name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, ALL_MASK_ATTENTION_FUNCTIONS[self._inner])
        self._model.set_attn_implementation(self._name)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._own:
            return
        if self._model.config._attn_implementation == self._name:
            self._model.set_attn_implementation(self._own)
        self._own = ""
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(self._name, None)
