"""What the connector needs of a model and of vLLM's settings, said at start and in one sentence."""

from __future__ import annotations

import os
from typing import Any

from kvstore.client.address import parse_address
from kvstore.errors import ConfigError
from kvstore_connectors.base import log

_WITHOUT = "Run this model without the connector."
_HASHES = ("sha256", "sha256_cbor")
_CACHE_TYPES = ("auto", "float16", "bfloat16", "float32", "half", "float")


def check_supported(vllm_config: Any, kv_cache_config: Any) -> Any:
    """The specification of the model's one group of layers.

    Raises
    ------
    ConfigError
        If blocks of this model, stored by prefix, would not be the whole truth about its state.
    """
    _check_settings(vllm_config)
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        raise ConfigError(
            f"vllm: this model keeps {len(groups)} groups of KV ({', '.join(kinds)}); kvstore supports one group of "
            "full attention or MLA.",
            _WITHOUT,
        )
    spec = groups[0].kv_cache_spec
    _check_spec(spec)
    return spec


def check_address(address: str) -> None:
    """Refuse a daemon on another host: blocks travel through shared memory.

    Raises
    ------
    ConfigError
    """
    if not isinstance(parse_address(address or None), str):
        raise ConfigError(
            f"vllm: the daemon at {address or 'KVSTORE_CLIENT_ADDRESS'} is reached over TCP, without shared memory.",
            "Run `kvstore serve` on this host and give the path of its socket as `address`.",
        )


def _check_settings(vllm_config: Any) -> None:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if cache.prefix_caching_hash_algo not in _HASHES:
        raise ConfigError(
            f"vllm: block hashes of type {cache.prefix_caching_hash_algo!r} are no identity; kvstore needs SHA-256.",
            "Start vLLM with --prefix-caching-hash-algo sha256_cbor.",
        )
    if str(cache.cache_dtype) not in _CACHE_TYPES or getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            f"vllm: a KV cache of type {cache.cache_dtype!r} is not supported; its scales are no part of a block.",
            "Start vLLM with --kv-cache-dtype auto.",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"vllm: {name} above 1 is not supported: ranks hold parts of a block's tokens.", _WITHOUT)


def _check_spec(spec: Any) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    kind = type(spec)
    if kind is not FullAttentionSpec and kind is not MLAAttentionSpec:
        what = "a sliding window" if "SlidingWindow" in kind.__name__ else f"KV of kind {kind.__name__}"
        raise ConfigError(f"vllm: layers with {what} are not supported; only full attention and MLA are.", _WITHOUT)
    limits = {
        "a sliding window": getattr(spec, "sliding_window", None),
        "chunked attention": getattr(spec, "attention_chunk_size", None),
        "attention that is not causal": getattr(spec, "non_causal", False),
        "quantized KV": int(getattr(spec, "kv_quant_mode", 0) or 0),
        "packed states": getattr(spec, "state_content_bytes", None),
        "compressed states": getattr(spec, "tokens_per_state", 1) != 1,
        "padded pages": getattr(spec, "page_size_padded", None),
    }
    for what, value in limits.items():
        if value:
            raise ConfigError(f"vllm: layers with {what} are not supported; only full attention and MLA are.", _WITHOUT)


def fix_hash_seed() -> None:
    """Make old vLLM hash prompts alike in every process.

    Up to 0.26 the root of a prompt's hashes is random unless PYTHONHASHSEED is set, so nothing would be found again
    after a restart. It is read after the connector was made, and only the hash function's seed depends on it.
    """
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "DEFAULT_NONE_HASH_SEED") and os.environ.get("PYTHONHASHSEED") is None:
        os.environ["PYTHONHASHSEED"] = "0"
        log.info("kvstore: PYTHONHASHSEED set to 0, so that this vLLM hashes prompts alike in every process.")


def recompute_on_failure(transfer_config: Any) -> None:
    """See to it that a load that fails is recomputed: vLLM's default would end the request with an error."""
    if transfer_config.kv_load_failure_policy == "recompute":
        return
    try:
        transfer_config.kv_load_failure_policy = "recompute"
    except Exception:  # a frozen configuration
        log.warning("kvstore: set kv_load_failure_policy to 'recompute', else a failed load ends its request.")
