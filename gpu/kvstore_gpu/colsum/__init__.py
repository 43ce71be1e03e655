"""Attention that each key gets, summed over queries: H2O (arXiv 2306.14048), question attention, importance.

Shapes
    queries ``[query, head, dim]`` at ascending positions, their lse float32 ``[query, head]``; keys ``[page, token,
    kv_head, dim]``; out float32 ``[kv_head, token]``: over all heads of a group. All columns of a row add up to 1.
Operations
    2 x queries x heads x dim x mean position. Bytes: the keys once. Bound: tensor cores; memory for short questions.
"""

from kvstore_gpu.colsum.launch import column_sums

__all__ = ["column_sums"]
