"""Choice of tokens: the highest scores, as ascending indices; the same on every rank and in every run.

Shapes
    scores float32 ``[token]``; forced bool ``[token]``, chosen whatever their score; out int32 ``[wanted]``.
Bytes moved
    5 reads of the scores, one of them from memory. Bound: one multiprocessor.
Ties
    the lower index. Scores that are not numbers count as the highest.
"""

from kvstore_gpu.select.launch import heavy_hitters, top

__all__ = ["heavy_hitters", "top"]
