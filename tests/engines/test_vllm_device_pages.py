"""Pages on a device whose streams do everything at once, in ordinary memory: the bytes are those of pages on the CPU.

What needs a real device, its order of things above all, is in `test_vllm_device.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.rope import rotary
from kvstore.types import Namespace
from kvstore_connectors.vllm import code, device_pages
from kvstore_connectors.vllm.code import Codes
from kvstore_connectors.vllm.device_pages import DevicePages
from kvstore_connectors.vllm.layout import CANONICAL, PageViews
from kvstore_connectors.vllm.pages import HostPages, Pages, Piece
from kvstore_gpu import host

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 3, 64, 2, 16, 64
BLOCK = 4 * TOKENS
ROTARY = rotary({"rope_theta": 500000.0, "head_dim": DIM})
LOSSY = Namespace(
    model="m", dtype="bfloat16", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, layout=CANONICAL, block_tokens=BLOCK,
    fidelity="lossy:test",
)  # fmt: skip


class Moment:
    """An event, or a stream: all is over when it is asked for."""

    cuda_stream = 0

    def __init__(self, *_: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    wait_event = wait_stream = record


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Moment)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Moment())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    runtime = SimpleNamespace(memcpyDefault=4, memcpyAsync=lambda to, at, n, kind, stream: ctypes.memmove(to, at, n))
    monkeypatch.setattr(host, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    driver = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: 0)
    monkeypatch.setattr(host, "_driver", lambda _: nullcontext(driver))
    monkeypatch.setattr(device_pages, "SLOT_NBYTES", 3 * 2 * LAYERS * BLOCK * HEADS * DIM * 2)


def pages_of(kind: type[Pages], caches: Sequence[torch.Tensor], chain: str | None) -> Any:
    made = kind([PageViews(CANONICAL, (cache[..., :DIM], cache[..., DIM:])) for cache in caches], BLOCK, TOKENS, TOKENS)
    if chain is not None:
        made.use(Codes(LOSSY, ROTARY, chain))
    return made


def two(chain: str | None) -> tuple[DevicePages, HostPages, list[torch.Tensor], list[torch.Tensor]]:
    """The same cache twice, behind both kinds of pages."""
    mine = [torch.randn(BLOCKS, TOKENS, HEADS, 2 * DIM).bfloat16() for _ in range(LAYERS)]
    theirs = [cache.clone() for cache in mine]
    return pages_of(DevicePages, mine, chain), pages_of(HostPages, theirs, chain), mine, theirs


def places(count: int, seed: int) -> list[list[int]]:
    order = np.random.default_rng(seed).permutation(BLOCKS).tolist()
    return [order[4 * i : 4 * i + 4] for i in range(count)]


def stored(pages: DevicePages, ids: Sequence[list[int]], slab: np.ndarray) -> list[np.ndarray]:
    """Blocks of a prompt, stored together."""
    sizes = [pages.stored_nbytes(i * BLOCK) for i in range(len(ids))]
    rooms = [slab[i * max(sizes) : i * max(sizes) + size] for i, size in enumerate(sizes)]
    parts = [
        pages.reach(Piece([room], 0, one, i * BLOCK)) for i, (room, one) in enumerate(zip(rooms, ids, strict=True))
    ]
    assert pages.take(parts).wait() == [True] * len(ids)
    for i, room in enumerate(rooms):
        pages.seal([room], i * BLOCK)
    return rooms


@pytest.mark.parametrize("chain", [None, "fp8", "prerope|kv4"])
def test_many_blocks_are_stored_and_loaded_as_on_the_cpu(chain: str | None) -> None:
    pages, on_host, mine, theirs = two(chain)
    ids, slab = places(12, 1), np.zeros(12 * pages.nbytes, np.uint8)
    rooms = stored(pages, ids, slab)
    for i, (room, one) in enumerate(zip(rooms, ids, strict=True)):
        wanted = np.zeros_like(room)
        on_host.save(one, wanted, i * BLOCK)
        assert np.array_equal(room, wanted)
    pieces = []
    for i, (room, one) in enumerate(zip(rooms, places(12, 2), strict=True)):
        known = pages.known(Piece([room], 1 if i == 0 else 0, one[1:] if i == 0 else one, i * BLOCK))
        assert known is not None
        assert (known.code is None) == (chain is None)
        near = torch.from_numpy(room.copy()) if i in (2, 3, 7) else None
        pieces.append(known._replace(device=near))
        if near is not None:
            pieces[-1].parts[0][:] = 0xEE  # what is in the device's memory is not read from the host's
    pages.start(pieces)()
    for piece in pieces:
        if piece.device is not None:
            piece.parts[0][:] = piece.device.numpy()
    on_host.start(pieces)()
    for here, there in zip(mine, theirs, strict=True):
        assert float((here - there).float().norm()) <= 6e-3 * float(there.float().norm())
        assert chain is not None or torch.equal(here, there)


def test_blocks_of_several_chains_and_raw_ones_are_loaded_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine stored them encoded, another one otherwise, a third as they are; one chain has no kernels."""
    monkeypatch.setattr(code, "MOST_HEAD", 9000)
    pages, on_host, mine, theirs = two("prerope|kv4")
    slab, at, pieces = np.zeros(12 * pages.nbytes, np.uint8), 0, []
    for i, (chain, one) in enumerate(zip(["prerope|kv4", "fp8", None, "kv4", "fp8", "prerope|kv4", None, "prerope|kv4"],
                                         places(8, 3), strict=True)):  # fmt: skip
        writer = pages_of(HostPages, mine, chain)
        room = slab[at : at + writer.stored_nbytes(i * BLOCK)]
        at += -(-room.size // 4096) * 4096
        writer.save([0, 1, 2, 3], room, i * BLOCK)
        cut = 700 if i % 2 else 9000  # the header in both parts, or in the first
        known = pages.known(Piece([room[:cut], room[cut:]], 0, one, i * BLOCK))
        assert known is not None
        pieces.append(known)
    assert len({piece.code for piece in pieces}) == 4
    pages.start(pieces)()
    on_host.start(pieces)()
    for here, there in zip(mine, theirs, strict=True):
        assert float((here - there).float().norm()) <= 6e-3 * float(there.float().norm())


def test_a_block_with_values_that_its_code_cannot_say_is_told_apart() -> None:
    """The flags come with the blocks, in their order."""
    pages, _, _, _ = two("fp8")
    flags = torch.tensor([0, 1, 0, 0, 1], dtype=torch.int32)
    frames = pages._frames_of(pages.code)  # type: ignore[arg-type]
    frames.packing = lambda parts, bad, stream: lambda first, last: bad[first:last].copy_(flags[first:last])  # type: ignore[method-assign]
    slab = np.zeros(5 * pages.nbytes, np.uint8)
    parts = [pages.reach(Piece([slab[i * pages.nbytes : (i + 1) * pages.nbytes]], 0, one, BLOCK))
             for i, one in enumerate(places(5, 4))]  # fmt: skip
    assert pages.take(parts).wait() == [True, False, True, True, False]


@pytest.mark.parametrize("chain", ["fp8", "prerope|kv4"])
def test_kernels_of_a_chain_run_before_the_first_request_and_change_nothing(
    chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled under a request they would hold up its first token; sinks are other kernels' work than later blocks."""
    ran = []
    for name in ("pack", "unpack"):
        real = getattr(device_pages.Frames, name)

        def seen(self: Any, parts: Any, stream: Any, name: str = name, real: Any = real) -> Any:
            ran.append((name, parts[0].position))
            return real(self, parts, stream)

        monkeypatch.setattr(device_pages.Frames, name, seen)
    _, _, mine, theirs = two(chain)
    assert ran == [(name, position) for position in (0, BLOCK) for name in ("pack", "unpack")]
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
