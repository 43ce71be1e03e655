"""The engine's paged cache as the kernels see it: base addresses of all layers, strides, contiguous rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvstore_gpu import checks


@dataclass(frozen=True, eq=False)
class PagedCache:
    """Views into an engine's cache, one for each layer and side, all of the same shape and strides.

    Attributes
    ----------
    views : tuple of tuple of Tensor
        ``[layer][side]``, each ``[page, token, head, dim]`` with any strides of pages, tokens and heads. The sides are
        K and V. A cache of whole pages has one side, and the three dimensions of a page are whatever they are.
    """

    views: tuple[tuple[torch.Tensor, ...], ...]

    def __post_init__(self) -> None:
        if not self.views or not self.views[0]:
            raise checks.refuse("cache", "it has no layers")
        first = self.sample
        if first.dim() != 4 or first.stride(3) != 1:
            raise checks.refuse("cache", f"pages of shape {tuple(first.shape)}, strides {first.stride()}: not rows")
        for layer in self.views:
            for view in layer:
                same = view.shape == first.shape and view.stride() == first.stride() and view.dtype == first.dtype
                if not same or view.device != first.device or len(layer) != self.sides:
                    raise checks.refuse("cache", "its layers are not all alike")

    @staticmethod
    def of(views: Sequence[Sequence[torch.Tensor]]) -> PagedCache:
        """From any nesting; a page with one or two dimensions gets the ones it lacks."""
        return PagedCache(tuple(tuple(_four(view) for view in layer) for layer in views))

    @property
    def sample(self) -> torch.Tensor:
        """The first view."""
        return self.views[0][0]

    @property
    def layers(self) -> int:
        """Layers."""
        return len(self.views)

    @property
    def sides(self) -> int:
        """2 for K and V, 1 for whole pages."""
        return len(self.views[0])

    @property
    def pages(self) -> int:
        """Pages there are."""
        return self.sample.shape[0]

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""
        return self.sample.shape[1]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.sample.shape[2]

    @property
    def dim(self) -> int:
        """Elements of a head."""
        return self.sample.shape[3]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.sample.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.sample.dtype

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page of one side."""
        return self.page_tokens * self.heads * self.dim * self.sample.element_size()

    def block_nbytes(self, block_pages: int) -> int:
        """Bytes of a block of so many pages: all layers, all sides."""
        return self.layers * self.sides * block_pages * self.page_nbytes

    @cached_property
    def bases(self) -> torch.Tensor:
        """Addresses of the views, int64 ``[layer * side]``, on the device."""
        flat = [view.data_ptr() for layer in self.views for view in layer]
        return torch.tensor(flat, dtype=torch.int64).to(self.device)

    @cached_property
    def rows(self) -> Rows:
        """How a page falls apart into contiguous rows, as long as they can be."""
        size = self.sample.element_size()
        outer, inner, row = self.page_tokens, self.heads, self.dim * size
        page, outer_stride, inner_stride, _ = (stride * size for stride in self.sample.stride())
        if inner == 1 or inner_stride == row:
            row, inner, inner_stride = row * inner, 1, 0
            if outer == 1 or outer_stride == row:
                row, outer, outer_stride = row * outer, 1, 0
        numbers = [row, page, outer_stride, inner_stride, *(v.data_ptr() for layer in self.views for v in layer)]
        unit = next(width for width in (16, 8, 4, 2, 1) if all(n % width == 0 for n in numbers))
        return Rows(page, outer, outer_stride, inner, inner_stride, row, unit)

    def chosen(self, layers: range | None) -> range:
        """These layers, all if none are named; refused if one of them is not there."""
        chosen = range(self.layers) if layers is None else layers
        if len(chosen) and not (chosen.start >= 0 and chosen.stop <= self.layers and chosen.step == 1):
            raise checks.refuse("layers", f"{chosen} of {self.layers}")
        return chosen

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Refuse ids of pages that are not there: a kernel would write wherever they point."""
        if ids and not (min(ids) >= 0 and max(ids) < self.pages):
            raise checks.refuse(name, f"page {min(ids)} to {max(ids)} where there are {self.pages}")


@dataclass(frozen=True)
class Rows:
    """A page as ``[outer][inner]`` rows of contiguous bytes; strides in bytes.

    Attributes
    ----------
    unit : int
        Widest access, in bytes, that all addresses and lengths allow.
    """

    page_stride: int
    outer: int
    outer_stride: int
    inner: int
    inner_stride: int
    row: int
    unit: int


def _four(view: torch.Tensor) -> torch.Tensor:
    while view.dim() < 4:
        view = view.unsqueeze(1)
    if view.dim() > 4:
        if not view[0].is_contiguous():
            raise checks.refuse("cache", f"a page of shape {tuple(view.shape[1:])} that is not dense")
        view = view.as_strided((view.shape[0], 1, 1, view[0].numel()), (view.stride(0), 0, 0, 1), view.storage_offset())
    return view
