"""What the tests of kernels share: caches in every layout, random contents, distances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvstore_gpu.cache import PagedCache
from kvstore_gpu.jobs import Part

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 3.5e-4, torch.float32: 1e-6}
"""Relative error of one rounding, by type."""

LAYOUTS = ("nhd", "hnd", "side by side", "heads outside", "gaps")


def views(
    layout: str, pages: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """K and V of one layer as ``[page, token, head, dim]``, laid out as engines do; random contents."""

    def filled(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if layout == "nhd":
        both = filled(2, pages, tokens, heads, dim)
        return [both[0], both[1]]
    if layout == "hnd":
        both = filled(2, pages, heads, tokens, dim).transpose(2, 3)
        return [both[0], both[1]]
    if layout == "side by side":
        both = filled(pages, tokens, heads, 2 * dim)
        return [both[..., :dim], both[..., dim:]]
    if layout == "heads outside":
        both = filled(pages, heads, tokens, 2 * dim).transpose(1, 2)
        return [both[..., :dim], both[..., dim:]]
    both = filled(pages, 2, tokens + 1, heads, dim)[:, :, :tokens]  # pages that are not dense, sides inside them
    return [both[:, 0], both[:, 1]]


def cache(
    layout: str = "nhd",
    *,
    layers: int = 3,
    pages: int = 13,
    tokens: int = 16,
    heads: int = 4,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> PagedCache:
    """A cache with random contents."""
    return PagedCache.of([views(layout, pages, tokens, heads, dim, dtype, device) for _ in range(layers)])


def copy_of(paged: PagedCache, device: str = "cpu", dtype: torch.dtype | None = None) -> PagedCache:
    """The same contents somewhere else, densely."""
    return PagedCache.of(
        [[v.to(device=device, dtype=dtype or v.dtype).clone() for v in layer] for layer in paged.views]
    )


def same(a: PagedCache, b: PagedCache) -> bool:
    """Whether two caches hold the same bits."""
    return all(
        torch.equal(x.cpu().contiguous().view(torch.uint8), y.cpu().contiguous().view(torch.uint8))
        for one, two in zip(a.views, b.views, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance; infinite if anything is not a number."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    away = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return away if away == away else float("inf")


def poisoned(nbytes: int, device: str) -> torch.Tensor:
    """Bytes that nobody wrote."""
    return torch.full((nbytes,), 0xA5, dtype=torch.uint8, device=device)


def block(nbytes: int, device: str) -> torch.Tensor:
    """Random bytes that are small numbers in every type."""
    numbers = torch.randn(nbytes // 2 + 1, device=device).to(torch.bfloat16)
    return numbers.view(torch.uint8)[:nbytes].clone()


def pack(codec: Any, paged: PagedCache, parts: Sequence[Part], spec: Any, coder: Any, places: Any, *turn: Any) -> Any:
    """Encode all parts at once (`fp8`, or `kv4` by a rotation, at the positions of the spec); the flags."""
    bad = torch.zeros(len(parts), dtype=torch.int32, device=paged.device)
    if len(turn) == 1:
        at = torch.arange(spec.position, spec.position + spec.tokens, device=paged.device)
        turn = (*turn, at.repeat(len(parts)))
    codec.packing(paged, parts, spec, coder, places, *turn, bad)(0, len(parts))
    return bad


def unpack(codec: Any, paged: PagedCache, parts: Sequence[Part], *how: Any) -> None:
    """Decode all parts at once."""
    codec.unpacking(paged, parts, *how)(0, len(parts))
