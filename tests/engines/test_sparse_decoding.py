"""Decoding that reads a part: with nothing left out it is full attention, otherwise it reads less; values can stay in
the daemon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import model as models
import pytest
import torch
from cache_kit import connected
from kit import Daemon
from test_h2o_decoding import ids, stepwise
from transformers import AutoModelForCausalLM, DynamicCache

from kvstore.codecs import clusters
from kvstore.codecs.clusters import HeadIndex, Squeezed
from kvstore.errors import InvalidParams, LeaseExpired
from kvstore_connectors.transformers import KVStoreCache, leased
from kvstore_connectors.transformers.leased import LeasedPrompt
from kvstore_connectors.transformers.shadow import ShadowCache, ShadowKV
from kvstore_connectors.transformers.squeezed import Centroids, SqueezedCache

ALL = 1000
LOSSLESS = {
    "shadow": lambda model: ShadowCache(model, ShadowKV(outliers=ALL)),
    "squeezed": lambda model: SqueezedCache(model, Squeezed(sparsity=0, coarse=0, window=20)),
}
SPARSE = {
    "shadow": lambda model: ShadowCache(model, ShadowKV(budget=32, outliers=1, tail=8)),
    "squeezed": lambda model: SqueezedCache(model, Squeezed(sparsity=80, window=20)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def keeper(model: Any, daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[KVStoreCache]:
    with KVStoreCache(model, address=daemon.address, block_tokens=16, tenant=request.node.name) as kv:
        yield connected(kv)


@pytest.mark.parametrize("way", LOSSLESS)
def test_with_nothing_left_out_it_is_full_attention(model: Any, way: str) -> None:
    prompt, following = ids(200, 0), ids(8, 1)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    with LOSSLESS[way](model) as past:
        found = stepwise(model, past, prompt, following)
        assert past.get_seq_length() == 208
    torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)
    with LOSSLESS[way](model) as past:
        ours = model.generate(prompt, past_key_values=past, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=12, do_sample=False))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", LOSSLESS)
def test_a_pass_of_several_tokens_reads_everything(model: Any, way: str) -> None:
    prompt, more = ids(200, 2), ids(9, 3)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=past, use_cache=True)
        full = model(more, past_key_values=past, use_cache=True).logits
        with LOSSLESS[way](model) as sparse:
            model(prompt, past_key_values=sparse, use_cache=True)
            found = model(more, past_key_values=sparse, use_cache=True).logits
    torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", SPARSE)
def test_a_step_reads_less_than_there_is_and_is_near_full_attention(model: Any, way: str) -> None:
    prompt, following = ids(600, 4), ids(8, 5)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following).log_softmax(-1)
    with SPARSE[way](model) as past:
        found = stepwise(model, past, prompt, following).log_softmax(-1)
        everything = 3 * 2 * 608 * 2 * 16 * 4
        assert 0 < past.touched < 0.8 * everything
    assert float((full.exp() * (full - found)).sum(-1).mean()) < 0.1


def looks(index: HeadIndex, queries: torch.Tensor, scale: float, thresholds: tuple[float, float]) -> torch.Tensor:
    """What one KV head's queries read, as it is defined."""
    groups = clusters.shares(queries, index.group_means, index.group_sizes, scale).amax(0) > thresholds[0]
    opened = groups[index.parent]
    means = torch.cat([index.means[opened], index.group_means[~groups]])
    sizes = torch.cat([index.sizes[opened], index.group_sizes[~groups]])
    found = torch.zeros(len(index.means), dtype=torch.bool)
    found[opened] = clusters.shares(queries, means, sizes, scale).amax(0)[: int(opened.sum())] > thresholds[1]
    return found


def test_heads_of_different_clusters_are_looked_at_together() -> None:
    generator, scale = torch.Generator().manual_seed(5), 32**-0.5
    heads = []
    for tokens, around in ((2000, 40), (700, 9), (1100, 25)):
        centres = torch.randn(around, 32, generator=generator) * 3
        keys = centres[torch.randint(0, around, (tokens,), generator=generator)]
        keys = keys + 0.2 * torch.randn(tokens, 32, generator=generator)
        heads.append(clusters.build(keys, keys, Squeezed()))
    assert len({len(one.means) for one in heads}) == len({len(one.group_means) for one in heads}) == 3
    both, coarse_left_out = Centroids(heads), 0
    for _ in range(5):
        query = torch.randn(6, 32, generator=generator) * 3
        everything = both.choose(query, scale, (-1.0, -1.0))
        own = [query[2 * head : 2 * head + 2] for head in range(3)]
        shares = [clusters.scores(one, mine[None], scale) for one, mine in zip(heads, own, strict=True)]
        coarse, fine = (torch.cat(part) for part in zip(*shares, strict=True))
        for first in (-1.0, float(coarse.quantile(0.5)) * 1.001):  # beside a share, which the last bit could tell
            thresholds = first, float(fine.quantile(0.7)) * 1.001
            chosen = both.choose(query, scale, thresholds)
            for head, (one, mine) in enumerate(zip(heads, own, strict=True)):
                count = len(one.means)
                assert bool(everything[head, :count].all())
                assert not bool(everything[head, count:].any())
                assert torch.equal(chosen[head, :count], looks(one, mine, scale, thresholds))
                assert not bool(chosen[head, count:].any())
                assert 0 < len(clusters.rows_of(one, chosen[head, :count])) < len(one.keys)
            coarse_left_out += int((~looks(heads[0], own[0], scale, (first, -1.0))).sum())
    assert coarse_left_out


def test_the_sinks_are_always_read(model: Any) -> None:
    prompt, full = ids(200, 20), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=full, use_cache=True)
        with SPARSE["squeezed"](model) as past:
            model(prompt, past_key_values=past, use_cache=True)
        for own, layer in zip(past.layers, full.layers, strict=True):
            kept = torch.cat([layer.keys[:, :, :4], layer.keys[:, :, -20:]], 2)  # and the window
            torch.testing.assert_close(own.keys, kept)


def test_rebuilt_keys_of_full_rank_are_the_keys_to_bfloat16(model: Any) -> None:
    prompt, following = ids(200, 6), ids(8, 7)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    with ShadowCache(model, ShadowKV(budget=ALL, rank=100, outliers=0)) as past:
        found = stepwise(model, past, prompt, following)
    torch.testing.assert_close(found, full, atol=0.02, rtol=0.02)


def test_a_short_prompt_has_no_index(model: Any) -> None:
    prompt, following = ids(12, 8), ids(8, 9)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    for make in SPARSE.values():
        with make(model) as past:
            torch.testing.assert_close(stepwise(model, past, prompt, following), full, atol=1e-3, rtol=1e-3)


def test_a_batch_is_refused_and_the_model_is_as_before(model: Any) -> None:
    for make in SPARSE.values():
        with pytest.raises(InvalidParams), make(model) as past:
            model(ids(20, 10).expand(2, -1), past_key_values=past, use_cache=True)
        with pytest.raises(InvalidParams, match="taken back"):
            make(model).crop(3)
    assert model.config._attn_implementation == "sdpa"


def test_values_are_read_in_the_daemon_and_are_the_same(model: Any, keeper: KVStoreCache) -> None:
    prompt, following, rule = ids(203, 11), ids(8, 12), ShadowKV(budget=32, outliers=1, tail=8)
    with ShadowCache(model, rule) as past:
        here = stepwise(model, past, prompt, following)
    keeper.generate(prompt, max_new_tokens=1)
    with LeasedPrompt(keeper, prompt) as values:
        assert values.tokens == 192
        with ShadowCache(model, rule, values) as past:
            there = stepwise(model, past, prompt, following)
            assert past.fetched == 3 * 2 * 32 * 16 * 4  # layers, heads, budget, dim, float32
    assert torch.equal(here, there)
    values.close()
    with pytest.raises(LeaseExpired):
        values.rows(0, torch.zeros(2, 1, dtype=torch.long))


def test_what_is_not_stored_stays_here(model: Any, keeper: KVStoreCache) -> None:
    prompt, following, rule = ids(200, 13), ids(8, 14), ShadowKV(budget=ALL, outliers=ALL)
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    with LeasedPrompt(keeper, prompt) as values:
        assert values.tokens == 0
        with ShadowCache(model, rule, values) as past:
            torch.testing.assert_close(stepwise(model, past, prompt, following), full, atol=1e-4, rtol=1e-4)


def test_leases_are_renewed_and_their_end_is_noticed(
    model: Any, keeper: KVStoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(64, 15)
    keeper.generate(prompt, max_new_tokens=1)
    rows = torch.arange(64 // 16 * 16 - 16).expand(2, -1)
    with LeasedPrompt(keeper, prompt) as values:
        before, lease = values.rows(1, rows), values._lease
        monkeypatch.setattr(leased, "RENEW_S", 0.0)
        time.sleep(0.01)
        assert torch.equal(values.rows(1, rows), before)
        assert values._lease is not lease
        assert not lease.valid()
        monkeypatch.setattr(keeper.link, "run", lambda *_: None)  # the daemon is gone
        with pytest.raises(LeaseExpired):
            values.rows(1, rows)
