"""Which KV is the same KV: the namespace of a model as it is in memory now.

The weights in memory are what is hashed, not files: a model that was trained on, merged or edited after loading is
another model. A doubt is always decided for a namespace of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch

from kvstore.errors import ConfigError
from kvstore.keys import hash_salt
from kvstore.types import Namespace
from kvstore_connectors.transformers.layout import Layout

_ROPE_FIELDS = (
    "max_position_embeddings",
    "no_rope_layer_interval",
    "no_rope_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "position_embedding_type",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",
    "rotary_emb_base",
    "rotary_pct",
)
_NOT_OF_THE_KV = (
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)
"""Fields of a configuration that do not change a token's KV. All others are part of the identity."""

_STEP = 64 << 20
_SAMPLES = 1024


def model_layout(model: Any, block_tokens: int) -> Layout:
    """Layout of a model's blocks, from its configuration; what it computes is compared with that before each store."""
    from transformers import DynamicCache

    config = model.config
    heads = int(config.num_attention_heads)
    return Layout(
        layers=len(DynamicCache(config=config).layers),
        kv_heads=1 if _shares_one(config) else int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        block_tokens=block_tokens,
        dtype=model.dtype,
    )


def _shares_one(config: Any) -> bool:
    """Whether all heads share keys and values, in Falcon's words; its later models keep a copy for each head."""
    return bool(getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False))


def model_namespace(
    model: Any,
    decoder: Any,
    layout: Layout,
    *,
    revision: str = "",
    tenant: str = "",
    salt: str | None = None,
    weights: str = "full",
    adapters: Mapping[str, Any] | None = None,
    fidelity: str = "exact",
) -> Namespace:
    """Namespace of a model as it is in memory now.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    decoder : torch.nn.Module
        Its decoder; only what is in there changes KV.
    layout : Layout
    revision : str
        Whatever the user wants to add.
    tenant : str
    salt : str, optional
        Hashed at once.
    weights : str
        ``full`` or ``sample``, see `weights_digest`.
    adapters : mapping, optional
        PEFT's configurations of the adapters, by name.
    fidelity : str
        ``exact``, or ``lossy:PROFILE``.
    """
    config = model.config.to_dict()
    quantization = config.pop("quantization_config", None)
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_KV}
    digests = f"config:{_digest(canonical(kept))}|{weights}:{weights_digest(decoder, weights)}"
    return Namespace(
        model=_name(model),
        revision=f"{revision}|{digests}" if revision else digests,
        dtype=str(layout.dtype).removeprefix("torch."),
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        layout=layout.NAME,
        block_tokens=layout.block_tokens,
        rope=rope_text(model.config),
        attention="full",
        quantization=canonical(quantization) if quantization else "",
        fidelity=fidelity,
        lora=adapter_identity(decoder, adapters or {}, weights),
        tenant=tenant,
        salt=hash_salt(salt),
        engine="transformers",
    )


def _name(model: Any) -> str:
    """A local directory is named by its last component, so that hosts may keep it where they like."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    short = Path(name).name if name and Path(name).exists() else name
    return f"{short or 'unnamed'}/{type(model).__name__}"


def rope_text(config: Any) -> str:
    """RoPE parameters of a model in one canonical line: every field that is set, keys sorted."""
    found = {name: getattr(config, name) for name in _ROPE_FIELDS if getattr(config, name, None) is not None}
    return canonical(found)


def canonical(value: Any) -> str:
    """JSON with one spelling: keys sorted, sets as sorted lists, no spaces."""

    def other(one: Any) -> Any:
        return sorted(one, key=repr) if isinstance(one, set | frozenset) else repr(one)

    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=other)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# -- weights -----------------------------------------------------------------------------------------------------------


def stamp(decoder: Any) -> tuple[Any, ...]:
    """Something cheap that changes when weights or adapters do: the namespace has to be made again then.

    Sees tensors that were replaced, moved, or changed in place through torch. It does not see writes through `.data`
    or NumPy.
    """
    tensors = [*decoder.parameters(), *decoder.buffers()]
    return (tuple((t.data_ptr(), version(t)) for t in tensors), tuple(_adapter_states(decoder)))


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place; -1 where torch does not count (inference mode)."""
    return -1 if tensor.is_inference() else tensor._version


def weights_digest(decoder: Any, weights: str = "full") -> str:
    """Digest of a decoder's weights and buffers, adapters left out.

    Parameters
    ----------
    decoder : torch.nn.Module
    weights : str
        ``full``: every byte of every tensor, at about 1.5 GB/s a core. ``sample``: name, shape, type and 1,024 elements
        of every tensor, evenly spread; a change to a few rows of a large matrix can pass unseen.

    Raises
    ------
    ConfigError
        If a tensor's bytes can not be read.
    """
    adapters = {id(tensor) for _, _, tensor in _adapter_tensors(decoder, active_only=False)}
    tensors: dict[str, Any] = {}
    for name, value in [*decoder.state_dict(keep_vars=True).items(), *decoder.named_buffers()]:
        if id(value) not in adapters:
            # PEFT puts the layer it adapts one level deeper; that does not make it another layer.
            tensors[name.replace(".base_layer", "").replace(".original_module", "")] = value
    return _tensors_digest(sorted(tensors.items()), weights)


def _tensors_digest(tensors: list[tuple[str, Any]], weights: str) -> str:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(lambda item: _tensor_digest(item[1], weights), tensors))
    total = hashlib.sha256()
    for (name, _), part in zip(tensors, parts, strict=True):
        raw = name.encode("utf-8", "surrogatepass")
        total.update(struct.pack("<Q", len(raw)) + raw + part)
    return total.hexdigest()


def _tensor_digest(value: Any, weights: str) -> bytes:
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(repr(value).encode()).digest()
    out = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
    try:
        flat = value.detach().reshape(-1)
        if weights == "sample":
            flat = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous()
        raw = flat.view(torch.uint8)
        for start in range(0, raw.numel(), _STEP):
            out.update(cast("bytes", raw[start : start + _STEP].cpu().numpy()))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"transformers: weights of type {type(value).__name__} can not be read ({error}).",
            "Without a digest of the weights a changed model would be taken for the same.",
        ) from None
    return out.digest()


# -- adapters ----------------------------------------------------------------------------------------------------------
# PEFT is not imported: its layers are known by the attributes that all of them have.


def adapter_identity(decoder: Any, configs: Mapping[str, Any], weights: str = "full") -> str:
    """Names and digest of the active PEFT adapters; empty if there are none, or all are switched off.

    The digest covers the adapters' configuration, scaling and weights. An adapter that was merged is part of the
    weights instead.
    """
    states = [state for state in _adapter_states(decoder) if state]
    active = sorted({name for state in states for name in state[1]})
    if not active:
        return ""
    settings = {name: configs[name].to_dict() for name in active if hasattr(configs.get(name), "to_dict")}
    tensors = [(f"{place}/{attribute}", tensor) for place, attribute, tensor in _adapter_tensors(decoder, True)]
    digest = _digest(canonical([settings, states]) + _tensors_digest(sorted(tensors, key=_first), weights))
    return f"{'+'.join(active)}@{digest}"


def _first(item: tuple[str, Any]) -> str:
    return item[0]


def _adapter_layers(decoder: Any) -> Iterator[tuple[str, Any]]:
    for name, module in decoder.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "merged_adapters"):
            yield name, module


def _active(module: Any) -> list[str]:
    """Adapters that change what a layer computes now, other than through the weights of the layer itself."""
    if getattr(module, "disable_adapters", getattr(module, "_disable_adapters", False)):
        return []
    names = getattr(module, "active_adapters", None) or getattr(module, "_active_adapter", [])
    names = [names] if isinstance(names, str) else list(names)
    return [name for name in names if name not in module.merged_adapters]


def _adapter_states(decoder: Any) -> Iterator[tuple[Any, ...]]:
    for name, module in _adapter_layers(decoder):
        active = [one for one in _active(module) if one in _names(module)]
        scaling = getattr(module, "scaling", None)
        factors = [repr(scaling.get(one)) for one in active] if isinstance(scaling, dict) else []
        if active or module.merged_adapters:
            yield name, tuple(active), tuple(factors), tuple(module.merged_adapters)


def _names(module: Any) -> set[str]:
    """Adapters that a layer has weights of."""
    containers: list[Any] = [getattr(module, attribute, None) for attribute in module.adapter_layer_names]
    return {str(name) for container in containers if hasattr(container, "keys") for name in container}


def _adapter_tensors(decoder: Any, active_only: bool) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(place of the layer, name of the tensor in it, tensor) of adapters."""
    for place, module in _adapter_layers(decoder):
        wanted = set(_active(module))
        for attribute in module.adapter_layer_names:
            container = getattr(module, attribute, None)
            if not isinstance(container, torch.nn.Module):
                continue
            for name, tensor in container.state_dict(keep_vars=True, prefix=f"{attribute}.").items():
                of = name.removeprefix(f"{attribute}.").split(".")[0]
                if isinstance(tensor, torch.Tensor) and (not active_only or of in wanted):
                    yield place, name, tensor
