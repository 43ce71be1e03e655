"""Touch memory ahead of need. The first touch of a page costs about nine times a warm copy of it."""

from __future__ import annotations

import ctypes
import mmap

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


def populate(mapping: mmap.mmap) -> bool:
    """Touch every page of a mapping without holding the interpreter lock; whether the kernel could do it."""
    anchor = ctypes.c_char.from_buffer(mapping)
    try:
        address, length = ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(mapping))
        return _libc.madvise(address, length, _MADV_POPULATE_WRITE) == 0
    finally:
        del anchor  # an exported pointer would keep the mapping from being closed
