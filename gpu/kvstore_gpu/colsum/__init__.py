"""Attention that each key gets, summed over queries: H2O (arXiv 2306.14048), question attention, importance.

With values each sum is multiplied by the length of the value that it fetches.

Shapes
    queries ``[query, head, dim]`` at ascending positions, their lse float32 ``[query, head]``; keys and values ``[page,
    token, kv_head, dim]``; out float32 ``[kv_head, token]``: over all heads of a group. Without values all columns of a
    row add up to 1.
Operations
    2 x queries x heads x dim x mean position. Bytes: keys and values once. Bound: tensor cores; memory for short
    questions.
"""

from kvstore_gpu.colsum.launch import column_sums

__all__ = ["column_sums"]
