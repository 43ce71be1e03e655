"""Computing the KV of a chunk in a context of our choosing, and placing it in a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore_connectors.blend.attention import segment_masses
from kvstore_connectors.blend.prompt import Capture, LayerKV, Prompt, Span, brought
from kvstore_connectors.blend.recompute import empty_cache, prefill
from kvstore_gpu.place import Piece, place
from kvstore_gpu.rope import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kvstore.rope import Rotary
    from kvstore_connectors.blend.model import Model
    from kvstore_connectors.blend.prompt import Cache


@dataclass(frozen=True)
class Chunk:
    """A chunk as it is kept: ids, KV with keys turned for positions from ``start``, and how it came to be."""

    ids: Tensor
    kv: tuple[LayerKV, ...]
    start: int
    capture: Capture
    external: Tensor | None = None

    @property
    def block(self) -> Tensor:
        """The bytes of its KV, as they are stored: uint8, of ``[layer][K|V][token][head][dim]``."""
        return (
            torch.stack([side for layer in self.kv for side in (layer.keys, layer.values)]).view(torch.uint8).flatten()
        )


def capture(model: Model, ids: Tensor, system: Tensor | None = None, before: Sequence[Tensor] = ()) -> Chunk:
    """Prefill a chunk behind a system prompt and other chunks, either of which may be absent.

    With chunks before it, the mass that each token puts on them is measured on the way, a mean over layers and heads.
    """
    lead = [part for part in ([] if system is None else [system]) + list(before) if len(part)]
    first = sum(len(part) for part in lead)
    others = (0 if system is None else len(system), first)
    external = torch.zeros(len(ids), device=ids.device)

    def watch(layer: int, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        mass = segment_masses(queries[first:], keys, rows[first:], model.scale, [others])
        external.add_(mass[0] / model.layers)

    _, cache = prefill(model, torch.cat([*lead, ids]), watch=watch if before else None)
    kind = Capture.LIVE if before else Capture.ISOLATED if system is None else Capture.SYSTEM
    kv = tuple(LayerKV(layer.keys[first:].clone(), layer.values[first:].clone()) for layer in cache)
    return Chunk(ids, kv, first, kind, external if before else None)


def assemble(
    model: Model, rotation: Rotary, system: Tensor, chunks: Sequence[Chunk], question: Tensor, room: int = 0
) -> tuple[Prompt, Cache]:
    """The prompt ``system + chunks + question`` and its cache with ``room`` for more, chunks moved to where they stand.

    A first chunk that was captured behind this system prompt is exact where it stands. On a GPU the kernel moves them
    that places loaded chunks.
    """
    spans: list[Span] = []
    at = len(system)
    for index, chunk in enumerate(chunks):
        kind = Capture.EXACT if not index and chunk.capture is Capture.SYSTEM and chunk.start == at else chunk.capture
        spans.append(Span(at, at + len(chunk.ids), kind, chunk.external))
        at += len(chunk.ids)
    prompt = Prompt(torch.cat([system, *(chunk.ids for chunk in chunks), question]), tuple(spans))
    cache = empty_cache(model, prompt.ids, room)
    distances = [span.start - chunk.start for span, chunk in zip(spans, chunks, strict=True)]
    pieces = [
        Piece(len(chunk.ids), 0, len(chunk.ids), span.start, bool(distance))
        for span, chunk, distance in zip(spans, chunks, distances, strict=True)
    ]
    turn = Turn.of(rotation, brought(torch.tensor(distances, dtype=torch.int64), prompt.ids.device))
    place([(held.keys, held.values) for held in cache], pieces, [chunk.block for chunk in chunks], turn)
    return prompt, cache
