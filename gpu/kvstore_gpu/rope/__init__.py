"""Blocks to pages of an engine's cache, keys turned to other positions on the way.

Shapes
    block: ``[layer][K|V][page][token][head][dim]``; table: float32 cosines and sines ``[token, pair]``, of the tokens
    of all parts in order, or one row for all (a chunk moved by one distance). ``pairs`` may be less than half of
    ``dim`` (partial rotation); layers without positions are not turned. NeoX and interleaved pairs; scaled variants
    differ in their frequencies only (`kvstore.rope`).
Bytes moved
    as of `kvstore_gpu.paged`; the table (8 bytes a token and pair) is shared by all layers and heads.
Bound
    memory of the device, or PCIe. Paper: RoFormer, arXiv 2104.09864.
"""

from kvstore_gpu.rope.launch import Turn, scatter

__all__ = ["Turn", "scatter"]
