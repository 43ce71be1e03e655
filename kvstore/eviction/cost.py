"""What it would take to compute a block again, and what it would be worth."""

from __future__ import annotations

import math

import numpy as np

from kvstore.types import BlockHeader

_TOKEN_BYTES = 4
HALF_DEPTH = 32_768
"""Position at which attending to what is before costs as much as all else a token needs. For 8B parameters in the shape
of Llama 3 (2 x 8e9 operations a token, 4 x 32 x 4096 a token and position attended to) it is 30,500."""


WEIGHTS = (0.5, 2.0)
"""Least and largest factor that importance brings: it says what a block is worth to who has its prompt, not whether
that prompt comes again."""


def recompute_cost(header: BlockHeader, nbytes: int) -> float:
    """Prefill work of a block, in tokens at position 0, times its `weight`.

    A token's work grows with what it attends to. A block whose header carries no tokens counts as one token per 4 KiB,
    so that blocks of one namespace compare.
    """
    tokens = len(header.tokens) // _TOKEN_BYTES or nbytes / 4096
    return tokens * (1.0 + (header.position + tokens / 2) / HALF_DEPTH) * weight(header)


def weight(header: BlockHeader) -> float:
    """How much attention a block gets, as a multiple of an even share, within `WEIGHTS`; 1 if it was not measured."""
    if not header.importance or len(header.importance) % 2:
        return 1.0
    mean = float(np.frombuffer(header.importance, "<f2").mean(dtype=np.float64))
    return min(max(mean, WEIGHTS[0]), WEIGHTS[1]) if math.isfinite(mean) else 1.0
