"""Every operation there is: importing this makes all of them known to `kvstore_gpu.compile.sources`."""

from kvstore_gpu import deviation, fp8, hadamard, kv4, paged, rope, rows, select, slerp

__all__ = ["deviation", "fp8", "hadamard", "kv4", "paged", "rope", "rows", "select", "slerp"]
