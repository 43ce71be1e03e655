"""Whole encoded blocks to and from pages: what `kvstore.codecs` writes and reads, byte for byte, coded on the device.

A frame is a header with a checksum of every part, then the parts, plane after plane. Kernels make and read parts; the
header is the host's, where the bytes arrive anyway (`Frames.seal`). Parts are not checked again on the way to the
device: what lies in host memory was checked when it came there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import xxhash

from kvstore.codecs import Chain
from kvstore.codecs.base import BlockSpec, Context
from kvstore.codecs.fp8 import FP8
from kvstore.codecs.frame import head, head_nbytes, seal_head
from kvstore.codecs.kv4 import KV4
from kvstore.codecs.prerope import PreRope
from kvstore.errors import ConfigError
from kvstore.rope import Rotary
from kvstore_gpu import coded, fp8, kv4
from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Launch, Part, chained


@dataclass(frozen=True)
class _Form:
    """Blocks of the same layout: all but the first of a prompt, which keeps its sinks, are alike."""

    spec: BlockSpec
    sizes: np.ndarray
    """int64, ``[plane, layer]``"""
    start: int

    @cached_property
    def places(self) -> torch.Tensor:
        """Where parts begin, int64, ``[plane, layer]``."""
        flat = self.sizes.ravel()
        return torch.from_numpy((self.start + np.cumsum(flat) - flat).reshape(self.sizes.shape))

    @cached_property
    def ends(self) -> list[int]:
        """Bytes of a frame with so many planes."""
        return (self.start + np.cumsum(self.sizes.sum(1))).tolist()

    @property
    def nbytes(self) -> int:
        return self.ends[-1]


class Frames:
    """Encoded blocks of one chain in a cache.

    Parameters
    ----------
    cache : PagedCache
    chain : Chain
        ``prerope|kv4(…)`` or ``fp8(…)``: those that kernels know.
    tokens : int
        Tokens of a block.
    context : Context
        With the model's rotation, for chains that turn keys back.

    Raises
    ------
    ConfigError
        If the chain is not one of these.
    """

    def __init__(self, cache: PagedCache, chain: Chain, tokens: int, context: Context) -> None:
        if not has_kernels(chain) or not isinstance(chain.coder, KV4 | FP8):
            raise ConfigError(f"there are no kernels for {chain}.", "Known are `fp8` and `prerope|kv4`.")
        self.chain, self._coder = chain, chain.coder
        self._cache = cache
        self._context = context
        self._references = tuple(step.reference(context) for step in chain.steps)
        self._later = self._form(coded.spec_of(cache, tokens, tokens))
        self._first = self._form(coded.spec_of(cache, tokens, 0))

    def _form(self, spec: BlockSpec) -> _Form:
        sizes = coded.sizes_of(self.chain.coder, spec).numpy()
        label = self._label(spec, len(sizes))
        return _Form(spec, sizes, head_nbytes(label, spec.layers, len(sizes)))

    def _label(self, spec: BlockSpec, planes: int) -> bytes:
        return head(spec, str(self.chain), self._references, spec.layers, planes)

    def _of(self, position: int) -> _Form:
        return self._later if position else self._first

    def nbytes(self, position: int) -> int:
        """Bytes of a block whose first token has this position."""
        return self._of(position).nbytes

    # -- on the device -------------------------------------------------------------------------------------------------

    def packing(self, parts: Sequence[Part], bad: torch.Tensor, stream: torch.cuda.Stream | None) -> Launch:
        """Make ready to encode pages into blocks, all but their headers.

        Parameters
        ----------
        parts : sequence of Part
            Each has all pages of its block, and its position.
        bad : Tensor, int32, [part], on the cache's device
            Zeros; will not be 0 where a block has values that the code cannot say: it is not to be kept.
        stream : torch.cuda.Stream or None
        """
        runs, begin, coder = [], 0, self._coder
        for form, some in self._alike(parts):
            flags = bad[begin : begin + len(some)]
            if isinstance(coder, KV4):
                at = self._positions(some, stream)
                one = kv4.packing(self._cache, some, form.spec, coder, form.places, self._rotary, at, flags,
                                  stream=stream)  # fmt: skip
            else:
                one = fp8.packing(self._cache, some, form.spec, coder, form.places, flags, stream=stream)
            runs.append((len(some), one))
            begin += len(some)
        return chained(runs)

    def pack(self, parts: Sequence[Part], stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Encode pages into blocks at once; the flags of `packing`."""
        with torch.cuda.stream(stream):
            bad = torch.zeros(len(parts), dtype=torch.int32, device=self._cache.device)
        self.packing(parts, bad, stream)(0, len(parts))
        return bad

    def unpacking(self, parts: Sequence[Part], stream: torch.cuda.Stream | None) -> Launch:
        """Make ready to decode blocks into pages, keys turned to the positions they were computed at."""
        runs, coder = [], self._coder
        for form, some in self._alike(parts):
            planes = form.places[: self._planes(form, some[0].block.numel())]
            if isinstance(coder, KV4):
                at = self._positions(some, stream)
                one = kv4.unpacking(self._cache, some, form.spec, coder, planes, self._rotary, at, stream=stream)
            else:
                one = fp8.unpacking(self._cache, some, form.spec, coder, planes, stream=stream)
            runs.append((len(some), one))
        return chained(runs)

    def unpack(self, parts: Sequence[Part], stream: torch.cuda.Stream | None) -> None:
        """Decode blocks into pages at once."""
        self.unpacking(parts, stream)(0, len(parts))

    def _alike(self, parts: Sequence[Part]) -> list[tuple[_Form, list[Part]]]:
        """Runs of parts that one launch can take: of one layout, with as many planes."""

        keyed = groupby(
            parts, lambda part: (part.position == 0, self._planes(self._of(part.position), part.block.numel()))
        )
        return [(self._of(int(not first)), list(some)) for (first, _), some in keyed]

    def _positions(self, parts: Sequence[Part], stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Positions of the tokens of all parts, on the device."""
        page = self._cache.page_tokens
        starts = np.array([part.position + part.first * page for part in parts])
        counts = np.array([len(part.pages) * page for part in parts])
        ends = np.cumsum(counts)
        at = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        made = torch.from_numpy(at)
        if self._cache.device.type == "cpu":
            return made
        with torch.cuda.stream(stream):
            return made.pin_memory().to(self._cache.device, non_blocking=True)

    @property
    def _rotary(self) -> Rotary:
        if self._context.rotary is None:
            raise ConfigError("the model's rotation is not known.", "It is needed by `prerope`.")
        return self._context.rotary

    @staticmethod
    def _planes(form: _Form, nbytes: int) -> int:
        """How many whole planes so many bytes hold."""
        return bisect_right(form.ends, nbytes)

    # -- on the host ---------------------------------------------------------------------------------------------------

    def seal(self, data: np.ndarray, position: int) -> None:
        """Write the header of a block whose parts have arrived, and zeros behind it; uint8, at least `nbytes`."""
        form = self._of(position)
        data[form.nbytes :] = 0
        places, sizes = form.places.numpy(), form.sizes
        checks = np.empty(sizes.shape, np.uint64)
        for plane, layer in np.ndindex(sizes.shape):
            at = int(places[plane, layer])
            checks[plane, layer] = xxhash.xxh3_64_intdigest(data[at : at + int(sizes[plane, layer])].data)
        seal_head(data, self._label(replace(form.spec, position=position), len(sizes)), sizes, checks)


def has_kernels(chain: Chain) -> bool:
    """Whether kernels encode and decode blocks of a chain."""
    if chain.byte_steps:
        return False
    if isinstance(chain.coder, KV4):
        return chain.blocks == (PreRope(),)
    return isinstance(chain.coder, FP8) and not chain.blocks
