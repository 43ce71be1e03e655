"""Where a token's K and V lie inside a page of vLLM's cache, learned from the layer's own write operation.

Every backend shows its cache as ``[block, head, token, channel]`` and arranges the memory inside a page as it likes:
the CPU backend keeps K transposed, others keep K and V side by side. So coordinates are written through the operation
that the layer itself uses, and read back from raw memory. If each coordinate turns out to be a fixed stride, K and V
are plain views, and blocks are stored in kvstore's canonical order, whatever the backend. If not (tile-packed pages),
whole pages are stored as they are, under a layout name of their own, so that no other backend ever reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.errors import ConfigError
from kvstore_connectors.base import log

CANONICAL = "lkthd1"
"""[layer][K|V][token][kv_head][dim], keys after RoPE."""

PROBE_LIMIT = 1 << 28
"""Largest scratch memory of a probe, in bytes; a cache whose blocks are not outermost would need more."""

_DIGIT = 128
"""Coordinates are written in digits of this base: 1 to 128 is exact in every floating type a cache may have."""

WriteOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""write(key [token, head, dim], value, cache, slots)"""


@dataclass(frozen=True)
class PageViews:
    """A layer's cache as what is stored of it.

    Attributes
    ----------
    layout : str
        Name for the namespace: ``lkthd1``, or one that only caches of the very same arrangement have.
    sides : tuple of Tensor
        Views into the cache: K and V, each ``[block, token, head, dim]``; or whole pages, ``[block, ...]``.
    """

    layout: str
    sides: tuple[torch.Tensor, ...]

    @property
    def page_tokens_known(self) -> bool:
        """Whether the order inside a page is known."""
        return self.layout == CANONICAL


def learn(cache: torch.Tensor, write: WriteOp | None, heads: int, dim: int, producer: str) -> PageViews:
    """Find out how a layer's cache is arranged.

    Parameters
    ----------
    cache : Tensor, [block, head, token, channel]
        The layer's cache as registered.
    write : callable or None
        The layer's own write operation; None if it has another form (MLA), then whole pages are kept.
    heads, dim : int
        KV heads of this rank and size of a head.
    producer : str
        Backend and version; names the layout where pages are kept whole.
    """
    offsets = None
    if write is not None and cache.dim() == 4 and cache.shape[3] == 2 * dim and cache.shape[1] == heads:
        try:
            offsets = probe(cache, write, dim)
        except Exception:
            log.warning("kvstore: this backend's pages can not be probed; they are kept as they are.", exc_info=True)
    if offsets is None:
        return PageViews(_page_name(cache, None, producer), (cache,))
    views = [_affine_view(cache, side) for side in offsets]
    if any(view is None for view in views):
        return PageViews(_page_name(cache, offsets, producer), (cache,))
    return PageViews(CANONICAL, tuple(view for view in views if view is not None))


def probe(cache: torch.Tensor, write: WriteOp, dim: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Offsets in a page of each element of K and of V.

    Returns
    -------
    (k, v) : int64 Tensors, [token, head, dim], in elements from the start of the page
        None if a page can not be probed: too large, or elements are shared or missing.
    """
    _, heads, tokens, _ = cache.shape
    strides = cache.stride()
    shape = (2, *cache.shape[1:])
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if length * cache.element_size() > PROBE_LIMIT:
        return None
    raw = torch.zeros(length, dtype=cache.dtype, device=cache.device)
    scratch = raw.as_strided(shape, strides)
    slots = torch.arange(tokens, 2 * tokens, dtype=torch.int64, device=cache.device)
    found = []
    for side in (0, 1):
        coordinates = []
        for axis, size in enumerate((tokens, heads, dim)):
            total, touched = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
            for weight, pattern in _digits(size):
                values = pattern.view([-1 if a == axis else 1 for a in range(3)]).expand(tokens, heads, dim)
                full = values.to(device=cache.device, dtype=cache.dtype).contiguous()
                zero = torch.zeros_like(full)
                raw.zero_()
                write(*((full, zero) if side == 0 else (zero, full)), scratch, slots)
                seen = raw.cpu().to(torch.float32).round().to(torch.int64)
                total += weight * (seen - 1).clamp(min=0)
                touched = seen > 0
            coordinates.append((total, touched))
        offsets = _place(coordinates, (tokens, heads, dim), strides[0])
        if offsets is None:
            return None
        found.append(offsets)
    both = torch.cat([offsets.reshape(-1) for offsets in found])
    if both.unique().numel() != both.numel():
        return None
    return found[0], found[1]


def _digits(size: int) -> list[tuple[int, torch.Tensor]]:
    """(weight, digit + 1 of each coordinate) for as many digits as `size` needs."""
    index = torch.arange(size)
    out = [(1, index % _DIGIT + 1)]
    if size > _DIGIT:
        out.append((_DIGIT, index // _DIGIT % _DIGIT + 1))
    return out


def _place(
    coordinates: list[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, int, int], block_stride: int
) -> torch.Tensor | None:
    """Offsets by coordinate, or None if not every coordinate was written to exactly one place of the second block."""
    touched = [where for _, where in coordinates]
    if not (torch.equal(touched[0], touched[1]) and torch.equal(touched[0], touched[2])):
        return None
    position = torch.nonzero(touched[0]).squeeze(1)
    count = shape[0] * shape[1] * shape[2]
    if position.numel() != count or int(position.min()) < block_stride:
        return None
    token, head, dim = (total[position] for total, _ in coordinates)
    flat = (token * shape[1] + head) * shape[2] + dim
    if flat.unique().numel() != count or int(flat.max()) >= count:
        return None
    offsets = torch.empty(count, dtype=torch.int64)
    offsets[flat] = position - block_stride
    return offsets.view(shape)


def _affine_view(cache: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor | None:
    """[block, token, head, dim] view, if the offsets are a sum of one stride for each axis."""
    base = int(offsets[0, 0, 0])
    strides = []
    expected = torch.full_like(offsets, base)
    for axis, size in enumerate(offsets.shape):
        step = int(offsets.select(axis, min(1, size - 1))[0, 0]) - base if size > 1 else 0
        shape = [-1 if a == axis else 1 for a in range(3)]
        expected = expected + (torch.arange(size) * step).view(shape)
        strides.append(step)
    if not torch.equal(expected, offsets) or min(strides) < 0:
        return None
    return cache.as_strided(
        (cache.shape[0], *offsets.shape), (cache.stride(0), *strides), cache.storage_offset() + base
    )


def _page_name(cache: torch.Tensor, offsets: tuple[torch.Tensor, ...] | None, producer: str) -> str:
    """Name of whole pages: what is known of their order, so that only caches with the same order share them."""
    digest = hashlib.sha256()
    digest.update(repr((tuple(cache.shape[1:]), str(cache.dtype), producer)).encode())
    if offsets is None:
        # The order is unknown, so the strides, too, have to be the same.
        digest.update(repr(cache.stride()[1:]).encode())
    else:
        for side in offsets:
            digest.update(side.numpy().tobytes())
    return f"vllm-page1:{digest.hexdigest()[:32]}"


def layer_cache(layer: Any, registered: torch.Tensor) -> torch.Tensor:
    """The cache as the layer's kernels see it: the registered one, or the same memory in smaller kernel blocks."""
    bound = getattr(layer, "kv_cache", None)
    if isinstance(bound, list | tuple) and len(bound) == 1:
        bound = bound[0]
    if (
        isinstance(bound, torch.Tensor)
        and bound.dim() == registered.dim()
        and bound.data_ptr() == registered.data_ptr()
        and bound.numel() == registered.numel()
        and bound.dtype == registered.dtype
    ):
        return bound
    return registered


def write_op(layer: Any) -> WriteOp | None:
    """The layer's own write operation in plain form; None if it has none, or one of another form."""
    impl = getattr(layer, "impl", None)
    update = getattr(impl, "do_kv_cache_update", None)
    if update is None or getattr(layer, "use_mla", False):
        return None

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        update(layer, key, value, cache, slots)

    return write


def same_layout(layers: list[PageViews]) -> str:
    """The one layout of all layers.

    Raises
    ------
    ConfigError
        If layers differ.
    """
    names = {views.layout for views in layers}
    shapes = {tuple(side.shape for side in views.sides) for views in layers}
    dtypes = {side.dtype for views in layers for side in views.sides}
    if len(names) != 1 or len(shapes) != 1 or len(dtypes) != 1:
        raise ConfigError(
            f"vllm: layers of this model keep KV in different ways ({sorted(names)}, {len(shapes)} shapes).",
            "kvstore needs layers that are all alike; run this model without the connector.",
        )
    return names.pop()
