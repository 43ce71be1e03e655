"""What the connector needs of a model and of a prompt; anything else is refused in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore.errors import ConfigError, InvalidParams
from kvstore.keys import as_token_array

_WITHOUT = "Call the model's own generate()."
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

Rows = NDArray[np.int32]
"""Token ids of a batch, [batch, token], little-endian."""


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(model: Any) -> Any:
    """The decoder inside a model: the module that turns token ids and a cache into hidden states.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Without a PEFT wrapper.

    Raises
    ------
    ConfigError
        If KV of this model, stored by prefix, would not be the whole truth about its state.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refused("this is an encoder-decoder model; only decoders are supported")
    if config.get_text_config(decoder=True) is not config:
        raise _refused("this model takes more than text, and token ids do not tell what it saw")
    if not model.can_generate():
        raise _refused(f"{type(model).__name__} can not generate text")
    decoder = model.get_decoder()
    if decoder is None:
        raise _refused(f"{type(model).__name__} does not say which of its modules is the decoder")
    _check_cache(config)
    _check_attention(config, decoder)
    _check_placement(model)
    return decoder


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"transformers: {reason}.", _WITHOUT)


def _check_cache(config: Any) -> None:
    if getattr(config, "kv_lora_rank", None):
        raise _refused("models with latent attention (MLA) are not supported")
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if kinds != {DynamicLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise _refused(
            f"every layer must keep full attention KV, and this model's cache is made of {names} "
            "(sliding windows, hybrid and state space models are not supported)"
        )


def _check_attention(config: Any, decoder: Any) -> None:
    if getattr(config, "use_bidirectional_attention", None) or any(
        getattr(module, "is_causal", True) is False for module in decoder.modules()
    ):
        raise _refused("attention is not causal, so a token's KV depends on what follows it")
    for kind in sorted(_rope_kinds(config) & set(_LENGTH_DEPENDENT_ROPE)):
        raise _refused(f"with RoPE of type {kind!r} a token's keys depend on the length of the whole prompt")


def _rope_kinds(config: Any) -> set[str]:
    kinds: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None) or {}
        for one in (found, *found.values()):
            if isinstance(one, dict):
                kinds.add(str(one.get("rope_type", one.get("type", ""))))
    return kinds


def _check_placement(model: Any) -> None:
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise _refused(f"all weights must be on one device, not on {', '.join(sorted(devices))}")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise _refused("a tensor-parallel model holds a part of the KV only")


def check_adapters(configs: Mapping[str, Any]) -> None:
    """Refuse PEFT methods that change what a position of the cache means.

    Raises
    ------
    ConfigError
    """
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise _refused(f"adapter {name!r} puts virtual tokens before the prompt, which is not supported")


def token_rows(input_ids: Any) -> Rows:
    """Token ids of a prompt, or of a batch of prompts of one length, as [batch, token].

    Parameters
    ----------
    input_ids : Tensor, ndarray or sequence of int
        One- or two-dimensional.

    Raises
    ------
    InvalidParams
        If it is neither, or empty.
    """
    ids = np.asarray(input_ids.detach().cpu() if hasattr(input_ids, "detach") else input_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidParams(f"input_ids: expected token ids [batch, token], got {ids.dtype} {list(ids.shape)}.", "")
    return as_token_array(np.ascontiguousarray(ids).reshape(-1)).reshape(ids.shape)


def check_padding(rows: Rows, attention_mask: Any, generation_config: Any) -> None:
    """Refuse prompts of which the model would not see every token.

    Without a mask transformers makes one from the pad token, if that is not also the end token; so it is refused here.

    Raises
    ------
    InvalidParams
        If a token is masked or would be.
    """
    remedy = "Give prompts of different lengths one at a time, or use the model's own generate()."
    if attention_mask is not None:
        mask = np.asarray(attention_mask.detach().cpu() if hasattr(attention_mask, "detach") else attention_mask)
        if mask.size != rows.size or not mask.all():
            raise InvalidParams("attention_mask: it hides tokens; padded prompts are not supported.", remedy)
        return
    pad, end = (_ids(getattr(generation_config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    if pad and not pad & end and np.isin(rows, list(pad)).any():
        raise InvalidParams("input_ids: there are pad tokens; padded prompts are not supported.", remedy)


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(one) for one in (value if isinstance(value, list | tuple) else [value])}
