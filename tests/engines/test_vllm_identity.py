"""What must not be shared has another namespace; what is the same has the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvstore.errors import ConfigError
from kvstore.keys import namespace_digest
from kvstore.types import Namespace
from kvstore_connectors.vllm.config import ConnectorConfig, block_tokens_for
from kvstore_connectors.vllm.identity import (
    Scope,
    rank_namespace,
    request_namespace,
    request_scope,
    weights_digest,
)
from kvstore_connectors.vllm.support import check_address, check_supported


def settings(model: Path | str, **changes: Any) -> SimpleNamespace:
    """As much of vLLM's configuration as is read, with the given fields set."""
    text = SimpleNamespace(rope_theta=10_000.0, rope_scaling=None, max_position_embeddings=2048)
    hf = SimpleNamespace(_commit_hash=None, to_dict=dict)
    out = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            hf_config=hf,
            hf_text_config=text,
            quantization=None,
            dtype="torch.bfloat16",
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", cache_dtype="auto", calculate_kv_scales=False),
        speculative_config=None,
    )
    for path, value in changes.items():
        target = out
        *parents, name = path.split("__")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return out


def namespace(config: Any, **changes: Any) -> Namespace:
    fields: dict[str, Any] = {
        "layout": "lkthd1",
        "dtype": "bfloat16",
        "layers": 2,
        "kv_heads": 2,
        "head_dim": 64,
        "block_tokens": 256,
        "attention": "full",
        "rank": (0, 0),
    }
    return rank_namespace(config, **{**fields, **changes})


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


CHANGES: list[dict[str, Any]] = [
    {"model_config__dtype": "torch.float16"},
    {"model_config__quantization": "fp8"},
    {"model_config__hf_text_config__rope_theta": 500_000.0},
    {"model_config__hf_text_config__rope_scaling": {"factor": 2.0}},
    {"parallel_config__tensor_parallel_size": 2},
    {"parallel_config__pipeline_parallel_size": 2},
    {"cache_config__prefix_caching_hash_algo": "sha256_cbor"},
    {"speculative_config": SimpleNamespace(method="ngram", draft_model_config=None)},
]
FIELDS: list[dict[str, Any]] = [
    {"layout": "vllm-page1:00"},
    {"dtype": "float32"},
    {"layers": 3},
    {"kv_heads": 1},
    {"head_dim": 128},
    {"block_tokens": 512},
    {"attention": "mla"},
    {"rank": (0, 1)},
    {"rank": (1, 0)},
    {"tenant": "b"},
]


def test_each_thing_that_matters_makes_another_namespace(model: Path) -> None:
    seen = [namespace(settings(model))]
    seen += [namespace(settings(model, **change)) for change in CHANGES]
    seen += [namespace(settings(model), **change) for change in FIELDS]
    digests = [namespace_digest(one) for one in seen]
    assert len(set(digests)) == len(digests)
    assert namespace(settings(model)) == seen[0]


def test_every_field_of_a_namespace_is_filled_on_purpose(model: Path) -> None:
    """A field that is added to the vocabulary has to be thought of here."""
    known = (
        "model revision dtype layers kv_heads head_dim layout block_tokens rope attention quantization fidelity "
        "tp_rank tp_size pp_rank pp_size lora tenant salt engine"
    )
    assert list(Namespace.__struct_fields__) == known.split()
    assert namespace(settings(model)).fidelity == "exact"


def test_ranks_share_one_copy_of_a_latent(model: Path) -> None:
    wide = settings(model, parallel_config__tensor_parallel_size=4)
    assert namespace(wide, attention="mla", rank=(0, 3)) == namespace(wide, attention="mla", rank=(0, 0))
    assert namespace(wide, rank=(0, 3)) != namespace(wide, rank=(0, 0))


def test_weights_are_told_apart_and_copies_are_not(model: Path, tmp_path: Path) -> None:
    digest = weights_digest(model)
    twin = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    os.utime(twin / "model.safetensors", (1, 1))
    assert weights_digest(twin) == digest
    assert weights_digest(model, full=True) != digest

    (model / "README.md").write_text("not a weight")
    assert weights_digest(model) == digest
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}))
    assert weights_digest(model) != digest


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_retrained_tensor_is_another_model(model: Path, tensor: str) -> None:
    from safetensors.torch import load_file, save_file

    digest = weights_digest(model)
    weights = load_file(model / "model.safetensors")
    weights[tensor] = weights[tensor] * 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(model) != digest


def test_hub_models_need_a_commit() -> None:
    named = settings("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match="revision"):
        namespace(named)
    named.model_config.hf_config._commit_hash = "0e9e39f249a16976918f6564b8830bc894c89659"
    assert namespace(named).revision.endswith("c89659")


def request(**fields: Any) -> Any:
    return SimpleNamespace(**{"lora_request": None, "cache_salt": None, **fields})


def test_adapters_and_salts_are_part_of_a_request(model: Path, tmp_path: Path) -> None:
    base = namespace(settings(model))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(bytes(1000))

    def with_adapter(name: str, path: Path) -> Namespace:
        lora = SimpleNamespace(lora_name=name, lora_path=str(path))
        return request_namespace(base, request_scope(request(lora_request=lora)))

    first = with_adapter("french", adapter)
    assert first == with_adapter("french", adapter)
    others = [
        base,
        with_adapter("german", adapter),
        with_adapter("french", tmp_path / "gone"),
        request_namespace(base, request_scope(request(cache_salt="a"))),
        request_namespace(base, request_scope(request(cache_salt="b"))),
        request_namespace(base, Scope(epoch="1")),
    ]
    (adapter / "adapter_model.safetensors").write_bytes(bytes(999) + b"\x01")
    others.append(with_adapter("french", adapter))  # trained on, under the same name
    digests = {namespace_digest(one) for one in [first, *others]}
    assert len(digests) == len(others) + 1


def test_salts_do_not_travel_in_clear() -> None:
    scope = request_scope(request(cache_salt="my secret"))
    assert scope.salt
    assert "secret" not in str(msgspec.to_builtins(Namespace(model="m", salt=scope.salt)))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_checked_at_start() -> None:
    assert ConnectorConfig.from_extra({}).async_load is True
    assert ConnectorConfig.from_extra({"async_load": "false", "block_tokens": 512}).block_tokens == 512
    with pytest.raises(ConfigError, match="Did you mean 'lookup_deadline_ms'"):
        ConnectorConfig.from_extra({"lookup_deadline": 10})
    for bad in ({"block_tokens": 2.5}, {"load_deadline_ms": 0}, {"async_load": 1}, {"address": 7}, {"token": None}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ConnectorConfig.from_extra(bad)


def test_daemons_without_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_address("")
    check_address("/run/kvstore.sock")
    with pytest.raises(ConfigError, match="shared memory"):
        check_address("tcp://host:7071")
    monkeypatch.setenv("KVSTORE_CLIENT_ADDRESS", "tcp://host:7071")
    with pytest.raises(ConfigError, match="kvstore serve"):
        check_address("")


def test_block_tokens_follow_the_engines_blocks() -> None:
    assert [block_tokens_for(ConnectorConfig(), size) for size in (16, 32, 96, 512)] == [256, 256, 288, 512]
    with pytest.raises(ConfigError, match="not a multiple"):
        block_tokens_for(ConnectorConfig(block_tokens=100), 32)


# -- what is refused ---------------------------------------------------------------------------------------------------


def cache_config(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def full_attention(**fields: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(**{"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32, **fields})


def test_full_attention_is_supported(model: Path) -> None:
    spec = full_attention()
    assert check_supported(settings(model), cache_config(spec)) is spec


@pytest.mark.parametrize("fields", [{"sliding_window": 128}, {"attention_chunk_size": 64}, {"non_causal": True}])
def test_other_attention_is_refused(model: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        check_supported(settings(model), cache_config(full_attention(**fields)))


def test_sliding_windows_are_refused_by_name(model: Path) -> None:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    spec = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64)
    with pytest.raises(ConfigError, match="a sliding window"):
        check_supported(settings(model), cache_config(spec))


def test_several_groups_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="2 groups"):
        check_supported(settings(model), cache_config(full_attention(), full_attention()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cache_config__prefix_caching_hash_algo": "xxhash"}, "--prefix-caching-hash-algo"),
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype auto"),
        ({"cache_config__calculate_kv_scales": True}, "scales"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
    ],
)
def test_settings_that_would_break_identity_are_refused(model: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_supported(settings(model, **change), cache_config(full_attention()))
