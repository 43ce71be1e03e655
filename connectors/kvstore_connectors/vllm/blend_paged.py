"""vLLM's attention on the CPU as the blend takes it: each run of adjacent rows is a sequence, over one table of pages.

Its kernel reads keys from pages, transposed, and its queries are the last of a sequence's keys. So a layer's keys and
values are put into pages of ours by the operation that fills the engine's own, a small part of the cost, and all runs
share them: a run that ends at position p is a sequence of p + 1 keys. It takes half the time of torch's attention under
a mask, since nothing is multiplied that is hidden, and no table of weights is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvstore_connectors.blend.attention import attend_fused, runs
from kvstore_connectors.vllm.blend_tried import tried

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 32
"""Keys in a page: of less, vLLM's kernel is a slower one."""

KEPT_BYTES = 64 << 20
"""Memory for a layer's pages that is kept for shorter prompts."""


@dataclass(frozen=True)
class _Runs:
    """Rising positions as sequences.

    Attributes
    ----------
    slots : Tensor, int64, [tokens]
        Where the keys are put that these see.
    begins, keys : Tensor, int32
        First query of each sequence and the number of all; keys of each.
    table : Tensor, int32, [sequences, pages]
        The same pages for each.
    ahead : Tensor
        How the kernel shares out its work.
    """

    positions: Tensor
    slots: Tensor
    begins: Tensor
    keys: Tensor
    table: Tensor
    ahead: Tensor


class PagedAttention:
    """Attention of scattered rows by vLLM's kernel for the CPU.

    Parameters
    ----------
    heads, kv_heads, dim : int
    dtype : torch.dtype

    Raises
    ------
    Exception
        Whatever a vLLM without this operation raises.
    """

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self._ops: Any = _custom_ops
        self._isa = _get_attn_isa(dtype, PAGE, dim)
        self._shape = (heads, kv_heads, dim)
        self._pages = torch.zeros((0, kv_heads, 2 * PAGE, dim), dtype=dtype)
        self._runs: _Runs | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
        """As `attention.attend`, for rising positions, at least one; the same tensor of them layer after layer."""
        if self._runs is None or self._runs.positions is not positions:
            self._runs = self._sequences(positions)
        here = self._runs
        needed, held = here.table.shape[1], len(self._pages)
        if held < needed or (held > needed and self._pages.nbytes > KEPT_BYTES):
            self._pages = self._pages.new_zeros((needed, *self._pages.shape[1:]))
        count = len(here.slots)
        k, v = self._pages.chunk(2, dim=2)
        self._ops.cpu_attn_reshape_and_cache(keys[:count], values[:count], k, v, here.slots, self._isa)
        out = torch.empty(queries.shape, dtype=queries.dtype)
        self._ops.cpu_attention_with_kv_cache(
            query=queries.contiguous(),
            key_cache=k,
            value_cache=v,
            output=out,
            query_start_loc=here.begins,
            seq_lens=here.keys,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=here.table,
            softcap=0.0,
            scheduler_metadata=here.ahead,
            s_aux=None,
        )
        return out.flatten(1)

    def _sequences(self, positions: Tensor) -> _Runs:
        heads, kv_heads, dim = self._shape
        first, end = torch.tensor(runs(positions), dtype=torch.int32).T.contiguous()
        begins = torch.cat([first[:1] * 0, (end - first).cumsum(0, dtype=torch.int32)])
        count = int(end[-1])
        ahead = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(end),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            seq_lens=end,
            dtype=self._pages.dtype,
            query_start_loc=begins,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=False,
        )
        table = torch.arange(-(-count // PAGE), dtype=torch.int32).repeat(len(end), 1)
        return _Runs(positions, torch.arange(count), begins, end, table, ahead)


def paged_attention(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> PagedAttention | None:
    """vLLM's CPU attention for this shape, tried on scattered queries; None where it is not to be had, or not right."""
    if device.type != "cpu":
        return None
    shape = heads, kv_heads, dim, dtype
    return tried("vLLM's attention on the CPU", partial(PagedAttention, *shape), partial(_scattered, *shape))


def _scattered(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, paged: PagedAttention) -> tuple[Tensor, Tensor]:
    """Attention on positions with runs and gaps over several pages, by it and under a mask."""
    seeded = torch.Generator().manual_seed(1)
    at = torch.cat([torch.arange(40), torch.arange(45, 150, 7), torch.arange(160, 230), torch.tensor([300])])
    keys, values = (torch.randn(320, kv_heads, dim, generator=seeded).to(dtype) for _ in range(2))
    queries = torch.randn(len(at), heads, dim, generator=seeded).to(dtype)
    found = paged(queries, keys, values, at, dim**-0.5)
    return found, attend_fused(queries, keys, values, at, dim**-0.5)
