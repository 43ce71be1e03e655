"""Every operation there is: importing this makes all of them known to `kvstore_gpu.compile.sources`."""

from kvstore_gpu import (
    carry,
    centroid,
    colsum,
    deviation,
    fp8,
    hadamard,
    kv4,
    lowrank,
    paged,
    place,
    rope,
    rows,
    segments,
    select,
    slerp,
    spreading,
)

__all__ = [
    "carry", "centroid", "colsum", "deviation", "fp8", "hadamard", "kv4", "lowrank", "paged", "place", "rope",
    "rows", "segments", "select", "slerp", "spreading",
]  # fmt: skip
