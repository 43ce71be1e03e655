"""Pages of an engine's cache to blocks and back, byte for byte.

Shapes
    cache: for each layer K and V, ``[page, token, head, dim]`` with any strides (NHD, HND, K and V side by side or
    apart), or whole pages. A block: uint8 ``[layer][side][page][token][head][dim]``, on the device or in host memory
    registered with it.
Bytes moved
    each byte read once and written once: 2 x pages x page bytes x layers x sides.
Bound
    memory of the device, both sides on it; PCIe, one side in host memory.
"""

from kvstore_gpu.paged.launch import gather, gathering, scatter, scattering

__all__ = ["gather", "gathering", "scatter", "scattering"]
