"""How much computing was saved, said carefully."""

from __future__ import annotations

import pytest

from kvstore.obs.savings import MAX_SCOPES, WINDOW_S, Savings
from kvstore.types import Scope

SCOPE = Scope("uid-1", b"n" * 32)


def seconds(savings: Savings, tokens: list[int]) -> None:
    """Let so many tokens be computed in each second."""
    for each in tokens:
        savings.computed(SCOPE, each)
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


def test_nothing_computed_is_nothing_known():
    savings = Savings()
    assert savings.saved(SCOPE, 100) == (100, None)
    seconds(savings, [0] * 20)
    assert savings.pace(SCOPE) is None


def test_scopes_are_bounded():
    savings = Savings()
    for number in range(MAX_SCOPES + 10):
        savings.computed(Scope("uid-1", number.to_bytes(32, "big")), 1)
    savings.tick()
    assert savings.pace(Scope("uid-1", (MAX_SCOPES + 5).to_bytes(32, "big"))) is None
    assert savings.pace(Scope("uid-1", (5).to_bytes(32, "big"))) is not None
