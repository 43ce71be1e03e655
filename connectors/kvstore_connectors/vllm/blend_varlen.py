"""vLLM's FlashAttention as the blend takes it (`kvstore_connectors.blend.varlen`), if it does what is expected."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore_connectors.blend.attention import attend_fused, column_sums
from kvstore_connectors.blend.varlen import PAGE, Plan, Sequences, Varlen, attend_by_runs, looked_at_by_kernel
from kvstore_gpu.queries import DIMS

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("kvstore")

TOLERANCE = 0.02
"""Distance to attention under a mask, relative, that two kernels in bfloat16 may have; a wrong mask is far above."""


def flash_varlen(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Varlen | None:
    """vLLM's FlashAttention for this shape; None where it is not to be had, or not right.

    It is tried on scattered queries first: versions differ in what they take.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from vllm.v1.attention.backends import fa_utils

        version = fa_utils.get_flash_attn_version(head_size=dim)
        varlen = partial(_flash, fa_utils.flash_attn_varlen_func, {} if version is None else {"fa_version": version})
        away = _distance(varlen, heads, kv_heads, dim, dtype, device)
    except Exception as error:  # whatever it is, there is attention under a mask
        log.info("blending: vLLM's FlashAttention takes no scattered queries here (%s).", error)
        return None
    if not away < TOLERANCE:
        log.warning("blending: vLLM's FlashAttention is %.3f away from attention under a mask; not used.", away)
        return None
    return varlen


def reading_kernel(
    varlen: Varlen | None, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Varlen | None:
    """The same attention, if with it a kernel tells where a question looks; None where it does not, or not rightly.

    It is tried first, with queries as an engine gives them: a part of each row of a larger tensor.
    """
    if varlen is None or dim not in DIMS:
        return None
    try:
        made = torch.Generator(device).manual_seed(2)
        shape = (40, heads + 2 * kv_heads, dim)
        queries = torch.randn(shape, device=device, generator=made).to(dtype)[:, :heads]
        keys = torch.randn(50 * PAGE, kv_heads, dim, device=device, generator=made).to(dtype)
        tokens = len(keys) - PAGE // 2
        end = Sequences.of(np.array([0, len(queries)]), np.array([0]), np.array([tokens]), device)
        found = looked_at_by_kernel(varlen, queries, keys, end, dim**-0.5)
        right = column_sums(queries, keys[:tokens], dim**-0.5)
        away = float((found - right).norm() / right.norm())
    except Exception as error:  # whatever it is, there are sums without it
        log.info("blending: no kernel tells here where a question looks (%s).", error)
        return None
    if not away < TOLERANCE:
        log.warning("blending: the kernel that tells where a question looks is %.3f away; not used.", away)
        return None
    return varlen


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


def _distance(varlen: Varlen, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far it is from attention under a mask, on positions with runs and gaps behind several blocks."""
    made = torch.Generator(device).manual_seed(1)
    at = torch.cat([torch.arange(40, 60), torch.arange(700, 1400, 7), torch.arange(1500, 1530)]).to(device)
    keys, values = (torch.randn(96 * PAGE, kv_heads, dim, device=device, generator=made).to(dtype) for _ in range(2))
    queries = torch.randn(len(at), heads, dim, device=device, generator=made).to(dtype)
    found = attend_by_runs(varlen, queries, keys, values, Plan.of(at), dim**-0.5).float()
    right = attend_fused(queries, keys, values, at, dim**-0.5).float()
    return float((found - right).norm() / right.norm())
