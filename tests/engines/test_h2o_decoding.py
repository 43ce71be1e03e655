"""H2O decoding against full attention: the same within the budget, bounded beyond it, the heaviest tokens stay."""

from __future__ import annotations

from typing import Any

import model as models
import pytest
import torch
from cache_kit import connected
from kit import Daemon
from transformers import AutoModelForCausalLM, DynamicCache

from kvstore.codecs import importance
from kvstore.codecs.h2o import H2O
from kvstore.errors import InvalidParams
from kvstore_connectors.transformers import KVStoreCache
from kvstore_connectors.transformers.h2o import HeavyHitterCache
from kvstore_connectors.transformers.leased import LeasedPrompt
from kvstore_connectors.transformers.probe import Probe


@pytest.fixture(scope="module")
def model() -> Any:
    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 900, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepwise(model: Any, past: Any, prompt: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Logits of tokens that are fed one by one behind a prompt."""
    model(prompt, past_key_values=past, use_cache=True)
    return torch.stack(
        [model(following[:, i : i + 1], past_key_values=past, use_cache=True).logits[0, 0] for i in range(8)]
    )


def test_within_the_budget_it_is_full_attention(model: Any) -> None:
    prompt, following = ids(90, 0), ids(8, 1)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    with HeavyHitterCache(model, H2O(budget=200)) as past:
        found = stepwise(model, past, prompt, following)
        assert past.kept == 98
    torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)
    with HeavyHitterCache(model, H2O(budget=200)) as past:
        ours = model.generate(prompt, past_key_values=past, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=12, do_sample=False))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("by_visibility", [True, False])
def test_what_stays_is_the_heaviest_the_newest_and_the_first(model: Any, by_visibility: bool) -> None:
    prompt, rule = ids(90, 2), H2O(budget=40, recent=10, sinks=2)
    with HeavyHitterCache(model, rule, by_visibility=by_visibility) as past, torch.no_grad():
        model(prompt, past_key_values=past, use_cache=True)
    probe = Probe(model)
    block, queries = probe.prefill(prompt[0].tolist()), probe.queries(prompt[0].tolist())
    positions = torch.arange(90)
    measure = importance.attention_mean if by_visibility else importance.attention_sum
    for layer, kept in enumerate(past.layers):
        keys = block[layer, 0]
        lse = importance.log_sum_exp(queries[layer], keys, positions)
        wanted = rule.keep(measure(queries[layer], keys, lse, positions))
        assert wanted.shape == (2, 40)
        assert all({0, 1, *range(80, 90)} <= set(head.tolist()) for head in wanted)
        for head in range(2):
            torch.testing.assert_close(kept.keys[0, head], keys[wanted[head], head], atol=1e-4, rtol=1e-4)


def test_it_stays_within_the_budget_while_the_text_grows(model: Any) -> None:
    prompt = ids(90, 3)
    with HeavyHitterCache(model, H2O(budget=40, recent=10)) as past:
        out = model.generate(prompt, past_key_values=past, max_new_tokens=30, min_new_tokens=30, do_sample=False)
        assert out.shape[1] == 120
        assert past.kept == 40
        assert past.get_seq_length() == 119  # positions go on as if nothing had been dropped


def test_a_batch_is_refused_and_the_model_is_as_before(model: Any) -> None:
    with pytest.raises(InvalidParams), HeavyHitterCache(model, H2O(budget=40)) as past:
        model(ids(20, 4).expand(2, -1), past_key_values=past, use_cache=True)
    assert model.config._attn_implementation == "sdpa"


def test_what_nobody_looks_at_is_not_even_copied(model: Any, daemon: Daemon) -> None:
    prompt = ids(100, 5)
    with KVStoreCache(model, address=daemon.address, block_tokens=16, tenant="h2o", importance=True) as kv:
        connected(kv).generate(prompt, max_new_tokens=1)
        plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
        with LeasedPrompt(kv, prompt) as stored, HeavyHitterCache(model, H2O(budget=200)) as past:
            assert past.begin(stored) == 96
            assert torch.equal(model.generate(prompt, past_key_values=past, max_new_tokens=8, do_sample=False), plain)
        rule = H2O(budget=40, recent=10, sinks=2)
        with LeasedPrompt(kv, prompt) as stored, HeavyHitterCache(model, rule) as past:
            assert past.begin(stored) == past.kept == 40
            assert past.get_seq_length() == 96
            block, kept = Probe(model).prefill(prompt[0].tolist()), rule.keep(stored.importance)
            assert kept.tolist()[-10:] == list(range(86, 96))
            for layer, held in enumerate(past.layers):
                torch.testing.assert_close(held.keys[0], block[layer, 0, kept].transpose(0, 1), atol=1e-4, rtol=1e-4)
            out = model.generate(prompt, past_key_values=past, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            assert out.shape[1] == 108
            assert past.kept == 40
    with KVStoreCache(model, address=daemon.address, block_tokens=16, tenant="plain") as kv:
        connected(kv).generate(prompt, max_new_tokens=1)
        past = HeavyHitterCache(model, rule)
        with LeasedPrompt(kv, prompt) as stored, pytest.raises(InvalidParams, match="importance"):
            past.begin(stored)
