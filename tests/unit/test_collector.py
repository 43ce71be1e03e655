"""All objects are looked at for cycles while nobody asks for anything, and at the latest after some hours."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from kvstore.collector import AGAIN_S, LATEST_S, QuietCollector


class Cycle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.me = self


class Place:
    """A collector whose clock and whose calls a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self.collector = QuietCollector(lambda: self.calls, lambda: self.now)

    def beat(self, later_s: float, calls: int = 0) -> bool:
        self.now += later_s
        self.calls += calls
        return self.collector.beat()


@pytest.fixture
def place() -> Iterator[Place]:
    before = gc.get_threshold()
    yield Place()
    gc.set_threshold(*before)


def test_an_old_cycle_goes_when_it_is_quiet(place: Place) -> None:
    place.beat(0)
    old = weakref.ref(Cycle())
    gc.collect(1)  # into the oldest generation, or away
    kept = Cycle()
    gone = weakref.ref(kept)
    gc.collect(1)
    gc.collect(1)
    del kept
    assert old() is None, "young ones go without us"
    assert gone() is not None
    assert not place.beat(AGAIN_S - 1)
    assert not place.beat(2, calls=1), "somebody asked"
    assert place.beat(5)
    assert gone() is None
    assert not place.beat(5), "not again so soon"


def test_it_is_done_though_it_is_never_quiet(place: Place) -> None:
    assert not any(place.beat(60, calls=1) for _ in range(int(LATEST_S // 60) - 1))
    assert place.beat(120, calls=1)


def test_the_interpreter_does_not_look_at_all_by_itself(place: Place) -> None:
    kept = Cycle()
    gone = weakref.ref(kept)
    gc.collect(1)
    gc.collect(1)
    del kept
    alive = [Cycle() for _ in range(300_000)]
    assert gone() is not None, "though so many more came"
    del alive
