"""How much computing was saved, said carefully."""

from __future__ import annotations

import pytest

from kvstore.obs.savings import MAX_ASKED, MAX_SCOPES, WINDOW_S, Savings
from kvstore.types import BlockId, Scope

SCOPE = Scope("uid-1", b"n" * 32)
BLOCKS = [BlockId(SCOPE, number.to_bytes(32, "big")) for number in range(8)]


class Clock:
    """Time that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def seconds(savings: Savings, tokens: list[int]) -> None:
    """Let so many tokens be computed in each second."""
    for each in tokens:
        savings.computed(BLOCKS[0], each)
        savings.tick()


def test_the_fastest_ten_seconds_stand_for_how_fast_an_engine_computes():
    savings = Savings()
    seconds(savings, [100] * WINDOW_S + [0] * 50 + [500] * WINDOW_S + [10] * 30)
    assert savings.pace(SCOPE) == pytest.approx(500)
    assert savings.saved(SCOPE, 2000) == (2000, 4.0)


def test_a_burst_that_was_computed_longer_ago_is_spread_over_the_window():
    savings = Savings()
    seconds(savings, [5000, *[0] * 20])
    assert savings.pace(SCOPE) == pytest.approx(500)


def test_a_prompt_is_timed_from_the_question_to_the_offer():
    clock = Clock()
    savings = Savings(clock)
    savings.asked(BLOCKS[2])  # a prompt of which two blocks were there
    clock.now += 0.05
    savings.asked(BLOCKS[2])  # the engine asks again while it waits
    clock.now += 0.15
    for block in BLOCKS[2:6]:
        savings.computed(block, 256)
    assert savings.pace(SCOPE) == pytest.approx(1024 / 0.2)
    clock.now += 0.1  # a second step of the same prompt
    savings.computed(BLOCKS[6], 256)
    assert savings.pace(SCOPE) == pytest.approx(1024 / 0.2)
    savings.asked(BLOCKS[7])
    clock.now += 3600  # nobody computed it then
    savings.computed(BLOCKS[7], 256)
    assert savings.pace(SCOPE) == pytest.approx(1024 / 0.2)


def test_what_was_asked_for_is_bounded():
    savings = Savings(Clock())
    for number in range(MAX_ASKED + 10):
        savings.asked(BlockId(SCOPE, number.to_bytes(32, "big")))
    assert len(savings._asked) == MAX_ASKED


def test_nothing_computed_is_nothing_known():
    savings = Savings()
    assert savings.saved(SCOPE, 100) == (100, None)
    seconds(savings, [0] * 20)
    assert savings.pace(SCOPE) is None


def test_scopes_are_bounded():
    savings = Savings()
    for number in range(MAX_SCOPES + 10):
        savings.computed(BlockId(Scope("uid-1", number.to_bytes(32, "big")), b"k" * 32), 1)
    savings.tick()
    assert savings.pace(Scope("uid-1", (MAX_SCOPES + 5).to_bytes(32, "big"))) is None
    assert savings.pace(Scope("uid-1", (5).to_bytes(32, "big"))) is not None
