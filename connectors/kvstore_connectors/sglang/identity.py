"""Which KV is the same KV: the namespace of one rank of SGLang.

SGLang's page hashes cover tokens, images, adapters' ids and cache salts. The namespace adds what they do not know:
weights, types, shapes, layout, ranks. A doubt is always decided for a namespace of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.types import Namespace
from kvstore_connectors.sglang.config import BackendConfig
from kvstore_connectors.sglang.pages import HostPages
from kvstore_connectors.sglang.updates import arguments
from kvstore_connectors.weights import weights_digest

_REVISION = "Give the commit or a digest of the weights as `revision` in --hicache-storage-backend-extra-config."

_FROM_FILES = ("auto", "bitsandbytes", "fastsafetensors", "gguf", "layered", "mistral", "npcache", "pt", "safetensors")
"""Load formats with which the model's files are what is loaded."""

_COMPUTED_IN = ("quantization", "dtype", "kv_cache_dtype", "modelopt_quant", "rl_quant_profile", "quantize_and_serve")
"""Arguments that say in which types SGLang computes and keeps KV."""


def rank_namespace(storage: Any, pages: HostPages, config: BackendConfig) -> Namespace:
    """Namespace of one rank.

    Parameters
    ----------
    storage : sglang.srt.mem_cache.hicache_storage.HiCacheStorageConfig
    pages : HostPages
    config : BackendConfig

    Raises
    ------
    ConfigError
        If it is not known which weights these are, or ranks hold parts of a page.
    """
    if storage.dcp_size > 1:
        raise ConfigError(
            "sglang: decode context parallelism is not supported: ranks hold parts of a page's tokens.",
            "Start SGLang with --dcp-size 1, or with one of its own storage backends.",
        )
    known = arguments()
    if known is None:
        name, revision, args = _given(storage, pages, config)
    else:
        started, args = known
        name, revision = _model(started, args, config)
    # With MLA every tensor rank holds the same latent, so all of them share one copy.
    replicated = pages.kind == "mla"
    context = f"/cp{storage.attn_cp_rank}of{storage.attn_cp_size}" if storage.attn_cp_size > 1 else ""
    return Namespace(
        model=name,
        revision=revision,
        dtype=pages.dtype,
        layers=pages.layers,
        kv_heads=pages.heads,
        head_dim=pages.head_dim,
        layout=f"sglang1/{pages.kind}/{pages.layout}/{pages.shape}{context}",
        block_tokens=pages.tokens,
        rope=str(args.get("json_model_override_args") or ""),
        attention="mla" if replicated else "full",
        quantization=_computed_in(args),
        tp_rank=0 if replicated else storage.tp_rank,
        tp_size=1 if replicated else storage.tp_size,
        pp_rank=storage.pp_rank,
        pp_size=storage.pp_size,
        tenant=config.tenant,
        engine="sglang/sha256",
    )


def _given(storage: Any, pages: HostPages, config: BackendConfig) -> tuple[str, str, dict[str, Any]]:
    """Name and revision where no engine can be asked."""
    if not config.revision or not storage.model_name:
        raise ConfigError("sglang: it is not known which model and weights these are.", _REVISION)
    if pages.dtype == "uint8":
        raise ConfigError("sglang: it is not known which 8-bit type this KV cache has.", "Start a whole engine.")
    return Path(storage.model_name).name, f"given:{config.revision}", {}


def _model(started: dict[str, Any], args: dict[str, Any], config: BackendConfig) -> tuple[str, str]:
    """Name and revision of the model, with its drafts and its adapters."""
    if args["weight_version"] != started["weight_version"]:
        raise ConfigError(
            "sglang: the weights were changed at run time; what they are now is not known.",
            "Start SGLang again with these weights.",
        )
    path, load_format = str(args["model_path"]), args["load_format"]
    if config.revision:
        revision = f"given:{config.revision}"
    elif started["hicache_storage_backend"] is None:
        raise ConfigError("sglang: attached to an engine whose weights may have been changed before.", _REVISION)
    elif load_format == "dummy":
        revision = f"dummy:{args['random_seed']}:{_configuration(Path(path))}"
    elif load_format in _FROM_FILES and not args.get("custom_weight_loader"):
        revision = _weights(path, args["revision"], config)
    else:
        raise ConfigError(f"sglang: what --load-format {load_format} loads can not be told from files.", _REVISION)
    if draft := args.get("speculative_draft_model_path"):
        revision += "|draft:" + _weights(draft, args.get("speculative_draft_model_revision"), config)
    return Path(path).name, revision + _adapters(args, config)


def _weights(model: str, revision: str | None, config: BackendConfig) -> str:
    path = Path(model)
    if path.exists():
        return f"{config.weights_digest}:{weights_digest(path, config.weights_digest == 'full')}"
    return f"commit:{_commit(model, revision)}"


def _commit(model: str, revision: str | None) -> str:
    """The commit of a model of the hub, which is the name of the folder that it was downloaded to."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(found, str):
        raise ConfigError(f"sglang: it is not known which revision of {model!r} was loaded.", _REVISION)
    return Path(found).parent.name


def _configuration(path: Path) -> str:
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"sglang: {path} with dummy weights has no config.json to be told by.", _REVISION)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _adapters(args: dict[str, Any], config: BackendConfig) -> str:
    """Adapters given at start: SGLang tells them by name and path, so what is there is told here.

    Adapters that are added later have random ids and never meet an older page.
    """
    given = [(one["lora_name"], one["lora_path"]) for one in args.get("lora_paths") or ()]
    if path := args.get("uno_lora_path"):
        given.append(("uno", path))
    if not given:
        return ""
    found = sorted((str(name), _weights(str(path), None, config)) for name, path in given)
    return "|lora:" + hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _computed_in(args: dict[str, Any]) -> str:
    """Types of weights, arithmetic and cache, and the scales of an 8-bit cache where they are no part of the model."""
    types = [str(args.get(name) or "") for name in _COMPUTED_IN]
    if scales := args.get("quantization_param_path"):
        types.append(hashlib.sha256(Path(scales).read_bytes()).hexdigest())
    return "/".join(types)
