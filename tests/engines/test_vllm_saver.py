"""Storing beside the engine: pages that get another use are never stored under their old name."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from fakes import eventually

from kvstore.client import Room
from kvstore_connectors.base import Tally
from kvstore_connectors.vllm.saver import TOGETHER, Saver

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
        self.marks = 0
        self.behind: list[Any] = []

    def mark(self) -> Any:
        self.marks += 1
        return self.marks

    def reach(self, piece: Any) -> Any:
        return piece

    def hold(self, event: Any) -> None:
        self.held.append(event)

    def take(self, pieces: Any, after: Any) -> Any:
        self.pieces += pieces
        self.behind.append(after)
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
        self.stored: list[tuple[Any, int]] = []
        self.tally = Tally()
        self.saver = Saver(self.pages, self._store, self.tally)  # type: ignore[arg-type]

    def _store(self, scope: Any, blocks: Any, fill: Any) -> None:
        self.stored.append((scope, len(blocks)))
        self.asked.set()
        self.room.wait(WAIT_S)
        self.rooms = [Room(i, 4, [np.zeros(4, np.uint8)]) for i in range(len(blocks))]
        self.done += fill(list(zip(blocks, self.rooms, strict=True)))
        self.over.set()

    def submit(self, *blocks: list[int], scope: str = "") -> None:
        made = [SimpleNamespace(engine_ids=ids, position=7) for ids in blocks]
        self.saver.submit([SimpleNamespace(scope=scope, blocks=[one]) for one in made])  # type: ignore[misc]

    def drained(self) -> None:
        """Wait until nothing is open."""
        assert eventually(lambda: not self.saver._open)
        self.saver.close()


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


def test_what_is_queued_is_stored_together_behind_the_last_step() -> None:
    bench = Bench()
    bench.submit([1], [2])
    assert bench.asked.wait(WAIT_S)
    bench.submit([3])
    bench.submit([4], scope="other")
    bench.submit([5], scope="other")
    bench.submit(*([i] for i in range(10, 10 + TOGETHER)), scope="other")
    bench.pages.arrived.set()
    bench.room.set()
    bench.drained()
    assert bench.stored == [("", 2), ("", 1), ("other", 2), ("other", TOGETHER)]
    assert bench.pages.behind[:3] == [1, 2, 4]
    assert all(bench.done)


def test_a_page_that_became_full_a_second_time_is_stored_as_what_it_is_then() -> None:
    bench = Bench()
    bench.submit([0])
    assert bench.asked.wait(WAIT_S)
    bench.submit([1, 2])
    bench.saver.guard([2])
    bench.submit([2, 3])
    bench.pages.arrived.set()
    bench.room.set()
    bench.drained()
    assert bench.stored == [("", 1), ("", 2)]
    assert bench.done == [True, False, True]
    assert [piece.engine_ids for piece in bench.pages.pieces] == [[0], [2, 3]]


def test_the_engine_waits_for_what_is_just_being_queued_only_if_it_writes_there() -> None:
    bench = Bench()
    take, go = bench.pages.take, threading.Event()

    def slow(pieces: Any, after: Any) -> Any:
        bench.pages.began.set()
        go.wait(WAIT_S)
        return take(pieces, after)

    bench.pages.take = slow  # type: ignore[method-assign]
    bench.pages.arrived.set()
    bench.room.set()
    bench.submit([1, 2])
    assert bench.pages.began.wait(WAIT_S)
    bench.saver.guard([7])
    engine = threading.Thread(target=bench.saver.guard, args=([2],))
    engine.start()
    engine.join(0.05)
    assert engine.is_alive()
    assert bench.pages.held == []
    go.set()
    engine.join(WAIT_S)
    assert bench.pages.held == ["taken"]
    bench.drained()
    assert bench.done == [True]


def test_a_gathering_that_fails_holds_nobody_up() -> None:
    bench = Bench()

    def fail(pieces: Any, after: Any) -> Any:
        bench.pages.began.set()
        time.sleep(0.05)
        raise RuntimeError

    bench.pages.take = fail  # type: ignore[method-assign]
    bench.room.set()
    bench.submit([1, 2])
    assert bench.pages.began.wait(WAIT_S)
    bench.saver.guard([2])
    assert bench.pages.held == []
    bench.drained()
