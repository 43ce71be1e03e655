"""Checks, then the kernel on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.rope import Rotary
from kvstore_gpu import checks, host, jobs
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import TURN, Source, blocks_for, uses_reference
from kvstore_gpu.jobs import Part
from kvstore_gpu.rope import reference

WIDTHS = {"bf16": 8, "f16": 8, "f32": 4}
"""Elements in 16 bytes."""


def turning(kernel: str) -> list[str]:
    """Instantiations of a kernel that turns keys: types, styles, elements a thread takes at once."""
    return [
        f"{kernel}<{kind}, {style}, {width}>"
        for kind, wide in WIDTHS.items()
        for style, narrow in (("false", 1), ("true", 2))
        for width in (wide, narrow)
    ]


SOURCE = Source("rope", turning("shift"), TURN)


@dataclass(frozen=True, eq=False)
class Turn:
    """How far keys are turned.

    Attributes
    ----------
    cos, sin : Tensor, float32, [tokens, pairs] or [1, pairs]
        One row a token, in the order of the parts and their pages; or one row for all.
    interleaved : bool
    skipped_layers : frozenset of int
        Layers without positions.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False
    skipped_layers: frozenset[int] = frozenset()

    @staticmethod
    def of(rotary: Rotary, distances: torch.Tensor) -> Turn:
        """The turn by distances (int64 ``[tokens]`` or ``[1]``), angles in float64, made where they lie."""
        cos, sin = table(rotary, distances)
        return Turn(cos, sin, rotary.interleaved, rotary.skipped_layers)


def scatter(
    cache: PagedCache,
    parts: Sequence[Part],
    block_pages: int,
    turn: Turn,
    *,
    layers: range | None = None,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Copy blocks into pages of the cache and turn the keys.

    Parameters as of `kvstore_gpu.paged.scatter`, and ``turn``: the turn of each token.

    Raises
    ------
    InvalidParams
        If something does not fit: the cache has no K and V, the table another number of tokens or too many pairs.
    """
    jobs.check(cache, parts, block_pages)
    chosen = check_turn(cache, parts, turn, layers)
    if uses_reference(cache.device):
        reference.scatter(cache, parts, block_pages, chosen, turn.cos, turn.sin, turn.interleaved, turn.skipped_layers)
        return
    parts = [part for part in parts if part.pages]
    if not parts or not chosen:
        return
    table = jobs.table(parts, host.addresses([part.block for part in parts], cache.device))
    page = cache.page_nbytes
    size, pairs = cache.sample.element_size(), turn.cos.shape[1]
    strides = [stride * size for stride in cache.sample.stride()]
    args = (
        jobs.upload(table, cache.device, stream), len(table), cache.bases, chosen.start, len(chosen),
        np.int64(page), np.int64(page * block_pages), np.int64(strides[0]), strides[1], strides[2],
        cache.page_tokens, cache.heads, cache.dim, pairs, turn.cos, turn.sin, len(turn.cos) == 1,
        skip_mask(cache, turn.skipped_layers),
    )  # fmt: skip
    name = f"shift<{FLOATS[cache.dtype]}, {str(turn.interleaved).lower()}, {_width(cache, table, turn)}>"
    SOURCE.launch(name, blocks_for(len(table) * len(chosen) * 2, cache.device, max_blocks), args, cache.device,
                  stream=stream)  # fmt: skip


def _width(cache: PagedCache, table: np.ndarray, turn: Turn) -> int:
    wide, pairs = WIDTHS[FLOATS[cache.dtype]], turn.cos.shape[1]
    fits = cache.dim % wide == 0 and (2 * pairs if turn.interleaved else pairs) % wide == 0
    aligned = cache.rows.unit == 16 and cache.dim * cache.sample.element_size() % 16 == 0
    if fits and aligned and not (table["block"] % np.uint64(16)).any():
        return wide
    return 2 if turn.interleaved else 1


def check_turn(cache: PagedCache, parts: Sequence[Part], turn: Turn, layers: range | None) -> range:
    """Refuse a turn that does not fit; the layers to work on."""
    if cache.sides != 2 or cache.dtype not in FLOATS:
        raise checks.refuse("cache", f"{cache.sides} sides of {cache.dtype}: K and V of floats are needed")
    chosen = cache.chosen(layers)
    tokens = sum(len(part.pages) for part in parts) * cache.page_tokens
    for name, values in (("cos", turn.cos), ("sin", turn.sin)):
        checks.tensor(values, name, shape=(None, None), dtypes=(torch.float32,), device=cache.device, align=16)
    if turn.cos.shape != turn.sin.shape or len(turn.cos) not in (1, tokens) or 2 * turn.cos.shape[1] > cache.dim:
        raise checks.refuse("turn", f"tables {tuple(turn.cos.shape)} and {tuple(turn.sin.shape)} for {tokens} tokens")
    return chosen


def skip_mask(cache: PagedCache, skipped: frozenset[int]) -> torch.Tensor:
    """One byte a layer: whether it has no positions."""
    return jobs.constant(bytes(layer in skipped for layer in range(cache.layers)), cache.device)


def table(
    rotary: Rotary, positions: torch.Tensor, stream: torch.cuda.Stream | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as `Rotary.table` makes them, without waiting for the device."""
    with torch.cuda.stream(stream):
        rates = jobs.constant(np.array(rotary.frequencies).tobytes(), positions.device).view(torch.float64)
        angles = positions[:, None] * rates  # in float64
        cos, sin = (torch.empty(angles.shape, dtype=torch.float32, device=angles.device) for _ in range(2))
        return torch.cos(angles, out=cos), torch.sin(angles, out=sin)
