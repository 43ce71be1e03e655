"""KV that is not the same is never found under the same name; what can not be told or kept is refused at start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import Daemon
from pools import backend, content, device_pool, engine, fill, host_pool, indices, storage_config
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.runtime_context import get_context
from test_contract import hashes

from kvstore.errors import ConfigError

Make = Callable[..., Any]

MHA = "page_first"

OTHERS: dict[str, dict[str, Any]] = {
    "rank": {"told": {"tp_rank": 1}},
    "number of ranks": {"told": {"tp_size": 4}},
    "pipeline rank": {"told": {"pp_rank": 1, "pp_size": 2}},
    "context rank": {"told": {"attn_cp_rank": 1, "attn_cp_size": 2}},
    "model": {"told": {"model_name": "models/other"}},
    "weights": {"extra": {"revision": "another"}},
    "tenant": {"extra": {"tenant": "another"}},
    "layout of the same shape": {"layout": "layer_first"},
    "type of the same size": {"shape": {"dtype": torch.float16}},
    "heads of the same size": {"shape": {"head_num": 4, "head_dim": 8}},
    "layers": {"shape": {"layers": 2}},
    "place of its layers": {"start_layer": 4},
}


@pytest.mark.parametrize("what", OTHERS)
def test_wrong_pages_are_never_found(daemon: Daemon, make: Make, what: str) -> None:
    """The same page hashes in an engine that differs in one thing: a miss, and its pool stays as it is."""
    other = OTHERS[what]
    source = host_pool("mha", MHA)
    fill(source, 1)
    ours = make(source, {"address": daemon.address}, tp_size=2, pp_size=1)
    keys = hashes(2)
    assert all(ours.batch_set_v1(keys, indices([0, 1])))
    shape = other.get("shape", {})
    pool = host_pool("mha", other.get("layout", MHA), start_layer=other.get("start_layer", 0), **shape)
    fill(pool, 2)
    before = pool.kv_buffer.view(torch.uint8).clone()
    theirs = make(
        pool, {"address": daemon.address, **other.get("extra", {})}, **{"tp_size": 2, **other.get("told", {})}
    )
    assert theirs.batch_exists(keys) == 0
    assert theirs.batch_get_v1(keys, indices([0, 1])) == [False, False]
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before)
    assert ours.batch_exists(keys) == 2


def test_every_rank_has_its_own_pages(daemon: Daemon, make: Make) -> None:
    """Two tensor ranks store other heads under the same hashes, and each gets its own back."""
    pools = [host_pool("mha", MHA) for _ in range(2)]
    ranks = [make(pool, {"address": daemon.address}, tp_size=2, tp_rank=rank) for rank, pool in enumerate(pools)]
    keys = hashes(1)
    for seed, (pool, rank) in enumerate(zip(pools, ranks, strict=True)):
        fill(pool, seed)
        assert rank.batch_set_v1(keys, indices([0])) == [True]
    for pool, rank in zip(pools, ranks, strict=True):
        assert rank.batch_get_v1(keys, indices([9])) == [True]
        assert content(pool, 9) == content(pool, 0)
    assert content(pools[0], 9) != content(pools[1], 9)


def test_ranks_of_mla_share_one_copy(daemon: Daemon, make: Make) -> None:
    """SGLang lets one rank store what all hold; every rank loads it, however many there are."""
    source, target = host_pool("mla", MHA), host_pool("mla", MHA)
    fill(source, 3)
    writer = make(source, {"address": daemon.address}, "mla", tp_size=2, tp_rank=0)
    reader = make(target, {"address": daemon.address}, "mla", tp_size=8, tp_rank=5)
    keys = hashes(1)
    assert writer.batch_set_v1(keys, indices([0])) == [True]
    assert reader.batch_get_v1(keys, indices([4])) == [True]
    assert content(target, 4) == content(source, 0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_kinds_of_pools_that_are_refused(daemon: Daemon) -> None:
    """Pools whose pages are more, or less, than their one buffer."""

    class Derived(MHATokenToKVPoolHost):
        """As SGLang derives pools that keep more."""

    asymmetric = host_pool("mha", MHA, v_head_dim=8)
    derived = host_pool("mha", MHA)
    derived.__class__ = Derived
    sharded = host_pool("mla", MHA)
    sharded._layer_shard_enabled = True
    dummy = host_pool("mla", MHA)
    dummy.kv_buffer = None
    unknown = host_pool("mha", MHA)
    unknown.layout = "page_first_kv_split"
    for pool, kind in [(asymmetric, "mha"), (derived, "mha"), (sharded, "mla"), (dummy, "mla"), (unknown, "mha")]:
        with pytest.raises(ConfigError, match=r"not supported|could be read"):
            backend(pool, {"address": daemon.address}, kind)


def test_ranks_that_hold_parts_of_a_page_are_refused(daemon: Daemon) -> None:
    """Decode context parallelism spreads a page's tokens over ranks."""
    how = {"tp_size": 2, "dcp_size": 2, "logical_page_size": 8}
    with pytest.raises(ConfigError, match="decode context parallelism"):
        backend(host_pool("mla", MHA), {"address": daemon.address}, "mla", **how)


def test_other_pools_of_a_model_are_refused(daemon: Daemon, make: Make) -> None:
    """A prefix that needs states, windows or drafts as well is never told as found, let alone loaded."""
    pool = host_pool("mha", MHA)
    ours = make(pool, {"address": daemon.address})
    keys = hashes(2)
    ours.register_mem_host_pool_v2(pool, PoolName.KV)
    assert all(ours.batch_set_v1(keys, indices([0, 1])))
    window = PoolTransfer(name=PoolName.SWA, keys=keys, host_indices=indices([0, 1]))
    assert ours.batch_exists_v2(keys, [window]).kv_hit_pages == 0
    assert ours.batch_get_v2([window]) == {PoolName.SWA: [False, False]}
    assert ours.batch_set_v2([window]) == {PoolName.SWA: [False, False]}
    assert ours.batch_exists(keys) == 2
    with pytest.raises(ConfigError, match="pool 'swa' besides its KV"):
        ours.register_mem_host_pool_v2(host_pool("mha", MHA), PoolName.SWA)
    assert ours.batch_exists(keys) == 0
    with pytest.raises(ConfigError, match="pool 'kv'"):
        ours.register_mem_host_pool_v2(host_pool("mha", MHA), PoolName.KV)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"adress": "/x"}, "Did you mean 'address'"),
        ({"load_deadline_ms": "soon"}, "not a number"),
        ({"load_deadline_ms": -1}, "not between"),
        ({"load_deadline_ms": True}, "not a number"),
        ({"tenant": 3}, "not text"),
        ({"address": "tcp://10.0.0.1:7000"}, "over TCP"),
        ({"weights_digest": "some"}, "neither"),
        ({"revision": ""}, "not known which model"),
    ],
)
def test_settings_that_are_refused(extra: dict[str, Any], said: str) -> None:
    """At start, by name, with what to do instead."""
    with pytest.raises(ConfigError, match=said):
        backend(host_pool("mha", MHA), {"address": "/nowhere", **extra})


def test_sglangs_own_keys_are_let_through() -> None:
    """What SGLang reads from the same dictionary is no mistake of the user's."""
    own = {"prefetch_threshold": 256, "prefetch_timeout_base": 1, "allocator": "shm", "file_storage_path": "/x"}
    made = StorageBackendFactory.create_backend("dynamic", storage_config(own), None)
    assert made.batch_exists(hashes(1)) == 0
    made.close()


# -- inside an engine --------------------------------------------------------------------------------------------------


def model(folder: Path, seed: int, **config: Any) -> str:
    """A directory as models come in, with one small file of weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": weights}, folder / "model.safetensors")
    return str(folder)


def test_engines_are_told_apart_by_what_they_run(daemon: Daemon, make: Make, tmp_path: Path) -> None:
    """Without a `revision`: by the weights' files and what SGLang was started with; a copy is the same model."""
    given = model(tmp_path / "a" / "m", 1)
    adapter = model(tmp_path / "adapter", 5)
    scales = tmp_path / "scales.json"
    scales.write_text("{}")
    engines: list[dict[str, Any]] = [
        {"model_path": given},
        {"model_path": model(tmp_path / "b" / "m", 2)},
        {"model_path": model(tmp_path / "c" / "m", 1, rope_theta=5.0)},
        {"model_path": model(tmp_path / "d" / "other", 1)},
        {"model_path": given, "quantization": "fp8"},
        {"model_path": given, "kv_cache_dtype": "fp8_e5m2"},
        {"model_path": given, "kv_cache_dtype": "fp8_e4m3"},
        {"model_path": given, "kv_cache_dtype": "fp8_e4m3", "quantization_param_path": str(scales)},
        {"model_path": given, "json_model_override_args": '{"rope_theta": 7}'},
        {"model_path": given, "speculative_draft_model_path": model(tmp_path / "draft", 3)},
        {"model_path": given, "load_format": "dummy", "random_seed": 1},
        {"model_path": given, "load_format": "dummy", "random_seed": 2},
        {"model_path": given, "lora_paths": [LoRARef(lora_name="one", lora_path=adapter)]},
        {"model_path": given, "lora_paths": [LoRARef(lora_name="two", lora_path=adapter)]},
    ]
    pool = host_pool("mha", MHA)

    def digest(arguments: dict[str, Any]) -> str:
        with engine(**arguments):
            return repr(make(pool, {"address": daemon.address, "revision": ""})._transfers.namespace)

    found = [digest(arguments) for arguments in engines]
    assert len(set(found)) == len(engines)
    assert digest({"model_path": model(tmp_path / "e" / "m", 1)}) == found[0]
    assert str(tmp_path) not in "".join(found)


def test_weights_that_can_not_be_told_are_refused(daemon: Daemon, tmp_path: Path) -> None:
    """What was never downloaded, has no files or is not loaded from them, or may be other by now."""
    (tmp_path / "empty").mkdir()
    pool, given = host_pool("mha", MHA), model(tmp_path / "m", 1)
    for arguments in (
        {"model_path": "nobody/never-heard-of"},
        {"model_path": str(tmp_path / "empty")},
        {"model_path": str(tmp_path / "empty"), "load_format": "dummy"},
        {"model_path": given, "load_format": "remote_instance"},
        {"model_path": given, "custom_weight_loader": ["somewhere.load"]},
        {"model_path": given, "hicache_storage_backend": None},
    ):
        with engine(**arguments), pytest.raises(ConfigError):
            backend(pool, {"address": daemon.address, "revision": ""})
    with engine(model_path=given):
        get_context().override("scheduler.weight_version", weight_version="2")
        with pytest.raises(ConfigError, match="changed at run time"):
            backend(pool, {"address": daemon.address, "revision": "of the tests"})


@pytest.mark.parametrize("eight", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_caches(daemon: Daemon, make: Make, tmp_path: Path, eight: torch.dtype) -> None:
    """SGLang keeps 8-bit floats as bytes; their type is that of the engine, and without one they are refused."""
    pool = host_pool("mha", MHA, device=device_pool(dtype=eight))
    fill(pool, 4)
    with pytest.raises(ConfigError, match="8-bit"):
        backend(pool, {"address": daemon.address})
    keys = hashes(1)
    name = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}[str(eight).removeprefix("torch.")]
    with engine(model_path=model(tmp_path / "m", 1), kv_cache_dtype=name):
        ours = make(pool, {"address": daemon.address, "revision": ""})
        assert ours.batch_set_v1(keys, indices([0])) == [True]
        assert ours.batch_get_v1(keys, indices([2])) == [True]
    assert content(pool, 2) == content(pool, 0)


def test_weights_changed_at_run_time_switch_it_off(daemon: Daemon, make: Make, tmp_path: Path) -> None:
    """By a version or a path that SGLang notes, and by an update of which it notes nothing."""
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    pool = host_pool("mha", MHA)

    def unnoted() -> None:
        updater = object.__new__(SchedulerWeightUpdaterManager)
        updater.metrics_collector = None
        with updater._observe_weight_load("tensor"):
            pass

    for change in (
        lambda: get_context().override("scheduler.weight_version", weight_version="2"),
        lambda: get_context().override("scheduler.model_path", model_path="/elsewhere"),
        unnoted,
    ):
        with engine(model_path=model(tmp_path / "m", 1)):
            ours = make(pool, {"address": daemon.address, "revision": ""})
            keys = hashes(2)
            assert all(ours.batch_set_v1(keys, indices([0, 1])))
            assert ours.batch_exists(keys) == 2
            change()
            assert ours.batch_exists(keys) == 0
            assert ours.batch_set_v1(keys, indices([0, 1])) == [False, False]
            assert ours.batch_get_v1(keys, indices([0, 1])) == [False, False]
            assert ours.tally.peek()["weights_changed"] == 1
