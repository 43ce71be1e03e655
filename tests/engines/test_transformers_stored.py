"""What a cache stores: the bytes that its tokens explain, whatever it goes through before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cache_kit import SMALL, prompt, run, stored
from kit import Daemon

from kvstore.keys import prefix_keys
from kvstore_connectors.transformers import StoreReport

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
