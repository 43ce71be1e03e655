"""Tokens' rows to slots of one layer's cache and back: recomputed tokens written into a blend, kept tokens compacted.

Shapes
    rows ``[row, head, dim]``; slots int64 ``[row]``: page x page tokens + token, on the device; -1 is left alone. The
    cache's view ``[page, token, head, dim]`` with any strides.
Bytes moved
    2 x rows x head x dim x element size. Bound: memory of the device.
"""

from kvstore_gpu.rows.launch import gather, scatter

__all__ = ["gather", "scatter"]
