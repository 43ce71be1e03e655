"""Attention of a few queries at any positions over all keys before them: what selective recomputation needs.

Shapes
    queries ``[query, head, dim]`` at ascending positions int32 ``[query]``; keys and values ``[page, token, kv_head,
    dim]`` with any strides, as a page table int32 ``[pages]`` orders them; out as the queries; lse float32 ``[query,
    head]``. A query sees keys up to its own position: a triangle at the lower right would be wrong for scattered ones.
Operations
    4 x queries x heads x dim x mean position. Bound: tensor cores (mma.sync; half of what wgmma reaches on Hopper).
Another way
    `runs`: contiguous queries as sequences of their own, for the engine's own attention over pages.
Paper
    CacheBlend, arXiv 2405.16444.
"""

from kvstore_gpu.attention.launch import attend
from kvstore_gpu.attention.reference import runs

__all__ = ["attend", "runs"]
