"""Two neighbouring layers as one direction and two lengths: MiniCache's merge (arXiv 2405.14366), and the way back.

Shapes
    lower, upper, direction ``[token, head, dim]``; lengths float32 ``[2, token, head]`` (those of sink tokens can be
    beyond float16); angle float32 ``[token]``: mean over heads, in radians. Tokens far apart are to be kept unmerged.
Bytes moved
    3 x token x head x dim x element size + 8 x token x head. Bound: memory of the device.
"""

from kvstore_gpu.slerp.launch import merge, restore

__all__ = ["merge", "restore"]
