"""Many chunks behind one system prompt in a single forward pass (the idea of Prepacking, arXiv 2404.09529).

The chunks stand one after the other in one sequence, so that the matrix products see them as one batch without padding.
Their positions all begin behind the system prompt, and each attends to the system prompt and to itself only: the block
mask, carried out block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.prompt import LayerKV

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore_connectors.blend.model import Model


def pack(
    model: Model, chunks: Sequence[Tensor], system: Sequence[LayerKV] = ()
) -> tuple[list[list[LayerKV]], list[LayerKV]]:
    """KV of each chunk, computed behind a system prompt.

    Parameters
    ----------
    model : Model
    chunks : sequence of Tensor
        Token ids ``[n]``, int64, each.
    system : sequence of LayerKV
        The system prompt's KV from an earlier call, in which it was the only chunk; empty for none.

    Returns
    -------
    chunks : list of list of LayerKV
        Of each chunk, each layer: keys turned for the positions from the end of the system prompt on.
    whole : list of LayerKV
        The first of these, to be used as `system`.
    """
    first = len(system[0].keys) if system else 0
    sizes = [len(chunk) for chunk in chunks]
    device = chunks[0].device
    positions = torch.cat([torch.arange(first, first + size, device=device) for size in sizes])
    hidden = model.embed(torch.cat(list(chunks)))
    out: list[list[LayerKV]] = [[] for _ in chunks]
    for layer in range(model.layers):
        queries, keys, values = model.qkv(layer, hidden)
        queries, keys = model.rope(layer, queries, keys, positions)
        attended = []
        split = zip(queries.split(sizes), keys.split(sizes), values.split(sizes), positions.split(sizes), strict=True)
        for index, (q, k, v, p) in enumerate(split):
            out[index].append(LayerKV(k.clone(), v.clone()))
            seen_k = torch.cat([system[layer].keys, k]) if system else k
            seen_v = torch.cat([system[layer].values, v]) if system else v
            attended.append(model.attend(layer, q, seen_k, seen_v, p))
        hidden = model.post(layer, hidden, torch.cat(attended))
    return out, out[0]


def packs(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Which chunks go together, by index: as many in order as have `most` tokens; a longer one goes alone."""
    out: list[list[int]] = []
    used = most + 1
    for index, size in enumerate(sizes):
        if used + size > most:
            out.append([])
            used = 0
        out[-1].append(index)
        used += size
    return out
