"""Deviation of each token's KV from what was kept of it: CacheBlend's signal (arXiv 2405.16444).

Shapes
    fresh, kept ``[token, head, dim]``; out float32 ``[token]``: squared distance over heads and dimensions. Where heads
    are split over ranks it is a partial sum: add it up over the ranks before choosing.
Bytes moved
    2 x tokens x head x dim x element size. Bound: memory of the device.
"""

from kvstore_gpu.deviation.launch import deviation

__all__ = ["deviation"]
