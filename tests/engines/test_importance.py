"""Importance of tokens: what is stored with blocks is what attention was, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import model as models
import numpy as np
import pytest
import torch
from cache_kit import connected, run
from kit import Daemon, numbers
from transformers import AutoModelForCausalLM

from kvstore.codecs import importance
from kvstore.errors import ConfigError
from kvstore.keys import prefix_keys
from kvstore_connectors.transformers import KVStoreCache
from kvstore_connectors.transformers.calibrate import Reference, Sample
from kvstore_connectors.transformers.codec_eval import stored_importance
from kvstore_connectors.transformers.importance import MOST
from kvstore_connectors.transformers.probe import Probe

BLOCK = 16


@pytest.fixture(scope="module")
def model() -> Any:
    path = models.tiny_llama(layers=3, heads=4, kv_heads=2, head_dim=16)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def attach(model: Any, daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Callable[..., KVStoreCache]]:
    made: list[KVStoreCache] = []

    def make(**options: Any) -> KVStoreCache:
        tenant = request.node.name
        made.append(
            connected(KVStoreCache(model, address=daemon.address, block_tokens=BLOCK, tenant=tenant, **options))
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def stored(kv: KVStoreCache, daemon: Daemon, tokens: list[int]) -> list[bytes]:
    """Importance in the headers of a prompt's blocks."""
    keys = prefix_keys(kv.namespace, np.array(tokens, np.int32))
    with daemon.client() as client, client.lease(keys, namespace=kv.namespace, headers=True) as lease:
        return [block.header.importance for block in lease.blocks]


def truth(model: Any, tokens: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Mean over layers, heads and the queries that see a token of its weight times the tokens that they see."""
    probe = Probe(model)
    block, queries = probe.prefill(tokens), probe.queries(tokens)
    total = torch.zeros(len(tokens))
    for layer, own in enumerate(queries):
        keys = block[layer, 0].repeat_interleave(2, 1)
        logits = torch.einsum("qhd,khd->hqk", own[rows], keys) / 4
        logits = logits.masked_fill(torch.arange(len(tokens)) > rows[:, None], float("-inf"))
        total += (logits.softmax(-1) * (rows[:, None] + 1)).sum(1).mean(0)
    return total / len(queries) / (rows[:, None] >= torch.arange(len(tokens))).sum(0)


def test_what_is_stored_is_the_attention(model: Any, attach: Any, daemon: Daemon) -> None:
    kv, tokens = attach(importance=True), numbers(5 * BLOCK + 3, 1)
    with kv.load(torch.tensor([tokens])) as past, torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=past, use_cache=True)
    found = stored(kv, daemon, tokens)
    wanted = truth(model, tokens, torch.arange(len(tokens)))
    for block, data in enumerate(found):
        got = importance.unpack(data, BLOCK)
        assert got is not None
        torch.testing.assert_close(got, wanted[block * BLOCK : (block + 1) * BLOCK], rtol=2e-3, atol=2e-3)
    # What the gate measures mikv with is what mikv will get.
    gate = stored_importance(Reference(Probe(model), Sample("", tokens, numbers(2, 7)), torch.float32))
    torch.testing.assert_close(gate, wanted, rtol=2e-3, atol=2e-3)


def test_of_a_long_pass_some_queries_are_looked_at_and_the_last_is_among_them(model: Any, attach: Any) -> None:
    kv, tokens = attach(importance=True), numbers(3 * MOST, 2)
    past = kv.load(torch.tensor([tokens]))
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=past, use_cache=True)
    rows = torch.linspace(0, 3 * MOST - 1, MOST).round().long()
    got = importance.unpack(past.shares.of(0, 0, len(tokens)), len(tokens))
    assert got is not None
    torch.testing.assert_close(got, truth(model, tokens, rows), rtol=5e-3, atol=5e-3)


def test_passes_add_up_and_beams_and_crops_keep_to_their_prompts(model: Any, attach: Any) -> None:
    kv, rows = attach(importance=True), torch.tensor([numbers(40, 3), numbers(40, 4)])
    past = kv.load(rows)
    with torch.no_grad():
        model(rows[:, :24], past_key_values=past, use_cache=True)
        model(rows[:, 24:], past_key_values=past, use_cache=True)
    wanted = [truth(model, row.tolist(), torch.arange(40)) for row in rows]
    past.reorder_cache(torch.tensor([1, 0]))
    twin = copy.deepcopy(past)
    past.crop(-8)
    for row in (0, 1):
        assert past.shares.of(row, 16, 40) == b""
        for cache in (past, twin):
            got = importance.unpack(cache.shares.of(row, 0, 32), 32)
            assert got is not None
            torch.testing.assert_close(got, wanted[1 - row][:32], rtol=5e-3, atol=5e-3)


def test_answers_stay_the_same_and_the_model_is_as_before(model: Any, attach: Any, daemon: Daemon) -> None:
    tokens = torch.tensor([numbers(3 * BLOCK + 2, 5)])
    plain, exact = run(model.generate, tokens)
    kv = attach(importance=True)
    assert model.config._attn_implementation != "sdpa"
    found, logits = run(kv.generate, tokens)
    again, _ = run(kv.generate, tokens)
    assert kv.last.loaded_tokens == 3 * BLOCK
    assert found == again == plain
    assert (logits - exact).abs().max() < 1e-4
    assert all(len(data) == 2 * BLOCK for data in stored(kv, daemon, tokens[0].tolist()))
    kv.close()
    assert model.config._attn_implementation == "sdpa"
    assert run(model.generate, tokens)[0] == plain


def test_without_asking_nothing_is_measured(model: Any, attach: Any, daemon: Daemon) -> None:
    kv, tokens = attach(), numbers(2 * BLOCK + 1, 6)
    kv.generate(torch.tensor([tokens]), max_new_tokens=2)
    assert stored(kv, daemon, tokens) == [b"", b""]
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_watched_is_refused(daemon: Daemon) -> None:
    path = models.tiny_llama()
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with pytest.raises(ConfigError, match="eager"):
        KVStoreCache(eager, address=daemon.address, importance=True)
