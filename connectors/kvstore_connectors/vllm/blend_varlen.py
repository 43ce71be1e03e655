"""vLLM's FlashAttention as the blend takes it (`kvstore_connectors.blend.varlen`), if it does what is expected."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvstore_connectors.blend.attention import attend_fused, column_sums
from kvstore_connectors.blend.varlen import (
    PAGE,
    Ending,
    Merge,
    Plan,
    Sequences,
    Varlen,
    attend_by_runs,
    looked_at_by_kernel,
    merge,
)
from kvstore_connectors.vllm.blend_tried import tried
from kvstore_gpu.queries import DIMS

if TYPE_CHECKING:
    from torch import Tensor


def flash_varlen(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Varlen | None:
    """vLLM's FlashAttention for this shape, tried on scattered queries; None where it is not right."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None

    def made() -> Varlen:
        from vllm.v1.attention.backends import fa_utils

        version = fa_utils.get_flash_attn_version(head_size=dim)
        return partial(_flash, fa_utils.flash_attn_varlen_func, {} if version is None else {"fa_version": version})

    return tried("vLLM's FlashAttention", made, partial(_scattered, heads, kv_heads, dim, dtype, device))


def merge_kernel(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Merge | None:
    """vLLM's kernel that puts two parts of attention into one: a launch for some six of torch's; None on a CPU."""
    if device.type != "cuda":
        return None

    def made() -> Merge:
        from vllm import _custom_ops

        return partial(_merge, _custom_ops.merge_attn_states)

    return tried("vLLM's merge of attention", made, partial(_merged, heads, dim, dtype, device))


def reading_kernel(
    varlen: Varlen | None, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Varlen | None:
    """The same attention, if with it a kernel tells where a question looks; None where it does not, or not rightly."""
    if varlen is None or dim not in DIMS:
        return None
    name = "the kernel that tells where a question looks"
    return tried(name, lambda: varlen, partial(_looked_at, heads, kv_heads, dim, dtype, device))


def _flash(
    function: Any,
    version: dict[str, int],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """See `Varlen`."""
    return function(
        queries,
        keys,
        values,
        max_seqlen_q=sequences.longest,
        cu_seqlens_q=sequences.begins,
        max_seqlen_k=sequences.most_keys,
        seqused_k=sequences.keys,
        block_table=sequences.pages,
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        **version,
    )


def _merge(function: Any, out: Tensor, mass: Tensor, other: Tensor, other_mass: Tensor) -> None:
    """See `Merge`; masses of all heads, each dense."""
    function(out, other, other_mass.contiguous(), out, mass.contiguous())


def _merged(heads: int, dim: int, dtype: torch.dtype, device: torch.device, merged: Merge) -> tuple[Tensor, Tensor]:
    """Of rows in the middle of larger tensors, by it and by torch."""
    made = torch.Generator(device).manual_seed(3)
    out, other = torch.randn((2, 50, heads, dim), device=device, generator=made).to(dtype)
    mass, other_mass = 5 * torch.randn((2, heads, 50), device=device, generator=made)
    found, right = out.clone(), out.clone()
    for function, one in ((merged, found), (merge, right)):
        function(one[10:], mass[:, 10:], other[10:], other_mass[:, 10:])
    return found, right


def _scattered(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, varlen: Varlen
) -> tuple[Tensor, Tensor]:
    """Attention on positions with runs and gaps behind several blocks, by it and under a mask."""
    made = torch.Generator(device).manual_seed(1)
    at = torch.cat([torch.arange(40, 60), torch.arange(700, 1400, 7), torch.arange(1500, 1530)]).to(device)
    keys, values = (torch.randn(96 * PAGE, kv_heads, dim, device=device, generator=made).to(dtype) for _ in range(2))
    queries = torch.randn(len(at), heads, dim, device=device, generator=made).to(dtype)
    found = attend_by_runs(varlen, queries, keys, values, Plan.of(at.cpu(), device), dim**-0.5)
    return found, attend_fused(queries, keys, values, at, dim**-0.5)


def _looked_at(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, varlen: Varlen
) -> tuple[Tensor, Tensor]:
    """Sums over queries as an engine gives them, a part of each row of a larger tensor; by the kernel and by torch."""
    made = torch.Generator(device).manual_seed(2)
    queries = torch.randn((40, heads + 2 * kv_heads, dim), device=device, generator=made).to(dtype)[:, :heads]
    keys, values = (torch.randn(50 * PAGE, kv_heads, dim, device=device, generator=made).to(dtype) for _ in range(2))
    tokens = len(keys) - PAGE // 2
    end = Ending.of(len(queries), tokens, device)
    found = looked_at_by_kernel(varlen, queries, keys, end, dim**-0.5, values)
    return found, column_sums(queries, keys[:tokens], dim**-0.5, values)
