"""Decoding that reads a part, with the model on a CUDA device: kernels do what torch does on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from test_h2o_decoding import ids, stepwise
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvstore.codecs.clusters import Squeezed
from kvstore.codecs.h2o import H2O
from kvstore_connectors.transformers.h2o import HeavyHitterCache
from kvstore_connectors.transformers.shadow import ShadowCache, ShadowKV
from kvstore_connectors.transformers.squeezed import SqueezedCache
from kvstore_gpu.compile import sources

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Make = Callable[[Any], Any]

LOSSLESS: dict[str, Make] = {
    "h2o": lambda model: HeavyHitterCache(model, H2O(budget=1000)),
    "shadow": lambda model: ShadowCache(model, ShadowKV(outliers=1000)),
    "squeezed": lambda model: SqueezedCache(model, Squeezed(sparsity=0, coarse=0, window=20)),
}
SPARSE: dict[str, Make] = {
    "h2o": lambda model: HeavyHitterCache(model, H2O(budget=150)),
    "shadow": lambda model: ShadowCache(model, ShadowKV(budget=64, outliers=1, tail=8)),
    "squeezed": lambda model: SqueezedCache(model, Squeezed(sparsity=80, window=20)),
    "squeezed, two levels": lambda model: SqueezedCache(model, Squeezed(sparsity=70, coarse=10, window=20)),
}
KERNELS = {"shadow": "lowrank", "squeezed": "centroid", "squeezed, two levels": "centroid"}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", request.param).eval()


def divergence(right: torch.Tensor, found: torch.Tensor) -> float:
    """KL of first choices' distributions, a mean over steps."""
    p, q = (one.float().cpu().log_softmax(-1) for one in (right, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("way", LOSSLESS)
def test_with_nothing_left_out_it_is_full_attention(model: Any, way: str) -> None:
    prompt, following = ids(200, 0).cuda(), ids(8, 1).cuda()
    full = stepwise(model, DynamicCache(config=model.config), prompt, following)
    with LOSSLESS[way](model) as past:
        found = stepwise(model, past, prompt, following)
    limit = 1e-4 if model.dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, full, atol=limit, rtol=limit)


@pytest.mark.parametrize("way", SPARSE)
def test_with_a_part_left_out_it_is_what_the_cpu_gives(model: Any, way: str) -> None:
    prompt, following = ids(600, 4), ids(8, 5)
    with SPARSE[way](model) as past:
        found = stepwise(model, past, prompt.cuda(), following.cuda())
    here = deepcopy(model).cpu().float()
    with SPARSE[way](here) as past:
        right = stepwise(here, past, prompt, following)
    assert divergence(right, found) < (1e-5 if model.dtype == torch.float32 else 1e-2)
    if way in KERNELS:
        assert sources()[KERNELS[way]]._kernels, "no kernel was launched"
