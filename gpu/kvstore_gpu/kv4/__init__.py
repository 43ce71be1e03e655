"""kv4 blocks (`kvstore.codecs.kv4` behind ``prerope``) to pages of an engine's cache, and back, in one pass each way.

Shapes
    planes of a layer as the codec lays them out; where each begins in the block is given. Decoding takes any number of
    planes from one on, turns keys to their positions and values back from the Hadamard rotation, and writes pages.
Bytes moved
    about 0.29 of a 16-bit block on one side, the block on the other.
Bound
    PCIe for what comes from the host (staged by the copy engine: bytes of planes are too small for reads across PCIe);
    memory of the device otherwise.
"""

from kvstore_gpu.kv4.launch import packing, unpacking

__all__ = ["packing", "unpacking"]
