"""`kvstore build` where the model is: chunks, and the probe of what blending costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore import KVStoreClient, Namespace
from kvstore_connectors.blend.capture import capture
from kvstore_connectors.blend.llama import Llama
from kvstore_connectors.build import Builder
from kvstore_connectors.build_probe import probe

LAYERS, HEADS, KV, DIM, VOCABULARY = 3, 4, 2, 64, 100
CONFIG: dict[str, Any] = {
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "hidden_size": HEADS * DIM, "rms_norm_eps": 1e-5,
    "num_hidden_layers": LAYERS, "rope_theta": 10_000.0, "intermediate_size": 48, "vocab_size": VOCABULARY,
}  # fmt: skip
NAMESPACE = Namespace(
    model="tiny", revision="r", dtype="float32", layers=LAYERS, kv_heads=KV, head_dim=DIM, layout="lkthd1"
)


@pytest.fixture
def model(device: str) -> Llama:
    width = HEADS * DIM
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (width, width),
            f"{name}.self_attn.k_proj.weight": (KV * DIM, width),
            f"{name}.self_attn.v_proj.weight": (KV * DIM, width),
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_proj.weight": (48, width),
            f"{name}.mlp.up_proj.weight": (48, width),
            f"{name}.mlp.down_proj.weight": (width, 48),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    seeded = torch.Generator().manual_seed(3)
    return Llama(CONFIG, {name: torch.randn(at, generator=seeded).mul(0.1).to(device) for name, at in shapes.items()})


def ids(count: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,)).tolist()


def test_chunks_and_the_probe(device: str, model: Llama) -> None:
    system, chunks = ids(9), [ids(60) for _ in range(6)]
    builder = Builder(model, [NAMESPACE], KVStoreClient(), system=system, device=device)
    alone = capture(model, builder.ids(chunks[1]), builder.ids(system))
    for packed, one in zip(builder.compute(chunks[:3])[1], alone.kv, strict=True):
        assert packed.keys.device == model.embed(builder.ids([1])).device
        torch.testing.assert_close(packed.keys, one.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed.values, one.values, atol=1e-4, rtol=1e-4)

    def verdict(share: float) -> Any:
        return probe(model, model.rotary, builder, NAMESPACE, system, chunks, share=share, prompts=2)

    part, whole = verdict(0.3), verdict(1.0)
    assert whole.kl < 1e-5
    assert whole.top1 == 1
    assert part.kl > 10 * whole.kl
