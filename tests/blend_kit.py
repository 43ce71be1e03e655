"""A tiny model, chunks captured from it, and how far what is repaired is from full prefill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvstore_connectors.blend import Selector, Work
from kvstore_connectors.blend.capture import Chunk, assemble, capture
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.blend.recompute import prefill
from kvstore_connectors.blend.selectors.planner import SELECTORS

BASE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "vocab_size": 101,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
}

ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "partial": {"partial_rotary_factor": 0.5},
    "interleaved": {"rope_interleave": True},
    "nope layers": {"no_rope_layers": [0, 1, 0, 1]},
}


def tiny(seed: int = 0, **config: Any) -> Llama:
    """A Llama of random weights whose attention is sharp enough for context to matter."""
    made = BASE | config
    rng = torch.Generator().manual_seed(seed)

    def weight(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * gain / math.sqrt(shape[-1])

    hidden, inner = made["hidden_size"], made["intermediate_size"]
    heads, kv_heads = made["num_attention_heads"] * made["head_dim"], made["num_key_value_heads"] * made["head_dim"]
    tensors = {
        "model.embed_tokens.weight": weight(made["vocab_size"], hidden, gain=7),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(made["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for part, rows, columns in (
            ("self_attn.q_proj", heads, hidden),
            ("self_attn.k_proj", kv_heads, hidden),
            ("self_attn.v_proj", kv_heads, hidden),
            ("self_attn.o_proj", hidden, heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{name}{part}.weight"] = weight(
                rows, columns, gain=2 if part.endswith(("q_proj", "k_proj")) else 1
            )
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = torch.ones(hidden)
    return Llama(made, tensors)


def words(count: int, seed: int) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


SYSTEM, CHUNKS, QUESTION = words(5, 1), [words(n, 10 + n) for n in (12, 9, 15)], words(6, 2)


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of KL(p || q), of logits, in float64."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def full(model: Llama) -> Tensor:
    """Logits of the question's rows after full prefill."""
    hidden, _ = prefill(model, torch.cat([SYSTEM, *CHUNKS, QUESTION]))
    return model.logits(hidden[-len(QUESTION) :])


def captured(model: Llama, mode: str) -> list[Chunk]:
    if mode == "isolated":
        return [capture(model, chunk) for chunk in CHUNKS]
    if mode == "system":
        return [capture(model, chunk, SYSTEM) for chunk in CHUNKS]
    return [capture(model, chunk, SYSTEM, [words(8, 40 + i), words(7, 50 + i)]) for i, chunk in enumerate(CHUNKS)]


def repaired(model: Llama, mode: str, selector: Selector, share: float) -> tuple[Tensor, Work]:
    """Logits of the question's rows after repair, and the work."""
    prompt, cache = assemble(model, model.rotary, SYSTEM, captured(model, mode), QUESTION)
    work = Work(model, prompt, cache)
    for _ in work.repair(selector, share):
        pass
    asked = work.rows >= int(prompt.question[0])
    return model.logits(work.hidden[asked]), work


def drained(steps: Any) -> Any:
    """Run a generator to its end: what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def usable(mode: str) -> Iterator[Selector]:
    return (selector for selector in SELECTORS.values() if mode == "live" or not selector.name.startswith("external"))
