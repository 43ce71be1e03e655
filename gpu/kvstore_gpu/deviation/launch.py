"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

import torch

from kvstore_gpu import checks
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import THREADS, Source, blocks_for, uses_reference
from kvstore_gpu.deviation import reference

SOURCE = Source(
    "deviation", [f"deviation<{kind}, {w}>" for kind, wide in (("bf16", 8), ("f16", 8), ("f32", 4)) for w in (wide, 1)]
)


def deviation(
    fresh: torch.Tensor,
    kept: torch.Tensor,
    *,
    relative: bool = False,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> torch.Tensor:
    """Squared distance of each token's KV from what was kept.

    Parameters
    ----------
    fresh, kept : Tensor, [token, head, dim]
        Of one type; keys both before or both after the rotation.
    relative : bool
        Divide by the squared length of the fresh KV, so that layers can be compared.

    Returns
    -------
    Tensor, float32, [token]

    Raises
    ------
    InvalidParams
        If shapes, types or devices do not fit.
    """
    checks.kv(fresh, "fresh", (None, None, None))
    checks.kv(kept, "kept", tuple(fresh.shape), fresh)
    if uses_reference(fresh.device):
        return reference.deviation(fresh, kept, relative, torch.float32)
    tokens, width = fresh.shape[0], fresh.shape[1] * fresh.shape[2]
    out = torch.empty(tokens, dtype=torch.float32, device=fresh.device)
    if tokens:
        wide = 16 // fresh.element_size()
        name = f"deviation<{FLOATS[fresh.dtype]}, {wide if width % wide == 0 else 1}>"
        grid = blocks_for(-(-tokens * 32 // THREADS), fresh.device, max_blocks)
        SOURCE.launch(name, grid, (fresh, kept, tokens, width, relative, out), fresh.device, stream=stream)
    return out
