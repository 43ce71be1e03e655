"""Memory touched ahead."""

from __future__ import annotations

import mmap
import os

import pytest

from kvstore.memory import populate


@pytest.mark.parametrize("pages", [1, 511, 512, 513, 1500])
def test_every_page_is_touched(pages: int):
    fd = os.memfd_create("kvstore-test")
    try:
        os.ftruncate(fd, pages * mmap.PAGESIZE)
        with mmap.mmap(fd, pages * mmap.PAGESIZE) as mapping:
            assert os.fstat(fd).st_blocks == 0
            assert populate(mapping)
            assert os.fstat(fd).st_blocks * 512 >= pages * mmap.PAGESIZE  # more where the kernel takes large pages
            assert not any(mapping[:])
    finally:
        os.close(fd)
