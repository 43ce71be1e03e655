"""The command line of docs/sglang.md is one that SGLang understands."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from kit import Daemon
from pools import engine, host_pool, storage_config
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.server_args import ServerArgs

from kvstore_connectors.sglang import KVStoreHiCache
from kvstore_connectors.sglang.config import BackendConfig

PAGE = Path(__file__).parents[2] / "docs" / "sglang.md"


def command() -> list[str]:
    """The words of the one command line."""
    block = PAGE.read_text().partition("```console\n$ ")[2].partition("```")[0]
    return shlex.split(block.replace("\\\n", " "))


def test_the_command_line_starts_the_backend(daemon: Daemon) -> None:
    """Parsed by SGLang, and handed to its factory as SGLang hands it."""
    words = command()
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = parser.parse_args(words[3:])
    assert (given.enable_hierarchical_cache, given.page_size) == (True, 64)
    extra, *_, pass_prefix_keys = HybridCacheController.parse_storage_backend_extra_config(
        given.hicache_storage_backend_extra_config
    )
    assert pass_prefix_keys
    pool = host_pool("mha", given.hicache_mem_layout)
    told = storage_config({"address": daemon.address, "revision": "of the tests"})
    told.extra_config = {**extra, "address": daemon.address, "revision": "of the tests"}
    with engine(model_path="models/tiny"):
        made = StorageBackendFactory.create_backend(given.hicache_storage_backend, told, pool)
        assert isinstance(made, KVStoreHiCache)
        made.register_mem_pool_host(pool)
        assert made.batch_exists(["0" * 64]) == 0
        assert made.tally.peek()["lookups"] == 1
        made.close()


def test_every_setting_is_described() -> None:
    """Each key with its default, and none that does not exist."""
    rows = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    described = {key.strip().strip("`"): value.strip().strip("`") for key, value in rows}
    real = {name: json.loads(json.dumps(value)) for name, value in vars(BackendConfig()).items()}
    assert described.keys() == real.keys()
    for name, value in real.items():
        said = described[name] if name != "address" else ""
        assert (float(said) if isinstance(value, float) else said) == value
