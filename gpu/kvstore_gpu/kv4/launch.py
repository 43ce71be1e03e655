"""Checks, then the kernels on the caller's stream, or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvstore.codecs.base import BlockSpec, Context
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.prerope import PreRope
from kvstore.rope import Rotary
from kvstore_gpu import checks, coded, jobs
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.checks import FLOATS
from kvstore_gpu.compile import PLANES, Source, blocks_for, uses_reference
from kvstore_gpu.hadamard.launch import block_of
from kvstore_gpu.jobs import Part
from kvstore_gpu.kv4 import reference
from kvstore_gpu.rope.launch import skip_mask, table

_STYLES = ("false", "true")
_ROTATED = (8, 16, 32)
_KEY_THREADS = 128
SOURCE = Source(
    "kv4",
    [f"{way}_keys<{kind}, {style}>" for way in ("unpack", "pack") for kind in FLOATS.values() for style in _STYLES]
    + [f"unpack_values<{kind}>" for kind in FLOATS.values()]
    + [f"pack_values<{kind}, {size}>" for kind in FLOATS.values() for size in _ROTATED],
    (*PLANES, "kv4/layer.cuh"),
)


def unpack(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
    *,
    layers: range | None = None,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> None:
    """Decode blocks into pages, keys turned to their positions.

    Parameters
    ----------
    cache : PagedCache
    parts : sequence of Part
        ``block``: the coded block, on the cache's device; ``first``: place of the first page in it.
    spec : BlockSpec
        Of every block; its position tells whether the sinks are in it.
    coder : KV4
    places : Tensor, int64, [plane, layer], on the CPU
        Where parts begin in a block, for as many planes as are there; multiples of 4.
    rotary : Rotary
    positions : Tensor, int64, [tokens of all parts]
        Where each token goes; on the cache's device.
    layers : range, optional
        Layers to decode; all by default.

    Raises
    ------
    InvalidParams
        If something does not fit.
    """
    chosen = _check(cache, parts, spec, coder, places, rotary, layers)
    tokens = sum(len(part.pages) for part in parts) * cache.page_tokens
    checks.tensor(positions, "positions", shape=(tokens,), dtypes=(torch.int64,), device=cache.device)
    if not tokens or not chosen:
        return
    if uses_reference(cache.device):
        _decode(cache, parts, spec, coder, places, rotary, positions, chosen)
        return
    rotated = block_of(cache.dim)
    count, common = _common(cache, parts, places, stream)
    cos, sin = table(rotary, positions, stream)
    args = (*common[:3], common[3], chosen.start, len(chosen), cache.layers, *_strides(cache),
            _shape(cache, spec, coder, len(places), rotary))  # fmt: skip
    skipped = skip_mask(cache, rotary.skipped_layers)
    grid = blocks_for(count * len(chosen), cache.device, max_blocks)
    kind, style = FLOATS[cache.dtype], str(rotary.interleaved).lower()
    SOURCE.launch(f"unpack_keys<{kind}, {style}>", grid, (*args, cos, sin, skipped), cache.device,
                  threads=_KEY_THREADS, stream=stream)  # fmt: skip
    SOURCE.launch(f"unpack_values<{kind}>", grid, (*args, rotated), cache.device, stream=stream)


def pack(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor | None = None,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> torch.Tensor:
    """Encode pages into blocks, keys turned back from their positions: those that ``spec`` tells, if none are given.

    Parameters as of `unpack`; each part has all pages of its block, and there are all planes.

    Returns
    -------
    Tensor, int32, [part], on the cache's device
        Not 0 where a block has values that float16 cannot say: it is not to be kept.

    Raises
    ------
    InvalidParams
        If something does not fit.
    """
    _check(cache, parts, spec, coder, places, rotary, None)
    if len(places) != len(coder.planes(spec.of(1), 0, Context())):
        raise checks.refuse("places", f"{len(places)} planes: all are needed")
    if any(len(part.pages) * cache.page_tokens != spec.tokens for part in parts):
        raise checks.refuse("parts", "a block is encoded as a whole")
    if positions is not None:
        checks.tensor(positions, "positions", shape=(spec.tokens * len(parts),), dtypes=(torch.int64,),
                      device=cache.device)  # fmt: skip
    if uses_reference(cache.device):
        _encode(cache, parts, spec, coder, places, rotary, positions)
        return torch.zeros(len(parts), dtype=torch.int32)
    if cache.dim & (cache.dim - 1) or not 8 <= cache.dim <= 256:
        raise checks.refuse("dim", f"{cache.dim}: a power of two from 8 to 256 is needed to encode")
    with torch.cuda.stream(stream):
        bad = torch.zeros(len(parts), dtype=torch.int32, device=cache.device)
        if positions is None:
            there = torch.arange(spec.position, spec.position + spec.tokens, device=cache.device)
            positions = there.repeat(len(parts))
    if not parts or not spec.tokens:
        return bad
    _, common = _common(cache, parts, places, stream)
    cos, sin = table(rotary, positions, stream)
    shape = _shape(cache, spec, coder, len(places), rotary)
    args = (common[0], len(parts), *common[2:], cache.layers, *_strides(cache), shape)
    skipped = skip_mask(cache, rotary.skipped_layers)
    kind, style = FLOATS[cache.dtype], str(rotary.interleaved).lower()
    groups = max(-(-(spec.tokens - coder.kept(spec)) // coder.group), 1)
    grid = blocks_for(len(parts) * cache.layers * groups, cache.device, max_blocks)
    SOURCE.launch(f"pack_keys<{kind}, {style}>", grid, (*args, cos, sin, skipped, bad), cache.device,
                  threads=_KEY_THREADS, stream=stream)  # fmt: skip
    grid = blocks_for(len(parts) * cache.layers * (spec.tokens // cache.page_tokens), cache.device, max_blocks)
    SOURCE.launch(f"pack_values<{kind}, {block_of(cache.dim)}>", grid, (*args, bad), cache.device, stream=stream)
    return bad


def _check(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    layers: range | None,
) -> range:
    coded.check(cache, parts, spec, coder, places)
    pairs = len(rotary.frequencies)
    if 2 * pairs > cache.dim or (2 * pairs if rotary.interleaved else pairs) % 8:
        raise checks.refuse("rotary", f"{pairs} pairs in heads of {cache.dim}: multiples of 8 are needed")
    if coder.kept(spec) == spec.tokens:
        raise checks.refuse("spec", "a block of sinks alone")
    if max(spec.tokens * spec.channels, sum(len(part.pages) for part in parts) * cache.layers) >> 31:
        raise checks.refuse("parts", "too many to be counted in 31 bits")
    chosen = range(cache.layers) if layers is None else layers
    if len(chosen) and not (chosen.start >= 0 and chosen.stop <= cache.layers and chosen.step == 1):
        raise checks.refuse("layers", f"{chosen} of {cache.layers}")
    return chosen


def _common(
    cache: PagedCache, parts: Sequence[Part], places: torch.Tensor, stream: torch.cuda.Stream | None
) -> tuple[int, tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]]:
    count = sum(len(part.pages) for part in parts)
    places_there = jobs.constant(places.contiguous().numpy().tobytes(), cache.device)
    return count, (coded.table(cache, parts, stream), count, cache.bases, places_there)


def _strides(cache: PagedCache) -> tuple[np.int64, int, int]:
    page, token, head, _ = (stride * cache.sample.element_size() for stride in cache.sample.stride())
    return np.int64(page), token, head


def _shape(cache: PagedCache, spec: BlockSpec, coder: KV4, planes: int, rotary: Rotary) -> torch.Tensor:
    """The kernels' struct Shape."""
    numbers = (spec.tokens, coder.kept(spec), coder.group, coder.k, coder.v, planes, cache.page_tokens, cache.heads,
               cache.dim, len(rotary.frequencies))  # fmt: skip
    return jobs.constant(np.array(numbers, np.int32).tobytes(), cache.device)


def _encode(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor | None,
) -> None:
    """The reference, for blocks at several positions."""
    starts = [spec.position] * len(parts) if positions is None else positions[:: spec.tokens].tolist()
    for part, start in zip(parts, starts, strict=True):
        there = replace(spec, position=start)
        reference.encode(cache, [part], there, (PreRope(),), coder, places, Context(rotary=rotary))


def _decode(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
    layers: range,
) -> None:
    """The reference, for positions that may be others than the block's own."""
    row = 0
    for part in parts:
        tokens = len(part.pages) * cache.page_tokens
        there = positions[row : row + tokens]
        row += tokens
        first = part.first * cache.page_tokens
        whole = torch.arange(spec.tokens) + spec.position
        whole[first : first + tokens] = there
        reference.decode(cache, [part], spec, (_To(rotary, whole),), coder, places, layers, Context())


class _To(PreRope):
    """``prerope``, to positions that are given."""

    def __init__(self, rotary: Rotary, positions: torch.Tensor) -> None:
        object.__setattr__(self, "turning", (rotary, positions))

    def inverse(self, unit: torch.Tensor, spec: BlockSpec, layer: int, context: Context) -> torch.Tensor:
        del spec, context
        rotary, positions = self.__dict__["turning"]
        if layer not in rotary.skipped_layers:
            unit[0, 0] = rotary.turn(unit[0, 0], rotary.table(positions))
        return unit
