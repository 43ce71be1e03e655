"""Storing beside the engine: pages that get another use are never stored under their old name."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvstore.client import Room
from kvstore_connectors.base import Tally
from kvstore_connectors.vllm.saver import Saver

WAIT_S = 5
UNENCODABLE = [0, 0]
"""Engine blocks with values that the code cannot say."""


class FakePages:
    """A device whose events are over when the test says so."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.pieces: list[Any] = []
        self.arrived = threading.Event()
        self.began = threading.Event()

    def mark(self) -> Any:
        return "after"

    def reach(self, piece: Any) -> Any:
        return piece

    def hold(self, event: Any) -> None:
        self.held.append(event)

    def take(self, pieces: Any, after: Any) -> Any:
        assert after == "after"
        self.pieces += pieces
        self.began.set()
        good = [piece.engine_ids != UNENCODABLE for piece in pieces]
        return SimpleNamespace(taken="taken", wait=lambda: self.arrived.wait(WAIT_S) and good)

    def seal(self, room: Any, position: int) -> None:
        room[0][:] = position


class Bench:
    """A saver whose daemon answers when the test says so."""

    def __init__(self) -> None:
        self.pages = FakePages()
        self.room = threading.Event()
        self.asked = threading.Event()
        self.over = threading.Event()
        self.done: list[bool] = []
        self.tally = Tally()
        self.saver = Saver(self.pages, self._store, self.tally)  # type: ignore[arg-type]

    def _store(self, job: Any, fill: Any) -> None:
        self.asked.set()
        self.room.wait(WAIT_S)
        self.rooms = [Room(i, 4, [np.zeros(4, np.uint8)]) for i in range(len(job.blocks))]
        self.done += fill(list(zip(job.blocks, self.rooms, strict=True)))
        self.over.set()

    def submit(self, *blocks: list[int]) -> None:
        self.saver.submit(SimpleNamespace(blocks=[SimpleNamespace(engine_ids=ids, position=7) for ids in blocks]))  # type: ignore[arg-type]


def test_blocks_get_their_header_once_they_arrived_and_what_cannot_be_encoded_is_left_out() -> None:
    bench = Bench()
    bench.submit([1, 2], UNENCODABLE)
    assert bench.asked.wait(WAIT_S)
    bench.room.set()
    assert bench.pages.began.wait(WAIT_S)
    assert not bench.over.is_set()
    bench.pages.arrived.set()
    assert bench.over.wait(WAIT_S)
    assert bench.done == [True, False]
    assert [room.parts[0].tolist() for room in bench.rooms] == [[7] * 4, [0] * 4]
    assert bench.tally.peek()["save_unencodable"] == 1


def test_pages_that_are_used_again_before_their_turn_are_left_out() -> None:
    bench = Bench()
    bench.submit([1, 2], [3, 4], [5, 6])
    assert bench.asked.wait(WAIT_S)
    bench.saver.guard([4, 99])
    bench.pages.arrived.set()
    bench.room.set()
    assert bench.over.wait(WAIT_S)
    assert bench.done == [True, False, True]
    assert [piece.engine_ids for piece in bench.pages.pieces] == [[1, 2], [5, 6]]
    assert bench.pages.held == []
    assert bench.tally.drain()["save_overtaken"] == 1
    bench.saver.close()


def test_the_engine_waits_on_the_device_for_pages_that_are_being_gathered() -> None:
    bench = Bench()
    bench.room.set()
    bench.submit([1, 2], [3, 4])
    assert bench.pages.began.wait(WAIT_S)
    bench.saver.guard([7, 8])
    bench.saver.guard([])
    assert bench.pages.held == []
    bench.saver.guard([3])
    assert bench.pages.held == ["taken"]
    bench.pages.arrived.set()
    assert bench.over.wait(WAIT_S)
    assert bench.done == [True, True]
    bench.saver.close()


def test_a_job_of_many_blocks_lets_the_engine_in_between() -> None:
    """What was gathered by then is waited for, what was not is given up."""
    bench = Bench()
    take, calls = bench.pages.take, []

    def second_batch(pieces: Any, after: Any) -> Any:
        calls.append(len(pieces))
        if len(calls) == 2:
            bench.saver.guard([0, 70])
        return take(pieces, after)

    bench.pages.take = second_batch  # type: ignore[method-assign]
    bench.room.set()
    bench.pages.arrived.set()
    bench.submit(*([i] for i in range(80)))
    assert bench.over.wait(WAIT_S)
    bench.saver.close()
    assert bench.pages.held == ["taken"]
    assert [i for i, done in enumerate(bench.done) if not done] == [70]
    assert sum(calls) == 79


def test_what_the_engine_writes_is_not_known_then_it_may_be_anything() -> None:
    bench = Bench()
    bench.submit([1, 2])
    assert bench.asked.wait(WAIT_S)
    bench.submit([8])
    bench.saver.guard(None)
    bench.room.set()
    assert bench.over.wait(WAIT_S)
    bench.saver.close()
    assert not any(bench.done)
    assert bench.pages.pieces == []


def test_a_job_that_is_over_holds_nothing_up_and_a_failing_one_does_not_end_the_thread() -> None:
    bench = Bench()
    bench.room.set()
    bench.pages.arrived.set()
    good = bench.saver._store
    bench.saver._store = lambda job, fill: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    bench.submit([1])
    while bench.saver._open:
        pass
    bench.saver._store = good  # type: ignore[method-assign]
    bench.submit([1])
    assert bench.over.wait(WAIT_S)
    while bench.saver._open:
        pass
    bench.saver.guard([1])
    assert bench.pages.held == []
    bench.saver.close()
