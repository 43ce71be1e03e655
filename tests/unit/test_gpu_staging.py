"""The ring of slots: the right bytes however a device orders its streams, and few copies. CUDA is a stand-in."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.errors import InvalidParams
from kvstore_gpu import host
from kvstore_gpu.jobs import HostPart, Launch, Part
from kvstore_gpu.staging import Staging

W = 4 * mmap.PAGESIZE
CPU = torch.device("cpu")


class Device:
    """Streams that run whenever they like, as far as events let them."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.done: set[Any] = set()
        self.copies: list[tuple[int, int]] = []
        device = self

        class Event:
            """Named by what was last recorded of it."""

            mark: object | None = None

            def record(self, stream: Any) -> None:
                mark = self.mark = object()
                stream.queue.append(lambda: device.done.add(mark))

        class Stream:
            """A queue of work; what it waits for is a mark."""

            def __init__(self, where: Any = None) -> None:
                self.queue: deque[Any] = deque()
                device.streams.append(self)

            cuda_stream = property(lambda self: device.streams.index(self))

            def wait_event(self, event: Event) -> None:
                if event.mark is not None:
                    self.queue.append(event.mark)

            def wait_stream(self, other: Stream) -> None:
                event = Event()
                event.record(other)
                self.wait_event(event)

            def synchronize(self) -> None:
                device.run(self)

        self.Event, self.Stream = Event, Stream

    def run(self, until: Any = None, seed: int = 0) -> None:
        """Run everything, or until a stream has nothing to do, in some order."""
        order = random.Random(seed)
        while any(stream.queue for stream in ([until] if until else self.streams)):
            able = [s for s in self.streams if s.queue and (callable(s.queue[0]) or s.queue[0] in self.done)]
            work = order.choice(able).queue.popleft()
            if callable(work):
                work()

    def copy(self, to: int, at: int, nbytes: int, kind: int, stream: int) -> None:
        """CuPy's memcpyAsync."""
        self.copies.append((at, nbytes))
        self.streams[stream].queue.append(lambda: ctypes.memmove(to, at, nbytes))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    default = made.Stream()
    monkeypatch.setattr(torch.cuda, "Stream", made.Stream)
    monkeypatch.setattr(torch.cuda, "Event", made.Event)
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: default)
    runtime = SimpleNamespace(memcpyDefault=4, memcpyAsync=made.copy)
    monkeypatch.setattr(host, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    driver = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: 0)
    monkeypatch.setattr(host, "WINDOW", W)
    monkeypatch.setattr(host, "_driver", lambda where: nullcontext(driver))
    return made


def blocks(sizes: Sequence[int], gap: int = 0, pieces: int = 1) -> tuple[np.ndarray, list[np.ndarray], list[HostPart]]:
    """A registered mapping, and blocks that lie in it one after the other."""
    whole = np.frombuffer(mmap.mmap(-1, sum(sizes) + gap * len(sizes) + mmap.PAGESIZE), np.uint8)
    whole[:] = np.random.default_rng(len(sizes)).integers(0, 255, whole.size, np.uint8)
    views, parts, at = [], [], 0
    for size in sizes:
        views.append(whole[at : at + size])
        cut = np.array_split(views[-1], pieces)
        runs = [torch.from_numpy(run) for part in cut for run in host.reach(part, CPU)]
        parts.append(HostPart(runs, [at]))
        at += size + gap
    return whole, views, parts


def landing(device: Device, found: list[bytes]) -> Callable[..., Launch]:
    def land(parts: Sequence[Part], stream: Any) -> Launch:
        def launch(first: int, last: int) -> None:
            for part in parts[first:last]:
                stream.queue.append(lambda part=part: found.append(part.block.numpy().tobytes()))

        return launch

    return land


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("sizes", "gap", "pieces"), [
    ([1000] * 30, 24, 1),
    ([4096] * 24, 0, 3),
    ([3 * W, 5, W + 1, 256, 2 * W] * 3, 7, 2),
])  # fmt: skip
def test_blocks_arrive_whole_and_in_order(seed, sizes, gap, pieces, device) -> None:
    whole, views, parts = blocks(sizes, gap, pieces)
    staging, stream = Staging(CPU, max(3000, *sizes), 3), device.Stream()
    found: list[bytes] = []
    staging.load(parts, landing(device, found), stream)
    assert not found, "nothing waits for it on the host"
    staging.load(parts[:3], landing(device, found), stream)
    device.run(seed=seed)
    assert found == [view.tobytes() for view in [*views, *views[:3]]]
    for at, nbytes in device.copies:
        begin = at - whole.ctypes.data
        assert begin // W == (begin + nbytes - 1) // W, "no copy spans two windows"


@pytest.mark.parametrize("seed", range(8))
def test_blocks_leave_whole_and_pages_are_free_when_it_says_so(seed, device) -> None:
    whole, views, parts = blocks([4096, 1000, W, 2000, 4096, 4096, 3 * W] * 2, gap=24)
    wanted = [np.random.default_rng(i).integers(0, 255, view.size, np.uint8) for i, view in enumerate(views)]
    staging, stream = Staging(CPU, 3 * W, 2), device.Stream()
    taken_from: list[int] = []

    def take(parts: Sequence[Part], stream: Any) -> Launch:
        def work(i: int) -> None:
            taken_from.append(i)
            parts[i].block.copy_(torch.from_numpy(wanted[i]))

        def launch(first: int, last: int) -> None:
            for i in range(first, last):
                stream.queue.append(lambda i=i: work(i))

        return launch

    whole[:] = 0
    taken, arrived = staging.store(parts, take, stream)
    later, last = device.Stream(), device.Stream()
    later.wait_event(taken)
    last.wait_event(arrived)
    device.run(later, seed)
    assert taken_from == list(range(len(parts)))
    device.run(last, seed)
    assert all(np.array_equal(view, want) for view, want in zip(views, wanted, strict=True))
    for view in views:
        view[:] = 0
    assert not whole.any(), "nothing is written between blocks"


def test_neighbours_are_one_copy(device) -> None:
    _, views, parts = blocks([W // 4] * 8)
    staging, stream = Staging(CPU, W, 2), device.Stream()
    staging.load(parts, landing(device, []), stream)
    assert [nbytes for _, nbytes in device.copies] == [W, W]
    device.copies.clear()
    staging.load(parts[::2], landing(device, []), stream)
    assert [nbytes for _, nbytes in device.copies] == [views[0].size] * 4


def test_blocks_that_leave_a_little_room_in_their_pages_are_one_copy_on_the_way_in(device) -> None:
    size = W // 4 - 201
    _, views, parts = blocks([size] * 8, gap=201)
    staging, stream = Staging(CPU, W, 2), device.Stream()
    found: list[bytes] = []
    staging.load(parts, landing(device, found), stream)
    assert [nbytes for _, nbytes in device.copies] == [W - 201] * 2
    device.run()
    assert found == [view.tobytes() for view in views]
    device.copies.clear()
    far = [HostPart(parts[i].pieces, [0]) for i in (0, 2, 1, 3)]
    staging.load(far, landing(device, found), stream)
    assert [nbytes for _, nbytes in device.copies] == [size] * 4


def test_behind_an_error_the_stream_waits_for_copies_that_were_begun(device) -> None:
    _, _, parts = blocks([4096] * 4)
    staging, stream = Staging(CPU, W, 2), device.Stream()

    def land(parts: Sequence[Part], stream: Any) -> Launch:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        staging.load(parts, land, stream)
    stream.synchronize()
    copies: Any = staging._copies
    assert not copies.queue
    found: list[bytes] = []
    staging.load(parts, landing(device, found), stream)
    device.run()
    assert len(found) == 4


def test_what_does_not_fit_or_cannot_be_reached_is_refused(device) -> None:
    _, _, parts = blocks([2 * W])
    staging, stream = Staging(CPU, W, 2), device.Stream()
    with pytest.raises(InvalidParams, match="slot"):
        staging.load(parts, landing(device, []), stream)
    staging.load([], landing(device, []), stream)
    nowhere = HostPart([torch.empty(100, dtype=torch.uint8, device="meta")], [0])
    with pytest.raises(InvalidParams, match="register"):
        staging.load([nowhere], landing(device, []), stream)
