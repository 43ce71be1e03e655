"""What a decoder layer computes beside its products and attention: norms and the gate, by vLLM's kernels.

An engine that compiles its model (vLLM's default) leaves these to the compiler. Its modules, called one by one as the
blend does it, then run them as chains of torch's operations, some ten launches for one; and an engine that does not
compile looks up what to call each time. So the kernels are called here, where they give what the modules give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import silu

from kvstore_connectors.vllm.blend_tried import tried

if TYPE_CHECKING:
    from torch import Tensor


class LayerParts(Protocol):
    """Parts of a layer, given vLLM's module of each. Hidden states ``[n, hidden]``."""

    def norm(self, module: Any, hidden: Tensor) -> Tensor:
        """Root mean square norm."""
        ...

    def norm_of_sum(self, module: Any, added: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of both together, and their sum; both may be written over."""
        ...

    def gate(self, module: Any, projected: Tensor) -> Tensor:
        """SiLU of the first half of each row, times the second."""
        ...


class Modules:
    """As the engine's modules do it."""

    def norm(self, module: Any, hidden: Tensor) -> Tensor:
        """See `LayerParts.norm`."""
        return module(hidden)

    def norm_of_sum(self, module: Any, added: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerParts.norm_of_sum`."""
        return module(added, hidden)

    def gate(self, module: Any, projected: Tensor) -> Tensor:
        """See `LayerParts.gate`."""
        return module(projected)


class Kernels:
    """By vLLM's kernels, a launch each.

    Raises
    ------
    Exception
        Whatever a vLLM without these operations raises.
    """

    def __init__(self) -> None:
        from vllm import _custom_ops

        self._norm: Callable[..., None] = _custom_ops.rms_norm
        self._norm_of_sum: Callable[..., None] = _custom_ops.fused_add_rms_norm
        self._gate: Callable[..., None] = torch.ops._C.silu_and_mul

    def norm(self, module: Any, hidden: Tensor) -> Tensor:
        """See `LayerParts.norm`."""
        out = torch.empty_like(hidden)
        self._norm(out, hidden, module.weight.data, module.variance_epsilon)
        return out

    def norm_of_sum(self, module: Any, added: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerParts.norm_of_sum`."""
        self._norm_of_sum(added, hidden, module.weight.data, module.variance_epsilon)
        return added, hidden

    def gate(self, module: Any, projected: Tensor) -> Tensor:
        """See `LayerParts.gate`."""
        out = projected.new_empty((len(projected), projected.shape[1] // 2))
        self._gate(out, projected)
        return out


def layer_parts(layer: Any, dtype: torch.dtype, device: torch.device) -> LayerParts:
    """Kernels for a model whose layers are like this one, if they give what its modules give; else the modules."""
    if device.type != "cuda":
        return Modules()
    name = "vLLM's kernels for norms and gates"
    return tried(name, Kernels, partial(_of_random_rows, layer, dtype, device)) or Modules()


def _of_random_rows(layer: Any, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """What kernels make of random rows, and what is right."""
    made = torch.Generator(device).manual_seed(4)
    size = layer.input_layernorm.weight.shape[0]
    hidden, added, half, other = torch.randn((4, 50, size), device=device, generator=made).to(dtype)
    found, right = [], [silu(half.float()) * other]  # an engine that compiles would compile its module for this
    for parts, out in ((kernels, found), (Modules(), right)):
        out.append(parts.norm(layer.input_layernorm, hidden))
        out.extend(parts.norm_of_sum(layer.post_attention_layernorm, added.clone(), hidden.clone()))
    return torch.cat([kernels.gate(layer.mlp.act_fn, torch.cat([half, other], 1)), *found]), torch.cat(right)
