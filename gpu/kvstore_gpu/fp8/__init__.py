"""fp8 blocks (`kvstore.codecs.fp8`) to pages of an engine's cache, and back.

Shapes
    a layer's part: scales of one byte ``[K|V][token]`` or ``[K|V][token][head]``, then codes
    ``[K|V][token][head][dim]``; where each part begins in the block is given. Bytes are those of the codec.
Bytes moved
    1 byte an element and the scales on one side, the element size on the other.
Bound
    memory of the device; PCIe for what comes from the host.
"""

from kvstore_gpu.fp8.launch import packing, unpacking

__all__ = ["packing", "unpacking"]
