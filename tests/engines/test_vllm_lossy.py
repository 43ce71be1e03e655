"""A real vLLM engine in a lossy namespace: blocks stored encoded, in memory and on disk, and loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import Daemon, Engine, engine, numbers

from kvstore.profile import Profile, Rung, save_profile
from kvstore.rope import rotary
from kvstore_connectors.weights import weights_digest

BLOCK = 64
CHAIN = "prerope|kv4(k=8,v=8)"


def profile_of(model: Path, folder: Path) -> Path:
    """A profile as a calibration would write it, for this model."""
    config = json.loads((model / "config.json").read_text())
    rungs = [Rung(CHAIN, 0, 0.0001, 0.0001, 0.999, 0.0, 3.5, 1.0, 1.0), Rung("prerope|kv4", 0, 0.004, 0.005, 0.97, 0.0,
                                                                           7.0, 1.0, 1.0)]  # fmt: skip
    profile = Profile(
        name="tiny", model=model.name, revision=f"sample:{weights_digest(model)}", layers=config["num_hidden_layers"],
        kv_heads=config["num_key_value_heads"], head_dim=config["hidden_size"] // config["num_attention_heads"],
        frequencies=list(rotary(config).frequencies), rungs=rungs,
    )  # fmt: skip
    save_profile(profile, folder)
    return folder


@pytest.fixture(scope="module")
def lossy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    place = tmp_path_factory.mktemp("lossy")
    daemon = Daemon(place, disk=True, flags=["--codecs-profiles", str(profile_of(tiny, place / "profiles"))])
    daemon.start()
    yield daemon
    daemon.stop()


def asked(vllm: Engine, seed: int, cached: int) -> list[int]:
    answer = vllm.ask(numbers(700, seed))[0]
    assert answer.cached == cached
    return answer.tokens


def test_blocks_are_stored_encoded_and_loaded_again_from_memory_and_from_disk(tiny: Path, lossy: Daemon) -> None:
    extra = {"block_tokens": BLOCK, "fidelity": "lossy:tiny", "chain": CHAIN, "load": "always"}
    with engine(tiny, lossy.address, extra, max_num_batched_tokens=192) as vllm:
        cold = asked(vllm, 1, 0)
        assert asked(vllm, 1, 640)[0] == cold[0]
        counts = vllm.metrics()
        assert counts["kvstore_saved_blocks"] == 11  # the last one was filled by generated tokens
        assert 2 * counts["kvstore_saved_bytes"] < counts["kvstore_saved_blocks"] * raw_bytes(tiny)
        assert 2 * counts["kvstore_loaded_bytes"] < counts["kvstore_loaded_blocks"] * raw_bytes(tiny)
        assert counts["kvstore_recomputed_tokens"] == 0
        lossy.stop()  # what is in memory is written down
        lossy.start()
        assert vllm.served(51)
        assert asked(vllm, 1, 640)[0] == cold[0]
        assert vllm.metrics()["kvstore_load_wrong_size"] == 0

    with engine(tiny, lossy.address, extra | {"chain": "prerope|kv4"}, max_num_batched_tokens=192) as vllm:
        assert asked(vllm, 1, 640)[0] == cold[0]  # by another engine's chain
        assert vllm.metrics()["kvstore_load_wrong_size"] == 0


def raw_bytes(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    return 2 * 4 * BLOCK * config["num_hidden_layers"] * config["num_key_value_heads"] * head


def test_a_chain_that_is_no_rung_is_not_stored_and_one_for_exact_blocks_is_refused(tiny: Path, lossy: Daemon) -> None:
    extra = {"block_tokens": BLOCK, "fidelity": "lossy:tiny", "chain": "prerope|kv4(k=2,v=2)", "tenant": "other"}
    with engine(tiny, lossy.address, extra, max_num_batched_tokens=192) as vllm:
        assert asked(vllm, 2, 0) == asked(vllm, 2, 0)
        counts = vllm.metrics()
        assert counts["kvstore_saved_blocks"] == 0
        assert counts["kvstore_save_dropped"] >= 10
    with pytest.raises(Exception, match="fidelity has to name a profile"):
        Engine(tiny, lossy.address, {"chain": CHAIN})
