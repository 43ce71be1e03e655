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
from kvstore_gpu.jobs import Launch, Listed, Part
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


def unpacking(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> Launch:
    """Make ready to decode blocks into pages, keys turned to their positions.

    All is checked, uploaded and made, and can be launched for some parts at a time.

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
    stream : torch.cuda.Stream, optional
        Instead of the current one, for what is uploaded and launched.
    max_blocks : int, optional
        Most thread blocks, so that a busy engine keeps its multiprocessors.

    Raises
    ------
    InvalidParams
        If something does not fit.
    """
    _check(cache, parts, spec, coder, places, rotary)
    tokens = sum(len(part.pages) for part in parts) * cache.page_tokens
    checks.tensor(positions, "positions", shape=(tokens,), dtypes=(torch.int64,), device=cache.device)
    if not tokens:
        return lambda first, last: None
    if uses_reference(cache.device):
        return _decoding(cache, parts, spec, coder, places, rotary, positions)
    rotated = block_of(cache.dim)
    listed = Listed(parts, cache.device, stream)
    cos, sin = table(rotary, positions, stream)
    args = (cache.bases, _places(cache, places), 0, cache.layers, cache.layers, *_strides(cache),
            _shape(cache, spec, coder, len(places), rotary))  # fmt: skip
    skipped = skip_mask(cache, rotary.skipped_layers)
    kind, style = FLOATS[cache.dtype], str(rotary.interleaved).lower()

    def launch(first: int, last: int) -> None:
        there, count = listed.run(first, last)
        if not count:
            return
        row = listed.before(first) * cache.page_tokens
        grid = blocks_for(count * cache.layers, cache.device, max_blocks)
        SOURCE.launch(f"unpack_keys<{kind}, {style}>", grid, (there, count, *args, cos[row:], sin[row:], skipped),
                      cache.device, threads=_KEY_THREADS, stream=stream)  # fmt: skip
        SOURCE.launch(f"unpack_values<{kind}>", grid, (there, count, *args, rotated), cache.device, stream=stream)

    return launch


def packing(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
    bad: torch.Tensor,
    *,
    stream: torch.cuda.Stream | None = None,
    max_blocks: int | None = None,
) -> Launch:
    """Make ready to encode pages into blocks, keys turned back; parameters and errors as of `unpacking`, and:

    Parameters
    ----------
    parts : sequence of Part
        Each has all pages of its block.
    places : Tensor
        Of all planes.
    bad : Tensor, int32, [part], on the cache's device
        Zeros; will not be 0 where a block has values that float16 cannot say, or that would be beyond the end of their
        type once they are decoded: it is not to be kept.
    """
    _check(cache, parts, spec, coder, places, rotary)
    if len(places) != len(coder.planes(spec.of(1), 0, Context())):
        raise checks.refuse("places", f"{len(places)} planes: all are needed")
    if any(len(part.pages) * cache.page_tokens != spec.tokens for part in parts):
        raise checks.refuse("parts", "a block is encoded as a whole")
    checks.tensor(positions, "positions", shape=(spec.tokens * len(parts),), dtypes=(torch.int64,), device=cache.device)
    checks.tensor(bad, "bad", shape=(len(parts),), dtypes=(torch.int32,), device=cache.device)
    if uses_reference(cache.device):
        return _encoding(cache, parts, spec, coder, places, rotary, positions, bad)
    if cache.dim & (cache.dim - 1) or not 8 <= cache.dim <= 256:
        raise checks.refuse("dim", f"{cache.dim}: a power of two from 8 to 256 is needed to encode")
    if not parts or not spec.tokens:
        return lambda first, last: None
    listed = Listed(parts, cache.device, stream)
    cos, sin = table(rotary, positions, stream)
    args = (cache.bases, _places(cache, places), cache.layers, *_strides(cache),
            _shape(cache, spec, coder, len(places), rotary))  # fmt: skip
    skipped = skip_mask(cache, rotary.skipped_layers)
    kind, style = FLOATS[cache.dtype], str(rotary.interleaved).lower()
    groups = max(-(-(spec.tokens - coder.kept(spec)) // coder.group), 1)

    def launch(first: int, last: int) -> None:
        blocks = last - first
        common, flags, row = (listed.run(first, last)[0], blocks, *args), bad[first:], spec.tokens * first
        grid = blocks_for(blocks * cache.layers * groups, cache.device, max_blocks)
        SOURCE.launch(f"pack_keys<{kind}, {style}>", grid, (*common, cos[row:], sin[row:], skipped, flags),
                      cache.device, threads=_KEY_THREADS, stream=stream)  # fmt: skip
        grid = blocks_for(blocks * cache.layers * (spec.tokens // cache.page_tokens), cache.device, max_blocks)
        SOURCE.launch(f"pack_values<{kind}, {block_of(cache.dim)}>", grid, (*common, flags), cache.device,
                      stream=stream)  # fmt: skip

    return launch


def _check(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
) -> None:
    coded.check(cache, parts, spec, coder, places)
    pairs = len(rotary.frequencies)
    if 2 * pairs > cache.dim or (2 * pairs if rotary.interleaved else pairs) % 8:
        raise checks.refuse("rotary", f"{pairs} pairs in heads of {cache.dim}: multiples of 8 are needed")
    if coder.kept(spec) == spec.tokens:
        raise checks.refuse("spec", "a block of sinks alone")
    if max(spec.tokens * spec.channels, sum(len(part.pages) for part in parts) * cache.layers) >> 31:
        raise checks.refuse("parts", "too many to be counted in 31 bits")


def _places(cache: PagedCache, places: torch.Tensor) -> torch.Tensor:
    return jobs.constant(places.contiguous().numpy().tobytes(), cache.device)


def _strides(cache: PagedCache) -> tuple[np.int64, int, int]:
    page, token, head, _ = (stride * cache.sample.element_size() for stride in cache.sample.stride())
    return np.int64(page), token, head


def _shape(cache: PagedCache, spec: BlockSpec, coder: KV4, planes: int, rotary: Rotary) -> torch.Tensor:
    """The kernels' struct Shape."""
    numbers = (spec.tokens, coder.kept(spec), coder.group, coder.k, coder.v, planes, cache.page_tokens, cache.heads,
               cache.dim, len(rotary.frequencies))  # fmt: skip
    return jobs.constant(np.array(numbers, np.int32).tobytes(), cache.device)


def _encoding(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
    bad: torch.Tensor,
) -> Launch:
    """The reference, for blocks at several positions."""
    starts, kept = positions[:: spec.tokens].tolist(), coder.kept(spec)

    def fits(unit: torch.Tensor) -> bool:
        return reference.fits(unit, kept, cache.dtype)

    def launch(first: int, last: int) -> None:
        for index in range(first, last):
            there, context = replace(spec, position=starts[index]), Context(rotary=rotary)
            good = reference.encode(cache, parts[index : index + 1], there, (PreRope(),), coder, places, context, fits)
            bad[index] = not all(good)

    return launch


def _decoding(
    cache: PagedCache,
    parts: Sequence[Part],
    spec: BlockSpec,
    coder: KV4,
    places: torch.Tensor,
    rotary: Rotary,
    positions: torch.Tensor,
) -> Launch:
    """The reference, for positions that may be others than the block's own."""
    theirs = positions.split([len(part.pages) * cache.page_tokens for part in parts])

    def launch(first: int, last: int) -> None:
        for part, there in zip(parts[first:last], theirs[first:last], strict=True):
            begin = part.first * cache.page_tokens
            whole = torch.arange(spec.tokens) + spec.position
            whole[begin : begin + len(there)] = there
            reference.decode(cache, [part], spec, (_To(rotary, whole),), coder, places, range(cache.layers), Context())

    return launch


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
