"""What it would take to compute a block again."""

from __future__ import annotations

from kvstore.types import BlockHeader

_TOKEN_BYTES = 4
HALF_DEPTH = 32_768
"""Position at which attending to what is before costs as much as all else a token needs. For 8B parameters in the shape
of Llama 3 (2 x 8e9 operations a token, 4 x 32 x 4096 a token and position attended to) it is 30,500."""


def recompute_cost(header: BlockHeader, nbytes: int) -> float:
    """Prefill work of a block, in tokens at position 0: a token's work grows with what it attends to.

    A block whose header carries no tokens counts as one token per 4 KiB, so that blocks of one namespace compare.
    """
    tokens = len(header.tokens) // _TOKEN_BYTES or nbytes / 4096
    return tokens * (1.0 + (header.position + tokens / 2) / HALF_DEPTH)
