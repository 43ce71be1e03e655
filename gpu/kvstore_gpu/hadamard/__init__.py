"""Hadamard rotation of heads: an outlier is spread over all channels (QuaRot, arXiv 2404.00456). Its own inverse.

Shapes
    ``[..., dim]``, dense, ``dim`` a multiple of 8; rotated in blocks, as `kvstore.codecs.hadamard` says.
Bytes moved
    2 x elements x element size. Bound: memory of the device.
"""

from kvstore_gpu.hadamard.launch import rotate

__all__ = ["rotate"]
