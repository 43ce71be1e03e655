"""What recomputed tokens of a chunk differ by, carried on to the tokens behind them that were not recomputed.

For a token at position j of a chunk, with the recomputed tokens i before it in the chunk, weights w, and differences d
of recomputed keys (or values) from kept ones, keys as they would be at position zero:

    kept_j += strength * w_j * sum_i(w_i * d_i) / (sum_i(w_i ** 2) + ridge)

which is the least-squares estimate of how far a token is off, with a prior of nothing worth `ridge`.

Shapes
    fresh ``[row, head, dim]``, kept ``[token, head, dim]``, in place; a table of cosines and sines ``[token, pair]``.
Bytes moved
    2 x tokens x head x dim x element size in and as many out, the recomputed rows twice more; 8 bytes a token and pair.
Bound
    memory of the device.
"""

from kvstore_gpu.carry.launch import Carried, carry

__all__ = ["Carried", "carry"]
