"""Scores of centroids for a query: Squeezed Attention (arXiv 2411.09688). Keys of those above a threshold are attended.

Shapes
    query ``[head, dim]``, centroids ``[kv_head, centroid, dim]``, sizes float32 ``[kv_head, centroid]``: keys of each;
    out float32 ``[kv_head, centroid]``, the most over the heads of a group; for one head size x score adds up to 1.
Bytes moved
    the centroids once. Bound: memory of the device, or launch.
"""

from kvstore_gpu.centroid.launch import scores

__all__ = ["scores"]
