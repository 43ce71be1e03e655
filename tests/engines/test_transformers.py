"""`generate()` with the connector: what is loaded is what would have been computed, and nobody else's."""

from __future__ import annotations

import gc
import logging
import signal
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cache_kit import BLOCK, QUESTION, SMALL, TEXT, connected, prompt, run
from kit import Daemon

from kvstore.errors import ConfigError, InvalidParams
from kvstore.keys import prefix_keys
from kvstore_connectors.transformers import KVStoreCache, StoreReport
from kvstore_connectors.transformers.cache import FIRST_CONTACT_S
from kvstore_connectors.transformers.layout import Layout

# -- the real model ----------------------------------------------------------------------------------------------------


def test_cold_warm_and_after_a_restart_of_the_daemon(real: Any, tmp_path: Path) -> None:
    model, tokenizer = real
    ids = tokenizer(TEXT * 2 + QUESTION, return_tensors="pt").input_ids
    whole = (ids.shape[1] - 1) // BLOCK * BLOCK
    truth, exact = run(model.generate, ids)
    daemon = Daemon(tmp_path, disk=True)
    daemon.start()
    try:
        with KVStoreCache(model, address=daemon.address, block_tokens=BLOCK) as kv:
            cold, _ = run(connected(kv).generate, ids)
            assert kv.last.loaded_tokens == 0
            assert kv.last.store == StoreReport(stored=(ids.shape[1] + 5) // BLOCK)
            warm, near = run(kv.generate, ids)
            assert kv.last.loaded_tokens == whole
            daemon.stop()
            daemon.start()
            restarted, again = run(connected(kv).generate, ids)
            assert kv.last.loaded_tokens == whole
        assert cold == warm == restarted == truth
        assert (near - exact).abs().max() < 1e-3
        assert torch.equal(near, again)  # the same bytes came back
    finally:
        daemon.stop()


def test_a_turn_later_the_turns_before_are_reused_with_what_was_generated(real: Any, attach: Any) -> None:
    model, tokenizer = real
    kv = attach(model)
    first = tokenizer(TEXT + QUESTION, return_tensors="pt").input_ids
    answer, _ = run(kv.generate, first, 20)
    turn = tokenizer("\nQuestion: and who answered him?\nAnswer:", return_tensors="pt").input_ids
    second = torch.cat([first, torch.tensor([answer]), turn], dim=1)
    truth, exact = run(model.generate, second)
    warm, near = run(kv.generate, second)
    # The last generated token was never computed, so it is in no block.
    known = (first.shape[1] + 19) // SMALL * SMALL
    assert kv.last.loaded_tokens == known > first.shape[1]
    assert warm == truth
    assert (near - exact).abs().max() < 1e-3


# -- how much is loaded ------------------------------------------------------------------------------------------------


def test_the_last_token_is_always_computed(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(4 * SMALL)
    truth, _ = run(small.generate, ids)
    for loaded in (0, 3 * SMALL):
        assert run(kv.generate, ids)[0] == truth
        assert kv.last.loaded_tokens == loaded
    assert run(kv.generate, prompt(4 * SMALL + 1))[0]
    assert kv.last.loaded_tokens == 4 * SMALL


def test_a_prompt_shorter_than_a_block_asks_nobody(small: Any, attach: Any) -> None:
    kv = attach(small)
    assert kv.load(prompt(SMALL)).loaded_tokens == 0
    assert "load_seconds" not in kv.counters()


def test_missing_blocks_are_computed(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    ids = prompt(100, 1)
    truth, _ = run(kv.generate, ids)
    keys = prefix_keys(kv.namespace, ids[0].numpy())
    with daemon.client() as client:
        assert client.drop(keys[4:5], namespace=kv.namespace) == 1
    assert run(kv.generate, ids)[0] == truth
    assert kv.last.loaded_tokens == 4 * SMALL
    assert kv.last.store.stored == 1  # the hole was closed
    assert kv.load(ids).loaded_tokens == 96


def test_a_block_that_goes_between_lookup_and_lease(small: Any, attach: Any, daemon: Daemon, monkeypatch: Any) -> None:
    kv = attach(small)
    ids = prompt(100, 1)
    truth, _ = run(kv.generate, ids)
    keys = prefix_keys(kv.namespace, ids[0].numpy())
    client = kv._link._client
    lease = client.lease

    def drop_first(*args: Any, **kwargs: Any) -> Any:
        client.drop(keys[2:3], namespace=kv.namespace)
        return lease(*args, **kwargs)

    monkeypatch.setattr(client, "lease", drop_first)
    assert run(kv.generate, ids)[0] == truth
    assert kv.last.loaded_tokens == 2 * SMALL
    assert kv.counters()["load_absent"] == 1


def test_a_lease_that_ran_out_counts_for_nothing(small: Any, attach: Any, monkeypatch: Any) -> None:
    kv = attach(small)
    ids = prompt(100, 2)
    truth, _ = run(kv.generate, ids)
    monkeypatch.setattr("kvstore.client.handles.Lease.valid", lambda _: False)
    assert run(kv.generate, ids)[0] == truth
    assert kv.last.loaded_tokens == 0
    assert kv.counters()["load_lost"] == 1


@pytest.mark.parametrize(("round_s", "reasons"), [(3.0, ["corrupt"]), (0.0005, ["corrupt", "absent"])])
def test_a_damaged_block_is_computed(
    small: Any, tmp_path: Path, round_s: float, reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found while somebody waits for it, or between two rounds of asking, after which it is gone."""
    monkeypatch.setattr("kvstore_connectors.transformers.transfers.ROUND_S", round_s)
    daemon = Daemon(tmp_path, disk=True)
    daemon.start()
    try:
        with KVStoreCache(small, address=daemon.address, block_tokens=SMALL) as kv:
            ids = prompt(100, 3)
            truth, _ = run(connected(kv).generate, ids)
            daemon.stop()
            damage(tmp_path / "disk", prefix_keys(kv.namespace, ids[0].numpy())[2])
            daemon.start()
            assert run(connected(kv).generate, ids)[0] == truth
            assert kv.last.loaded_tokens == 2 * SMALL
            assert sum(kv.counters().get(f"load_{reason}", 0) for reason in reasons) == 1
    finally:
        daemon.stop()


def damage(folder: Path, key: bytes) -> None:
    """Flip one bit in the middle of a block's payload."""
    (file,) = folder.rglob(f"{key.hex()}-*.kv")
    offset, nbytes = (int(part, 16) for part in file.stem.split("-")[1:])
    data = bytearray(file.read_bytes())
    data[offset + nbytes // 2] ^= 1
    file.write_bytes(data)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_padded_prompts_are_refused(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(60)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with pytest.raises(InvalidParams, match="padded"):
        kv.load(ids, mask)
    with pytest.raises(InvalidParams, match="padded"):
        kv.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)
    small.generation_config.pad_token_id = int(ids[0, 0])
    with pytest.raises(InvalidParams, match="pad tokens"):
        kv.load(ids)
    for wrong in (torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 4), [[]]):
        with pytest.raises(InvalidParams, match="token ids"):
            kv.load(wrong)


def test_kv_of_another_prompt_is_not_used(small: Any, attach: Any) -> None:
    kv = attach(small)
    run(kv.generate, prompt(60))
    ids = prompt(60)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    wrong: list[dict[str, Any]] = [
        {"input_ids": prompt(60, 1)},
        {"input_ids": prompt(80, 1)[:, :60]},
        {"input_ids": torch.cat([ids, ids])},
        {"input_ids": ids, "attention_mask": mask},
    ]
    for inputs in wrong:
        past = kv.load(ids)
        assert past.loaded_tokens == 48
        with pytest.raises(InvalidParams):
            small.generate(**inputs, past_key_values=past, max_new_tokens=1)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE of type"),
        ("Mistral", {"sliding_window": 8}, "full attention"),
        ("Gemma2", {"sliding_window": 8}, "full attention"),
        ("T5", {}, "encoder-decoder"),
        ("Mamba", {}, "full attention"),
        ("LlamaModel", {}, "can not generate"),
    ],
)
def test_models_that_are_refused(architecture: str, changes: dict[str, Any], reason: str) -> None:
    family = architecture.removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    ending = {"T5": "ForConditionalGeneration", "LlamaModel": ""}.get(architecture, "ForCausalLM")
    model = getattr(transformers, architecture + ending)(config).eval()
    with pytest.raises(ConfigError, match=reason):
        KVStoreCache(model, address="/nonexistent")


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT2", {"num_key_value_heads": 2}),
        ("GPTNeoX", {"num_key_value_heads": 2}),
        ("Qwen3", {"head_dim": 8}),
        ("Phi3", {"pad_token_id": None}),
    ],
)
def test_other_families(attach: Any, name: str, changes: dict[str, Any]) -> None:
    """Learned positions, partial RoPE, normalised keys, joint projections."""
    torch.manual_seed(0)
    shape = {**SHAPE, "n_embd": 16, "n_layer": 2, "n_head": 2} if name == "GPT2" else SHAPE
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**{**shape, **ends, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    kv = attach(model)
    ids = prompt(60) % 64
    truth, _ = run(model.generate, ids)
    for loaded in (0, 48):
        assert run(kv.generate, ids)[0] == truth
        assert kv.last.loaded_tokens == loaded
        assert kv.last.store.refused == ""


# -- without the daemon ------------------------------------------------------------------------------------------------


def test_without_a_daemon_it_is_generate(small: Any, caplog: Any) -> None:
    truth, _ = run(small.generate, prompt(60))
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, "kvstore.connector"), KVStoreCache(small, address="/nonexistent") as kv:
        assert time.monotonic() - begun < FIRST_CONTACT_S + 1
        for _ in range(3):
            assert run(kv.generate, prompt(60))[0] == truth
            assert kv.last.loaded_tokens == 0
    assert len(caplog.records) == 1


def test_daemon_killed_mid_way(small: Any, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        with KVStoreCache(small, address=daemon.address, block_tokens=SMALL) as kv:
            ids = prompt(300)
            truth, _ = run(connected(kv).generate, ids)
            begun = time.monotonic()
            run(small.generate, ids)
            plain = time.monotonic() - begun
            read = Layout.read

            def die(self: Layout, raw: Any, into: Any, row: int, block: int) -> None:
                if block == 3:
                    daemon.kill()
                read(self, raw, into, row, block)

            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "kvstore.connector"):
                patch.setattr(Layout, "read", die)
                assert run(kv.generate, ids)[0] == truth
                assert kv.last.loaded_tokens == 0  # nothing is believed that a lease of a dead daemon covered
                assert kv.last.store.dropped == 19
                assert run(kv.generate, ids)[0] == truth
            assert len(caplog.records) == 1
            daemon.start()
            assert run(connected(kv).generate, ids)[0] == truth
            assert kv.last.store.stored == 19
            daemon.send(signal.SIGSTOP)
            begun = time.monotonic()
            assert run(kv.generate, ids)[0] == truth
            assert run(kv.generate, ids)[0] == truth
            spent = time.monotonic() - begun
            assert kv.last.loaded_tokens == 0
            assert spent < 3 * plain + 1  # a quarter of a second, once
    finally:
        daemon.kill()


def test_a_defect_of_ours_stays_ours(small: Any, attach: Any, monkeypatch: Any) -> None:
    ids = prompt(60)
    truth, _ = run(small.generate, ids)
    for place in ("Transfers.load", "Transfers.store"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvstore_connectors.transformers.transfers.{place}", lambda *_: 1 / 0)
            kv = attach(small)
            assert run(kv.generate, ids)[0] == truth
    with monkeypatch.context() as patch:
        patch.setattr("kvstore_connectors.transformers.history.History.begin", lambda *_: 1 / 0)
        assert run(attach(small).generate, ids)[0] == truth


def test_a_model_does_not_keep_connectors(small: Any, attach: Any) -> None:
    hooks = len(small.model._forward_hooks) + len(small.model._forward_pre_hooks)
    kv = KVStoreCache(small, address="/nonexistent")
    seen = weakref.ref(kv)
    del kv
    gc.collect()
    assert seen() is None
    assert len(small.model._forward_hooks) + len(small.model._forward_pre_hooks) == hooks
    with pytest.raises(ConfigError):
        KVStoreCache(small, block_tokens=0)
    with pytest.raises(ConfigError):
        KVStoreCache(small, weights="some")


def test_virtual_tokens_are_refused(small: Any) -> None:
    small.peft_config = {"soft": SimpleNamespace(is_prompt_learning=True)}
    with pytest.raises(ConfigError, match="virtual tokens"):
        KVStoreCache(small, address="/nonexistent")
