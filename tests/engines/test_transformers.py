"""`generate()` with the connector: what is loaded is what would have been computed, and nobody else's."""

from __future__ import annotations

import copy
import gc
import logging
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kit import Daemon, numbers

from kvstore.errors import ConfigError, InvalidParams
from kvstore.keys import prefix_keys
from kvstore_connectors.transformers import KVStoreCache, StoreReport
from kvstore_connectors.transformers.cache import FIRST_CONTACT_S
from kvstore_connectors.transformers.layout import Layout

BLOCK = 32
SMALL = 16
TEXT = (
    "The lighthouse keeper wrote a letter every evening. He described the ships that had passed, the colour of the sea "
    "and the birds that rested on the rail. Nobody answered, but he kept a copy of each letter in a wooden box. "
)
QUESTION = "\nQuestion: what did the keeper keep in the wooden box?\nAnswer:"


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from model import smollm2

    folder = smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def small(tiny: Path) -> Any:
    """Two layers of random weights, fresh for each test."""
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def attach(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Callable[..., KVStoreCache]]:
    """Make connectors of the module's daemon; each test is a tenant of its own."""
    made: list[KVStoreCache] = []

    def make(model: Any, **options: Any) -> KVStoreCache:
        defaults: dict[str, Any] = {"address": daemon.address, "block_tokens": SMALL, "tenant": request.node.name}
        made.append(connected(KVStoreCache(model, **{**defaults, **options})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def connected(kv: KVStoreCache, wait_s: float = 10.0) -> KVStoreCache:
    """Wait until a connector has met its daemon (again)."""
    deadline = time.monotonic() + wait_s
    while not kv._breaker.allow():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return kv


def prompt(count: int, seed: int = 0) -> Any:
    """Token ids [1, count]."""
    return torch.tensor([numbers(count, seed)])


def run(generate: Callable[..., Any], ids: Any, count: int = 6, **options: Any) -> tuple[list[int], Any]:
    """Greedy tokens, and the logits [token, vocabulary] they were chosen by."""
    out = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


def stored(kv: KVStoreCache, daemon: Daemon, ids: Any) -> int:
    """Blocks that a prompt begins with, in the store."""
    keys = prefix_keys(kv.namespace, ids.reshape(-1).numpy())
    with daemon.client() as client:
        return len(client.lookup(keys, namespace=kv.namespace))


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


def test_a_damaged_block_is_computed(small: Any, tmp_path: Path) -> None:
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
            assert kv.counters()["load_corrupt"] == 1
    finally:
        daemon.stop()


def damage(folder: Path, key: bytes) -> None:
    """Flip one bit in the middle of a block's payload."""
    (file,) = folder.rglob(f"{key.hex()}-*.kv")
    offset, nbytes = (int(part, 16) for part in file.stem.split("-")[1:])
    data = bytearray(file.read_bytes())
    data[offset + nbytes // 2] ^= 1
    file.write_bytes(data)


# -- identity ----------------------------------------------------------------------------------------------------------


def test_salts_are_apart(small: Any, attach: Any) -> None:
    ids = prompt(100)
    run(attach(small, salt="a").generate, ids)
    assert attach(small, salt="a").load(ids).loaded_tokens == 96
    assert attach(small, salt="b").load(ids).loaded_tokens == 0
    plain = attach(small)
    assert plain.load(ids).loaded_tokens == 0
    assert plain.load(ids, salt="a").loaded_tokens == 96
    assert "a" not in (plain.load(ids, salt="a").namespace.salt, "")


def test_whatever_changes_kv_changes_the_namespace(small: Any, attach: Any) -> None:
    first = attach(small).namespace
    found = {
        "revision": attach(small, revision="v2").namespace,
        "block_tokens": attach(small, block_tokens=32).namespace,
        "tenant": attach(small, tenant="other").namespace,
        "dtype": attach(copy.deepcopy(small).to(torch.bfloat16)).namespace,
    }
    for field, value in (("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}), ("rms_norm_eps", 1e-4)):
        changed = copy.deepcopy(small.config)
        setattr(changed, field, value)
        other = transformers.LlamaForCausalLM(changed).eval()
        other.load_state_dict(small.state_dict())
        found[field] = attach(other).namespace
    edited = copy.deepcopy(small)
    with torch.no_grad():
        edited.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3
    found["weights"] = attach(edited).namespace
    assert len({first, *found.values()}) == len(found) + 1
    assert found["dtype"].dtype == "bfloat16"
    assert found["rope_parameters"].rope != first.rope
    assert attach(copy.deepcopy(small)).namespace == first


def test_weights_changed_after_loading_are_another_model(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(100)
    before, _ = run(kv.generate, ids)
    with torch.no_grad():
        small.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    truth, _ = run(small.generate, ids)
    assert run(kv.generate, ids)[0] == truth != before
    assert kv.last.loaded_tokens == 0
    # A change that torch does not count needs a word.
    small.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    known = kv.namespace
    kv.refresh()
    assert kv.namespace != known


def test_weights_changed_while_a_cache_is_in_use(small: Any, attach: Any) -> None:
    kv = attach(small)
    run(kv.generate, prompt(100))
    past, held = kv.load(prompt(100, 5)), kv.load(prompt(100))
    run(small.generate, prompt(100, 5), past_key_values=past)
    with torch.no_grad():
        small.model.norm.weight.mul_(2.0)
    assert "changed since" in past.store().refused
    with pytest.raises(InvalidParams, match="not those"):
        run(small.generate, prompt(100), past_key_values=held)


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank adapter, built as PEFT builds them."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: Any, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(base_layer.in_features, 4, bias=False)})
        self.lora_B = torch.nn.ModuleDict({name: torch.nn.Linear(4, base_layer.out_features, bias=False)})
        self.scaling = {name: 1.0}
        self.active_adapters, self.merged_adapters, self.disable_adapters = [name], [], False

    def forward(self, x: Any) -> Any:
        out = self.base_layer(x)
        if not self.disable_adapters:
            for name in self.active_adapters:
                out = out + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return out


def test_adapters_are_part_of_the_identity(small: Any, attach: Any) -> None:
    def adapted(name: str, seed: int) -> tuple[Any, Adapted]:
        model = copy.deepcopy(small)
        attention = model.model.layers[0].self_attn
        attention.k_proj = Adapted(attention.k_proj, name, seed)
        return model.eval(), attention.k_proj

    ids = prompt(100)
    run(attach(small).generate, ids)
    model, layer = adapted("law", 1)
    kv = attach(model)
    assert kv.load(ids).loaded_tokens == 0
    assert kv.namespace.lora.startswith("law@")
    assert kv.namespace.revision == attach(small).namespace.revision
    same, other, renamed = (attach(adapted(*which)[0]).namespace for which in (("law", 1), ("law", 2), ("tax", 1)))
    assert same == kv.namespace
    assert len({same, other, renamed}) == 3
    layer.scaling["law"] = 2.0
    assert kv.load(ids).namespace.lora not in ("", same.lora)
    layer.disable_adapters = True
    assert kv.load(ids).loaded_tokens == 96  # without its adapter it is the plain model


def test_real_peft_adapters(small: Any, attach: Any) -> None:
    peft = pytest.importorskip("peft")
    ids = prompt(100)
    plain = attach(small)
    run(plain.generate, ids)
    torch.manual_seed(0)
    model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    kv = attach(model.eval())
    adapted, _ = run(kv.generate, ids)
    assert kv.last.loaded_tokens == 0
    assert kv.last.store.stored == 6
    assert run(kv.generate, ids)[0] == adapted == run(model.generate, ids)[0]
    assert kv.last.loaded_tokens == 96
    with model.disable_adapter():
        assert kv.load(ids).loaded_tokens == 96
        assert kv.load(ids).namespace == plain.namespace


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_stored_bytes_are_the_bytes_of_the_cache(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small.to(torch.bfloat16))
    ids = prompt(50)
    with kv.load(ids) as past:
        run(small.generate, ids, past_key_values=past)
    # [layer][K|V][token][kv_head][dim], made another way than the connector makes it.
    arrays = [[t[0].view(torch.int16).numpy().swapaxes(0, 1) for t in (x.keys, x.values)] for x in past.layers]
    expected = np.array(arrays)
    with daemon.client() as client:
        for number, key in enumerate(prefix_keys(kv.namespace, ids[0].numpy())):
            begin, end = number * SMALL, (number + 1) * SMALL
            block = client.get(key, namespace=kv.namespace)
            assert bytes(block.data) == np.ascontiguousarray(expected[:, :, begin:end]).tobytes()
            assert block.header.tokens == ids[0, begin:end].numpy().astype("<i4").tobytes()
            assert block.header.position == begin
    warm = kv.load(ids)
    for new, old in zip(warm.layers, past.layers, strict=True):
        assert torch.equal(new.keys, old.keys[:, :, :48])
        assert torch.equal(new.values, old.values[:, :, :48])


@pytest.mark.parametrize("how", ["cropped layers", "written to", "replaced", "grown", "another model"])
def test_a_cache_that_was_tampered_with_is_not_stored(small: Any, attach: Any, daemon: Daemon, how: str) -> None:
    kv = attach(small)
    ids = prompt(60)
    past = kv.load(ids)
    run(small.generate, ids, past_key_values=past)
    layer = past.layers[1]
    if how == "cropped layers":
        for each in past.layers:
            each.crop(-5)
    elif how == "written to":
        layer.keys[0, 0, 3, 3] += 1
    elif how == "replaced":
        layer.values = layer.values.clone()
    elif how == "grown":
        for each in past.layers:
            each.update(each.keys[:, :, :1], each.values[:, :, :1])
    else:
        run(copy.deepcopy(small).generate, prompt(70), past_key_values=past)
    assert past.store().refused
    assert stored(kv, daemon, ids) == 0


@pytest.mark.parametrize("how", ["embeddings", "mask", "positions", "training", "autocast", "unfinished"])
def test_kv_that_its_tokens_do_not_explain_is_not_stored(small: Any, attach: Any, daemon: Daemon, how: str) -> None:
    kv = attach(small)
    ids = prompt(60)
    past = kv.load(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": past}
    if how == "embeddings":
        inputs["inputs_embeds"] = small.model.embed_tokens(inputs.pop("input_ids"))
    elif how == "mask":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, 7] = 0
    elif how == "positions":
        inputs["position_ids"] = torch.arange(1, 61)[None]
    elif how == "training":
        small.train()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        if how == "unfinished":
            with pytest.raises(RuntimeError, match="stopped"):
                interrupted(small, inputs)
        else:
            small(**inputs)
    assert past.store().refused
    assert stored(kv, daemon, ids) == 0


def test_a_pass_that_failed_at_once_is_tried_again(small: Any, attach: Any) -> None:
    kv = attach(small)
    past = kv.load(prompt(60))
    inputs = {"input_ids": prompt(60), "past_key_values": past}
    with pytest.raises(RuntimeError, match="stopped"), torch.no_grad():
        interrupted(small, inputs, layer=0)
    with torch.no_grad():
        small(**inputs)
    assert past.store() == StoreReport(stored=3)


def interrupted(model: Any, inputs: dict[str, Any], layer: int = 1) -> None:
    """A forward pass that ends before a layer."""

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    handle = model.model.layers[layer].register_forward_pre_hook(stop)
    try:
        model(**inputs)
    finally:
        handle.remove()


def test_nothing_is_stored_after_an_exception(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    with suppress(KeyError), kv.load(prompt(60)) as past:
        run(small.generate, prompt(60), past_key_values=past)
        raise KeyError("of the caller")
    assert past.get_seq_length() == 65
    assert stored(kv, daemon, prompt(60)) == 0


# -- what a cache goes through -----------------------------------------------------------------------------------------


def test_cropped_and_continued_it_stores_what_it_holds(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    ids = prompt(60)
    past = kv.load(ids)
    with torch.no_grad():
        small(input_ids=ids, past_key_values=past)
        past.crop(-20)
        other = torch.cat([ids[:, :40], prompt(30, 9)], dim=1)
        small(input_ids=other[:, 40:], past_key_values=past)
    assert past.store() == StoreReport(stored=4)
    assert (stored(kv, daemon, other), stored(kv, daemon, ids)) == (4, 2)
    assert run(kv.generate, other)[0] == run(small.generate, other)[0]


def test_a_copy_goes_on_by_itself(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    ids = prompt(48)
    past = kv.load(ids)
    with torch.no_grad():
        small(input_ids=ids, past_key_values=past)
    for seed in (1, 2):
        longer = torch.cat([ids, prompt(32, seed)], dim=1)
        with copy.deepcopy(past) as twin:
            assert run(small.generate, longer, past_key_values=twin)[0] == run(small.generate, longer)[0]
        assert stored(kv, daemon, longer) == 5
    assert past.get_seq_length() == 48


def test_a_conversation_goes_on_in_one_cache(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    ids = prompt(60)
    with kv.load(ids) as past:
        answer, _ = run(small.generate, ids, past_key_values=past)
        ids = torch.cat([ids, torch.tensor([answer]), prompt(40, 1)], dim=1)
        assert run(small.generate, ids, past_key_values=past)[0] == run(small.generate, ids)[0]
    assert stored(kv, daemon, ids) == 106 // SMALL


def test_prompts_of_one_length_in_a_batch(small: Any, attach: Any, daemon: Daemon) -> None:
    kv = attach(small)
    run(kv.generate, prompt(40, 1))
    batch = torch.cat([torch.cat([prompt(40, 1), prompt(20, 7)], dim=1), prompt(60, 2)])
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    truth = small.generate(batch, **options)
    assert torch.equal(kv.generate(batch, **options), truth)
    assert kv.last.loaded_tokens == 0  # of the second prompt nothing was there
    assert torch.equal(kv.generate(batch, **options), truth)
    assert kv.last.loaded_tokens == 48
    assert stored(kv, daemon, batch[1]) == 3


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "samples", "lookup"],
)
def test_other_ways_to_generate(small: Any, attach: Any, daemon: Daemon, options: dict[str, Any]) -> None:
    kv = attach(small)
    ids = torch.cat([prompt(30, 1), prompt(30, 1)], dim=1)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}

    def outcome(generate: Callable[..., Any]) -> Any:
        torch.manual_seed(3)
        return generate(ids, **options)

    truth = outcome(small.generate)
    for _ in range(2):
        assert torch.equal(outcome(kv.generate), truth)
        assert not kv.last.store.refused
    # Assisted decoding computes the whole prompt whatever its cache holds, so nothing can be saved there.
    assert kv.last.loaded_tokens == (0 if "prompt_lookup_num_tokens" in options else 48)
    # What was stored behind the prompt is what a plain forward pass makes of those tokens.
    longest = max(truth, key=lambda row: stored(kv, daemon, row))[None]
    past = kv.load(longest)
    assert past.loaded_tokens > 60
    with torch.no_grad():
        plain = small(input_ids=longest).past_key_values
    for new, old in zip(past.layers, plain.layers, strict=True):
        assert (new.keys - old.keys[:, :, : past.loaded_tokens]).abs().max() < 1e-4


def test_prefill_in_chunks_computes_everything(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(60)
    truth, _ = run(small.generate, ids)
    for _ in range(2):
        assert run(kv.generate, ids, prefill_chunk_size=24)[0] == truth
        assert kv.last.loaded_tokens == 0
        assert not kv.last.store.refused


def test_calls_without_a_use_for_the_cache_pass_through(small: Any, attach: Any) -> None:
    kv = attach(small)
    ids = prompt(60)
    truth, _ = run(small.generate, ids)
    own = transformers.DynamicCache(config=small.config)
    for options in ({"use_cache": False}, {"past_key_values": own}, {"cache_implementation": "static"}):
        assert run(kv.generate, ids, **options)[0] == truth
    assert "prompt_tokens" not in kv.counters()
    assert run(kv.generate, ids, past_key_values=None)[0] == truth
    assert kv.last.store.stored == 4


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
