"""Pages on a CUDA device: the same bytes as on the CPU, behind the kernels that write and before those that read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.layout import learn
from kvstore_connectors.vllm.pages import HostPages, Piece

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 4, 64, 8, 16, 128
SLOW = 40_000_000
"""Clock cycles that a stream is held up for: some 20 ms."""


def packed_write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Channels hold K, then V."""
    cache[slots // TOKENS, :, slots % TOKENS] = torch.cat([key, value], dim=-1)


def make(order: str) -> tuple[list[torch.Tensor], DevicePages]:
    sizes = {"B": BLOCKS, "H": HEADS, "N": TOKENS, "C": 2 * DIM}
    memory = [torch.randn([sizes[axis] for axis in order], device="cuda").bfloat16() for _ in range(LAYERS)]
    caches = [one.permute([order.index(axis) for axis in "BHNC"]) for one in memory]
    views = [learn(cache, packed_write, HEADS, DIM, "test") for cache in caches]
    assert {one.layout for one in views} == {"lkthd1"}
    return caches, DevicePages(views, 4 * TOKENS, TOKENS, TOKENS)


def on_host(caches: list[torch.Tensor]) -> HostPages:
    copies = [cache.cpu() for cache in caches]
    views = [learn(copy, packed_write, HEADS, DIM, "test") for copy in copies]
    return HostPages(views, 4 * TOKENS, TOKENS, TOKENS)


@pytest.mark.parametrize("order", ["BHNC", "BNHC"])
def test_same_bytes_as_on_the_host(order: str) -> None:
    caches, pages = make(order)
    stored, expected = np.zeros((2, pages.nbytes), dtype=np.uint8)
    pages.save([7, 8, 40, 3], stored)
    on_host(caches).save([7, 8, 40, 3], expected)
    assert np.array_equal(stored, expected)
    pages.load(stored, 1, [20, 5, 21])
    for cache in caches:
        for source, target in ((8, 20), (40, 5), (3, 21)):
            assert torch.equal(cache[source], cache[target])


@pytest.mark.parametrize("order", ["BHNC", "BNHC"])
def test_the_front_of_a_prompt_is_read_in_one_go(order: str) -> None:
    caches, pages = make(order)
    there = torch.full((LAYERS, 2, 5 * TOKENS, HEADS, DIM), torch.nan, dtype=torch.bfloat16, device="cuda")
    here = torch.full(there.shape, torch.nan, dtype=torch.bfloat16)
    pages.read([9, 2, 63], there)
    on_host(caches).read([9, 2, 63], here)
    assert torch.equal(there.cpu().view(torch.int16), here.view(torch.int16))
    assert here[:, :, 3 * TOKENS :].isnan().all()


def test_a_save_waits_for_the_kernels_that_write_and_those_behind_it_can_wait_for_the_save() -> None:
    caches, pages = make("BNHC")
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([2, 2, 2, 2], stored)  # pinned
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)
    for cache in caches:
        cache[2] = 5.0  # still queued when the save begins
    taken, arrived, *_ = pages.take([pages.reach(Piece([stored], 0, [2, 2, 2, 2]))], pages.mark())
    pages.hold(taken)
    for cache in caches:
        cache[2] = 7.0  # and the pages are used again before it is over
    arrived.synchronize()
    assert bool((torch.from_numpy(stored).view(torch.bfloat16) == 5.0).all())


def test_without_holding_the_engine_would_overtake() -> None:
    """The test above can fail."""
    caches, pages = make("BNHC")
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([2, 2, 2, 2], stored)
    torch.cuda.synchronize()
    late = torch.cuda.Stream()
    with torch.cuda.stream(late):
        torch.cuda._sleep(10 * SLOW)
    _, arrived, *_ = pages.take([pages.reach(Piece([stored], 0, [2, 2, 2, 2]))], late.record_event())
    for cache in caches:
        cache[2] = 7.0
    arrived.synchronize()
    assert bool((torch.from_numpy(stored).view(torch.bfloat16) == 7.0).all())


@pytest.mark.parametrize("order", ["BHNC", "BNHC"])
def test_many_blocks_in_pieces_there_and_back(order: str) -> None:
    """More than the slots hold, some in several pieces, into other pages."""
    caches, pages = make(order)
    memory = np.zeros((40, pages.nbytes), dtype=np.uint8)
    cut = pages.nbytes // 3 // 16 * 16
    pieces = [
        Piece([row[:cut], row[cut:]] if i % 3 == 0 else [row], 0, [(4 * i + k) % BLOCKS for k in range(4)])
        for i, row in enumerate(memory)
    ]
    _, arrived, *_ = pages.take([pages.reach(piece) for piece in pieces], pages.mark())
    arrived.synchronize()
    before = [cache.clone() for cache in caches]
    for cache in caches:
        cache.zero_()
    pages.start([Piece(p.parts, 0, [BLOCKS - 1 - one for one in p.engine_ids]) for p in pieces[:16]], pages.mark())()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old.flip(0))


def test_a_load_waits_for_the_kernels_that_read() -> None:
    caches, pages = make("BNHC")
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([0, 1, 2, 3], stored)
    caches[0][30] = 3.0
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)
    read = caches[0][30].clone()  # still queued when the load begins
    pages.load(stored, 0, [30], pages.mark())
    torch.cuda.synchronize()
    assert bool((read == 3.0).all())
    assert torch.equal(caches[0][30], caches[0][0])


def test_without_the_mark_the_load_would_overtake() -> None:
    """The test above can fail: without the event the reader sees the new content."""
    caches, pages = make("BNHC")
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([0, 1, 2, 3], stored)
    caches[0][30] = 3.0
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * SLOW)
    read = caches[0][30].clone()
    pages.load(stored, 0, [30], None)
    torch.cuda.synchronize()
    assert not bool((read == 3.0).all())


def test_storing_does_not_hold_up_the_engine() -> None:
    """The engine's thread only queues work; it returns long before the stream gets to it."""
    import time

    _, pages = make("BNHC")
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save([0, 1, 2, 3], stored)
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * SLOW)
    begun = time.monotonic()
    _, arrived, *_ = pages.take([pages.reach(Piece([stored], 0, [0, 1, 2, 3]))], pages.mark())
    assert time.monotonic() - begun < 0.05
    assert not arrived.query()
    arrived.synchronize()
