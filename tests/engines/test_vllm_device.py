"""Pages on a CUDA device: the same bytes as on the CPU, behind the kernels that write and before those that read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore_connectors.vllm.layout import learn
from kvstore_connectors.vllm.pages import DevicePages, HostPages

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


def make(order: str, staging: int = 2) -> tuple[list[torch.Tensor], DevicePages]:
    sizes = {"B": BLOCKS, "H": HEADS, "N": TOKENS, "C": 2 * DIM}
    memory = [torch.randn([sizes[axis] for axis in order], device="cuda").bfloat16() for _ in range(LAYERS)]
    caches = [one.permute([order.index(axis) for axis in "BHNC"]) for one in memory]
    views = [learn(cache, packed_write, HEADS, DIM, "test") for cache in caches]
    assert {one.layout for one in views} == {"lkthd1"}
    return caches, DevicePages(views, 4 * TOKENS, TOKENS, TOKENS, staging=staging)


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


def test_a_save_waits_for_the_kernels_that_write() -> None:
    caches, pages = make("BNHC")
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)
    for cache in caches:
        cache[2] = 5.0  # still queued when the save begins
    staged = pages.stage([2, 2, 2, 2])
    assert staged is not None
    for cache in caches:
        cache[2] = 7.0  # and the pages are used again before it is over
    stored = np.zeros(pages.nbytes, dtype=np.uint8)
    pages.save_staged(staged, stored)
    pages.unstage(staged)
    assert bool((torch.from_numpy(stored).view(torch.bfloat16) == 5.0).all())


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


def test_staging_memory_is_bounded() -> None:
    _, pages = make("BNHC", staging=2)
    first, second = pages.stage([0, 1, 2, 3]), pages.stage([4, 5, 6, 7])
    assert first is not None
    assert second is not None
    assert pages.stage([8, 9, 10, 11]) is None
    pages.unstage(first)
    assert pages.stage([8, 9, 10, 11]) is not None


def test_gathering_does_not_hold_up_the_engine() -> None:
    """The engine's thread only queues work; it returns long before the stream gets to it."""
    import time

    _, pages = make("BNHC")
    torch.cuda.synchronize()
    pages.unstage(pages.stage([0, 1, 2, 3]))  # type: ignore[arg-type]
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * SLOW)
    begun = time.monotonic()
    assert pages.stage([0, 1, 2, 3]) is not None
    assert time.monotonic() - begun < 0.05
    torch.cuda.synchronize()
