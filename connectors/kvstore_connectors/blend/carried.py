"""How far tokens are off that are not recomputed, told by those of their chunk that are.

What a chunk was captured without is missing in all of its tokens. A fifth of how far its values are off is the same in
the whole chunk, and what attention sums over many tokens is just that part: the rest cancels out. So once some tokens
of a chunk are recomputed in a layer, those behind them are moved the way these went, as far as they have not seen what
is before the chunk. Figures: docs/chunks.md.

A token tells only those behind it, so what is recomputed depends on nothing that comes later, as in full prefill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.prompt import Capture, brought
from kvstore_connectors.blend.selectors.unseen import host_unseen
from kvstore_gpu.carry import Carried
from kvstore_gpu.rope import Turn

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore.rope import Rotary
    from kvstore_connectors.blend.prompt import Prompt

STRENGTH = 0.7
"""Of the estimate: the tokens that are recomputed were chosen because they are off, and so are further off."""

RIDGE = 1.0
"""What speaks for nothing, in tokens that have seen nothing."""


def carried_from(prompt: Prompt, rotary: Rotary, rows: Tensor) -> Carried:
    """From recomputed rows (positions ``[r]``) to the others of their chunks."""
    weights = host_unseen(prompt)
    spans = [span for span in prompt.spans if span.capture is not Capture.EXACT]
    # A first token is off in a way of its own: it was a sink.
    weights[[span.start for span in spans]] = 0.0
    weights[prompt.false_sinks] = 0.0
    device = prompt.ids.device
    turn = Turn.of(rotary, torch.arange(len(prompt.ids), device=device))
    edges = [(span.start, span.stop) for span in spans]
    return Carried.of(edges, rows, brought(weights, device), turn, strength=STRENGTH, ridge=RIDGE)
