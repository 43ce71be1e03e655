"""The codec on the CPU: `kvstore.codecs.fp8`, through `kvstore_gpu.coded`."""

from kvstore_gpu.coded import decode, encode

__all__ = ["decode", "encode"]
