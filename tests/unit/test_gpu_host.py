"""Slabs made known to CUDA: in windows, each once, and let go of with the mapping. The driver is a stand-in."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.errors import DeviceUnavailable, InvalidParams
from kvstore_gpu import host

W = 4 * mmap.PAGESIZE
CUDA = torch.device("cuda", 1)


@pytest.fixture
def driver(monkeypatch):
    pinned: dict[int, int] = {}
    codes: list[int] = []

    def register(start: int, nbytes: int, flags: int) -> int:
        if codes:
            return codes.pop()
        assert nbytes > 0
        assert not any(start < s + n and s < start + nbytes for s, n in pinned.items())
        pinned[start] = nbytes
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda start: pinned.pop(start))
    monkeypatch.setattr(host, "WINDOW", W)
    monkeypatch.setattr(host, "_driver", lambda device: nullcontext(runtime) if device == CUDA else None)
    return SimpleNamespace(pinned=pinned, codes=codes)


def slab(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def test_a_view_is_reached_in_pieces_that_span_one_window_each(driver) -> None:
    whole = slab(3 * W + 100)
    whole[:] = np.random.default_rng(1).integers(0, 255, whole.nbytes, np.uint8)
    view = whole[W - 5 : 2 * W + 7]
    pieces = host.reach(view, CUDA)
    assert [len(piece) for piece in pieces] == [5, W, 7]
    assert np.array_equal(np.concatenate(pieces), view)
    assert all(np.shares_memory(piece, view) for piece in pieces)
    assert sorted(driver.pinned.values()) == [W, W, W]
    assert [len(piece) for piece in host.reach(whole[3 * W :], CUDA)] == [100]
    assert sum(driver.pinned.values()) == whole.nbytes
    host.reach(view, CUDA)
    assert len(driver.pinned) == 4


def test_memory_is_found_only_where_all_its_windows_are_registered(driver) -> None:
    whole = slab(4 * W)
    host.reach(whole[W : 2 * W], CUDA)
    inside = torch.from_numpy(whole[W + 1 : 2 * W])
    assert host.addresses([inside], CUDA) == [inside.data_ptr()]
    for outside in (whole[W - 1 : W + 1], whole[2 * W - 1 : 2 * W + 1], whole[:1]):
        with pytest.raises(InvalidParams, match="register"):
            host.addresses([torch.from_numpy(outside)], CUDA)


def test_of_many_mappings_the_one_that_holds_the_block_is_asked(driver) -> None:
    slabs = [slab(W) for _ in range(8)]
    for one in slabs[::2]:
        host.reach(one, CUDA)
    del one
    for at, some in enumerate(slabs):
        block = torch.from_numpy(some[5:9])
        if at % 2:
            with pytest.raises(InvalidParams, match="register"):
                host.addresses([block], CUDA)
        else:
            assert host.addresses([block], CUDA) == [block.data_ptr()]
    del block, some, slabs[4]
    assert host.registered() == (3, 3)
    assert all(host.addresses([torch.from_numpy(slabs[at])], CUDA) for at in (0, 2, 5))


def test_memory_that_begins_within_a_page(driver) -> None:
    whole = np.zeros(2 * W, np.uint8)
    assert np.concatenate(host.reach(whole, CUDA)).nbytes == whole.nbytes
    assert sum(driver.pinned.values()) == whole.nbytes
    assert host.addresses([torch.from_numpy(whole)], CUDA) == [whole.ctypes.data]


def test_windows_ahead_one_at_a_time_and_gone_with_the_mapping(driver) -> None:
    whole = slab(3 * W)
    host.reach(whole[:1], CUDA)
    steps = host.ahead(whole, CUDA)
    next(steps)
    assert len(driver.pinned) == 2
    assert len(list(steps)) == 1
    assert host.registered() == (1, 3)
    del steps, whole
    assert not driver.pinned
    assert host.registered() == (0, 0)


def test_a_driver_that_refuses_is_an_error_with_a_cause_and_the_next_try_counts(driver) -> None:
    whole = slab(W)
    driver.codes.append(2)
    with pytest.raises(DeviceUnavailable, match="CUDA error 2"):
        host.reach(whole, CUDA)
    with pytest.raises(InvalidParams):
        host.addresses([torch.from_numpy(whole)], CUDA)
    host.reach(whole, CUDA)
    assert driver.pinned == {whole.ctypes.data: W}


def test_parts_of_blocks_in_several_runs_are_brought_in_order(monkeypatch) -> None:
    runtime = SimpleNamespace(memcpyDefault=4, memcpyAsync=lambda to, at, n, kind, queue: ctypes.memmove(to, at, n))
    monkeypatch.setattr(host, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    stream: Any = SimpleNamespace(cuda_stream=0)
    blocks = [
        [np.random.default_rng(i).integers(0, 255, n, np.uint8) for i, n in enumerate(sizes)]
        for sizes in ((5, 1, 100, 7), (60,), (30, 30))
    ]
    held = host.Held([[(part.ctypes.data, part.nbytes) for part in parts] for parts in blocks])

    def bring(begin: list[int], end: list[int], room: int) -> np.ndarray:
        to = torch.zeros(room, dtype=torch.uint8)
        held.bring(np.array(begin), np.array(end), to, stream)
        return to.numpy()

    for begin, end in (
        ([0, 0, 0], [113, 60, 60]),
        ([4, 59, 29], [7, 60, 31]),
        ([6, 0, 30], [106, 0, 60]),
        ([5, 3, 0], [6, 9, 30]),
        ([112, 20, 7], [113, 20, 7]),
    ):
        wanted = [np.concatenate(parts)[a:b] for parts, a, b in zip(blocks, begin, end, strict=True)]
        room = sum(map(len, wanted))
        assert np.array_equal(bring(begin, end, room), np.concatenate(wanted))
        for wrong in (room - 1, room + 1):
            with pytest.raises(InvalidParams):
                bring(begin, end, wrong)
    for begin, end in (
        ([0, 0, 0], [114, 1, 1]),
        ([-1, 0, 0], [1, 1, 1]),
        ([2, 0, 0], [1, 1, 1]),
        ([0, 61, 0], [1, 62, 1]),
    ):
        with pytest.raises(InvalidParams):
            bring(begin, end, 3)
    host.Held([]).bring(np.zeros(0, int), np.zeros(0, int), torch.zeros(0, dtype=torch.uint8), stream)
