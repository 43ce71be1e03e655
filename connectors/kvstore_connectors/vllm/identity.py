"""Which KV is the same KV: the namespace of an engine's rank, and of a request in it.

vLLM's block hashes cover tokens, multimodal inputs, adapters' names and cache salts. The namespace adds what they do
not know: weights, types, shapes, page layout, RoPE, ranks. A doubt is always decided for a namespace of its own.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvstore.errors import ConfigError
from kvstore.keys import hash_salt
from kvstore.types import Namespace
from kvstore_connectors.weights import weights_digest

_ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "position_embedding_type",
    "no_rope_layers",
    "no_rope_layer_interval",
)


def rank_namespace(
    vllm_config: Any,
    *,
    layout: str,
    dtype: str,
    layers: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    attention: str,
    rank: tuple[int, int],
    tenant: str = "",
    weights: str = "sample",
    fidelity: str = "exact",
) -> Namespace:
    """Namespace of one rank of an engine.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
    layout, dtype, layers, kv_heads, head_dim, block_tokens, attention
        As in `kvstore.types.Namespace`; of this rank.
    rank : (int, int)
        Pipeline and tensor rank.
    tenant : str
    weights : str
        ``sample`` or ``full``, see `weights_digest`.
    fidelity : str
        ``exact``, or ``lossy:PROFILE``.
    """
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    pp_rank, tp_rank = rank
    # With MLA every tensor rank holds the same latent, so all of them share one copy.
    replicated = attention == "mla"
    loaded = str(getattr(getattr(vllm_config, "load_config", None), "load_format", ""))
    name, revision = model_identity(model_config, weights, dummy=loaded == "dummy")
    return Namespace(
        model=name,
        revision=revision + _draft_identity(vllm_config, weights),
        dtype=dtype,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layout=layout,
        block_tokens=block_tokens,
        rope=rope_text(model_config.hf_text_config),
        attention=attention,
        quantization=f"{model_config.quantization or ''}/{str(model_config.dtype).removeprefix('torch.')}",
        tp_rank=0 if replicated else tp_rank,
        tp_size=1 if replicated else parallel.tensor_parallel_size,
        pp_rank=pp_rank,
        pp_size=parallel.pipeline_parallel_size,
        fidelity=fidelity,
        tenant=tenant,
        engine=f"vllm/{vllm_config.cache_config.prefix_caching_hash_algo}",
    )


class Scope(NamedTuple):
    """What sets a request apart from others of its engine.

    Attributes
    ----------
    lora : str
        Adapter, name and digest.
    salt : str
        Hash of the cache salt.
    epoch : str
        Set anew when the engine's caches were reset because its weights may have changed.
    """

    lora: str = ""
    salt: str = ""
    epoch: str = ""


@lru_cache(maxsize=1024)
def request_namespace(base: Namespace, scope: Scope) -> Namespace:
    """Namespace of a request: that of its rank, and what sets the request apart."""
    if scope == Scope():
        return base
    revision = f"{base.revision}|reset:{scope.epoch}" if scope.epoch else base.revision
    return msgspec.structs.replace(base, lora=scope.lora, salt=scope.salt, revision=revision)


def request_scope(request: Any, epoch: str = "") -> Scope:
    """Scope of a vLLM request.

    The salt is hashed at once, whatever text it is; an adapter is its name and a digest of its files, or its path where
    they can not be read here.
    """
    lora = request.lora_request
    adapter = ""
    if lora is not None:
        adapter = f"{lora.lora_name}@{_adapter_digest(lora.lora_path or '')}"
    return Scope(adapter, hash_salt(request.cache_salt), epoch)


def model_identity(model_config: Any, weights: str = "sample", *, dummy: bool = False) -> tuple[str, str]:
    """Name and revision of a model.

    A local directory is named by its last component, so that hosts may keep it where they like, and identified by
    `weights_digest`. Random weights (``dummy``) are known by their seed. A model from the hub is identified by the
    commit that its configuration was loaded from.

    Raises
    ------
    ConfigError
        If neither is known: then a changed model would be taken for the same.
    """
    path = Path(model_config.model)
    if dummy:
        return path.name, f"dummy:{model_config.seed}:{_json_digest(model_config.hf_config)}"
    if path.exists():
        return path.name, f"{weights}:{weights_digest(path, weights == 'full')}"
    commit = getattr(model_config.hf_config, "_commit_hash", None) or model_config.revision
    if not commit:
        raise ConfigError(
            f"vllm: it is not known which revision of {model_config.model!r} was loaded.",
            "Give vLLM a --revision, or a local directory.",
        )
    return str(model_config.model), f"commit:{commit}"


def _draft_identity(vllm_config: Any, weights: str) -> str:
    """Draft layers (EAGLE, MTP) keep KV in the same cache, so their weights are part of its identity."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if speculative is None:
        return ""
    if draft is None:
        return f"|{speculative.method}"
    return f"|{speculative.method}:{'@'.join(model_identity(draft, weights))}"


def rope_text(config: Any) -> str:
    """RoPE parameters of a model in one canonical line; every field that is set, keys sorted."""
    found = {name: getattr(config, name) for name in _ROPE_FIELDS if getattr(config, name, None) is not None}
    return json.dumps(found, sort_keys=True, separators=(",", ":"), default=repr)


def _adapter_digest(path: str) -> str:
    try:
        return weights_digest(Path(path)) if path and Path(path).exists() else f"path:{path}"
    except (OSError, ConfigError):
        return f"path:{path}"


def _json_digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=repr).encode()).hexdigest()
