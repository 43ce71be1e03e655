"""Keys from a low-rank form at chosen tokens, turned to their positions: ShadowKV (arXiv 2410.21465).

Shapes
    left ``[token, rank]``, right ``[kv_head, dim, rank]``, both bfloat16; chosen int32 ``[kv_head, row]``; tables of
    all tokens float32 ``[token, pair]``; out ``[kv_head, row, dim]`` of the model's type. ``rank``: a multiple of 16.
    There is a kernel for heads of 64 and 128 turned as a whole, in neighbouring pairs, or not at all (no pairs);
    other heads are rebuilt by the reference, on a device too.
Bytes moved
    rows of left, right once a block of 64 rows (from L2), out. Operations: 2 x kv_head x row x dim x rank on tensor
    cores. Bound: memory of the device, or launch, for the few thousand rows of a step.
"""

from kvstore_gpu.lowrank.launch import padded, reconstruct

__all__ = ["padded", "reconstruct"]
