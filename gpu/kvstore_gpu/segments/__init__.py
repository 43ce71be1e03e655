"""Attention mass of queries on segments of a prompt, from log-sum-exp alone: Cache-Craft's statistics (SIGMOD 2025).

Shapes
    parts float32 ``[segment, head, query]``, whole float32 ``[head, query]``; out float32 ``[segment, query]``, mean
    over heads; all segments of a query add up to 1.
Bytes moved
    4 x segments x head x query. Bound: memory of the device; a side product of attention that splits its keys.
"""

from kvstore_gpu.segments.launch import masses

__all__ = ["masses"]
