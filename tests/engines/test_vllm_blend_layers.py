"""Norms and the gate of a layer, by kernels that are right, wrong or missing."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from kvstore_connectors.vllm import blend_layers
from kvstore_connectors.vllm.blend_layers import Kernels, Modules, layer_parts
from kvstore_connectors.vllm.blend_tried import tried

SIZE, EPSILON = 96, 1e-5


class Norm(torch.nn.Module):
    """As vLLM's: of one argument, or of the sum of two, and that sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(SIZE).bfloat16() + 0.5)
        self.variance_epsilon = EPSILON

    def forward(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> Any:
        whole = hidden if added is None else hidden + added
        normed = rms_norm(whole, (SIZE,), self.weight, EPSILON)
        return normed if added is None else (normed, whole)


def by_torch(wrong: str) -> Kernels:
    """Operations with the arguments of vLLM's; one of them may be wrong, or not there."""

    def norm(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        out.copy_(rms_norm(hidden, (SIZE,), weight, 1.0 if wrong == "norm" else epsilon))

    def norm_of_sum(added: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        hidden.add_(added)
        norm(added, added if wrong == "sum" else hidden, weight, epsilon)

    def gate(out: torch.Tensor, projected: torch.Tensor) -> None:
        a, b = projected.chunk(2, 1)
        out.copy_(silu(b) * a if wrong == "gate" else silu(a) * b)

    if wrong == "missing":
        raise ImportError("no such operations")
    made = Kernels.__new__(Kernels)
    made._norm, made._norm_of_sum, made._gate = norm, norm_of_sum, gate
    return made


@pytest.mark.parametrize("wrong", ["", "norm", "sum", "gate", "missing"])
def test_kernels_are_used_only_if_they_give_what_the_modules_give(wrong: str) -> None:
    layer = SimpleNamespace(input_layernorm=Norm(), post_attention_layernorm=Norm(), mlp=SimpleNamespace(act_fn=None))
    give = partial(blend_layers._of_random_rows, layer, torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        found = tried("kernels", partial(by_torch, wrong), give)
    assert (found is None) == bool(wrong)


def test_on_a_cpu_modules_do_it() -> None:
    assert isinstance(layer_parts(SimpleNamespace(), torch.float32, torch.device("cpu")), Modules)
