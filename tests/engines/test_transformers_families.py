"""Models of other families than Llama's: what is loaded gives the same tokens, or the connector says why it can not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from kit import Daemon, numbers

from kvstore.errors import ConfigError
from kvstore_connectors.transformers import KVStoreCache
from kvstore_connectors.transformers.probe import Probe

BLOCK, TOKENS = 16, 100
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}

SERVED: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=16)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**GROUPED)),
    "phi3, partial": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, partial_rotary_factor=0.5)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**GROUPED)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**GROUPED, num_local_experts=4)),
    "neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SHAPE)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**SHAPE, n_embd=64, n_layer=2, n_head=4, n_positions=512)),
    "falcon, one KV head": lambda: T.FalconForCausalLM(T.FalconConfig(**SHAPE)),
    "falcon, groups": lambda: T.FalconForCausalLM(
        T.FalconConfig(**SHAPE, new_decoder_architecture=True, num_kv_heads=2)
    ),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "sliding windows": lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=64)),
    "state space": lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2)),
}


@pytest.mark.parametrize("family", SERVED)
def test_a_prompt_that_is_loaded_gives_the_same_tokens(family: str, daemon: Daemon) -> None:
    torch.manual_seed(0)
    model = SERVED[family]().eval()
    ids = torch.tensor([numbers(TOKENS)]) % 290 + 3
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    computed = model.generate(ids, **asked)
    with KVStoreCache(model, address=daemon.address, block_tokens=BLOCK, tenant=family, timeout_s=10.0) as kv:
        assert torch.equal(kv.generate(ids, **asked), computed)
        assert kv.last.loaded_tokens == 0
        assert torch.equal(kv.generate(ids, **asked), computed)
        assert kv.last.loaded_tokens == TOKENS // BLOCK * BLOCK


@pytest.mark.parametrize("family", SERVED)
def test_calibration_finds_its_kv_whatever_its_configuration_calls_it(family: str) -> None:
    torch.manual_seed(0)
    model = SERVED[family]().eval()
    ids = torch.tensor(numbers(TOKENS)) % 290 + 3
    probe, split = Probe(model), TOKENS - 12
    block = probe.prefill(ids[:split].tolist())
    assert block.shape == (probe.shape.layers, 2, split, probe.shape.kv_heads, probe.shape.head_dim)
    with torch.no_grad():
        whole = model(ids[None]).logits[0, split:]
        torch.testing.assert_close(probe.logits(block, ids[split:].tolist()), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probe.after_rope(probe.before_rope(block)), block, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_what_keeps_no_full_attention_is_refused(family: str, daemon: Daemon) -> None:
    with pytest.raises(ConfigError, match="every layer must keep full attention KV"):
        KVStoreCache(REFUSED[family]().eval(), address=daemon.address)
