"""Memory for direct I/O: which of the caller's buffers it can use as they are, and what goes through memory of ours."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvstore.disk.format import ALIGN, round_up

_NOTHING = memoryview(bytearray())


class Scratch(threading.local):
    """Page-aligned memory of one I/O thread for the parts of a file that have no place in the caller's buffers."""

    def __init__(self) -> None:
        self._views: dict[str, memoryview] = {}

    def get(self, name: str, nbytes: int) -> memoryview:
        """`nbytes` aligned bytes with any content, valid until the same thread asks for the same name again."""
        view = self._views.get(name)
        if view is None or len(view) < nbytes:
            view = self._views[name] = aligned(nbytes)
        return view[:nbytes]


def aligned(nbytes: int) -> memoryview:
    """New page-aligned memory."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def as_bytes(views: Sequence[memoryview]) -> list[memoryview]:
    """The same memory as flat bytes, without empty views."""
    return [view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in views if view.nbytes]


def is_aligned(views: Sequence[memoryview]) -> bool:
    """Whether direct I/O can use these buffers: each starts on `ALIGN`, and all but the last are whole pages long."""
    return all(_address(view) % ALIGN == 0 for view in views) and all(len(view) % ALIGN == 0 for view in views[:-1])


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0]


class Image(NamedTuple):
    """How a payload lies in memory during one read or write.

    Attributes
    ----------
    buffers : list of memoryview
        Aligned memory of the payload and its padding, in order: the caller's wherever that is possible.
    payload : list of memoryview
        The same without the padding.
    padding : memoryview
        What follows the payload up to the end of the file.
    bounced : list of (memoryview, memoryview)
        Pairs of the caller's memory and ours where the caller's cannot be used, to be copied before a write and after a
        verified read.
    """

    buffers: list[memoryview]
    payload: list[memoryview]
    padding: memoryview
    bounced: list[tuple[memoryview, memoryview]]


def image_of(views: Sequence[memoryview], nbytes: int, scratch: Scratch) -> Image:
    """The image of a payload. Whole pages stay where they are; the part of a page at the end goes through scratch."""
    if not is_aligned(views):
        return _bounced(views, nbytes)
    *pages, last = views or [_NOTHING]
    cut = len(last) // ALIGN * ALIGN
    if cut:
        pages.append(last[:cut])
    rest = last[cut:]
    if not rest:
        return Image(pages, pages, _NOTHING, [])
    tail = scratch.get("tail", ALIGN)
    ours, padding = tail[: len(rest)], tail[len(rest) :]
    return Image([*pages, tail], [*pages, ours], padding, [(rest, ours)])


def _bounced(views: Sequence[memoryview], nbytes: int) -> Image:
    """Memory that direct I/O cannot use is copied as a whole; an arena's never needs this."""
    copy = aligned(round_up(nbytes))
    pairs: list[tuple[memoryview, memoryview]] = []
    at = 0
    for view in views:
        pairs.append((view, copy[at : at + len(view)]))
        at += len(view)
    return Image([copy], [copy[:nbytes]], copy[nbytes:], pairs)
