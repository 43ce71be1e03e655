"""Tokens of stored chunks to the rows of a prompt where they stand now, keys turned on the way.

Shapes
    piece: some tokens of a block, ``[layer][K|V][token][head][dim]``; rows: K and V of each layer,
    ``[row, head, dim]``; table: float32 cosines and sines ``[piece, pair]``, since all tokens of a piece move by one
    distance. A piece goes to any row, where `kvstore_gpu.rope` writes whole pages.
Bytes moved
    2 x layers x 2 x tokens x heads x dim x element size.
Bound
    memory of the device. Paper: CacheBlend, arXiv 2405.16444, section 4; RoFormer, arXiv 2104.09864.
"""

from kvstore_gpu.place.launch import Piece, place, placing

__all__ = ["Piece", "place", "placing"]
