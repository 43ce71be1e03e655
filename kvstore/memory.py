"""Touch memory ahead of need. The first touch of a page costs about nine times a warm copy of it."""

from __future__ import annotations

import ctypes
import mmap

_MADV_POPULATE_WRITE = 23
_STEP = 2 << 20
"""Bytes touched at once: meanwhile the kernel lets nobody else change the process's mappings, and every larger `malloc`
wants to. Touched as a whole, a slab held up calls of 128 KiB for up to 20 ms a piece of memory they needed."""

_libc = ctypes.CDLL(None, use_errno=True)


def populate(mapping: mmap.mmap) -> bool:
    """Touch every page of a mapping without holding the interpreter lock; whether the kernel could do it."""
    anchor = ctypes.c_char.from_buffer(mapping)
    try:
        return populate_at(ctypes.addressof(anchor), len(mapping))
    finally:
        del anchor  # an exported pointer would keep the mapping from being closed


def populate_at(address: int, nbytes: int) -> bool:
    """`populate` for a part of a mapping, given by its address; whole pages."""
    touched = True
    for at in range(0, nbytes, _STEP):
        size = ctypes.c_size_t(min(_STEP, nbytes - at))
        touched &= _libc.madvise(ctypes.c_void_p(address + at), size, _MADV_POPULATE_WRITE) == 0
    return touched
