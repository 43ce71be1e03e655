"""When a load is given up, with a clock that is set by hand and a tier as slow as it is told to be."""

from __future__ import annotations

import pytest

from kvstore_connectors.vllm.patience import FIRST_S, LOOK, ROUND_S, Patience

FOREVER = 1e9


class Load:
    """A load of blocks that come one after the other; `each` says how long each of them takes.

    Computing a block takes one second. As the daemon, it tells of a block under way what it takes by what has come,
    once a sixty-fourth has, and takes the blocks behind it for as slow.
    """

    def __init__(self, each: list[float], *, ranks: int = 1, told: bool = True, forecast_s: float = 0.0) -> None:
        self.now = 100.0
        self.each, self.told, self.forecast_s = each, told, forecast_s
        saves = [float(len(each) - i) for i in range(len(each))]
        self.patience = Patience(saves, FOREVER, ranks, lambda: self.now)

    def run(self) -> tuple[int, float]:
        """Blocks that came, and how long that took."""
        came, began, due = 0, self.now, self.now
        while came < len(self.each) and not self.patience.ended:
            began = due
            due = began + self.each[came]
            while not self.patience.ended and self.now < due:
                self.now += min(self.patience.next_round_s(), due - self.now)
                if self.now >= due:
                    came += 1
                    self.patience.came()
                else:
                    passed = self.now - began
                    pace = passed / max(passed / self.each[came], 1 / 64)
                    block_s = max(self.forecast_s, pace if self.told else passed)
                    self.patience.look(came, block_s * (len(self.each) - came))
        return came, self.now - 100.0


def test_a_load_that_is_sooner_goes_on_to_its_end() -> None:
    assert Load([0.2] * 8, forecast_s=0.2).run() == (8, pytest.approx(1.6))
    assert Load([0.9] * 8, forecast_s=0.9).run() == (8, pytest.approx(7.2))


@pytest.mark.parametrize("blocks", [1, 2, 4, 16])
@pytest.mark.parametrize("each_s", [1.1, 1.5, 5.0, 1000.0])
def test_a_tier_that_has_become_slow_costs_less_than_a_twentieth_of_computing(blocks: int, each_s: float) -> None:
    """Nothing comes in time, so all that was waited is lost."""
    came, took = Load([each_s] * blocks, forecast_s=0.25).run()
    assert came == 0
    assert took <= 0.05 * blocks


def test_what_came_before_a_tier_became_slow_is_kept() -> None:
    came, took = Load([0.25, 0.25, 0.25, 5.0, 5.0, 5.0], forecast_s=0.25).run()
    assert came == 3
    assert 0.75 < took < 0.75 + 2 * ROUND_S


def test_a_block_that_is_late_once_is_waited_for() -> None:
    assert Load([0.25, 0.25, 0.6, 0.25], forecast_s=0.25).run()[0] == 4


def test_the_last_block_is_not_given_up_when_most_of_it_has_come() -> None:
    """At a pace at which nobody would begin: what is left of it still comes sooner than it is computed."""
    load = Load([1.3], forecast_s=0.25)
    load.now += 0.9
    load.patience.look(0, 1.3)
    assert not load.patience.ended


def test_a_tier_that_tells_nothing_is_given_up_when_the_wait_is_longer_than_computing() -> None:
    came, took = Load([100.0] * 4, told=False).run()
    assert came == 0
    assert took <= 4.2
    load = Load([1.0])
    load.patience.look(0, 0.0)
    assert not load.patience.ended
    load.now += 1.05
    load.patience.look(0, 0.0)
    assert load.patience.ended


def test_ranks_share_the_tier() -> None:
    assert Load([0.8] * 4, forecast_s=0.8, ranks=1).run()[0] == 4
    assert Load([0.8] * 4, forecast_s=0.8, ranks=2).run()[0] == 0


def test_looks_become_rarer() -> None:
    waits = Patience([2.0, 1.0], FOREVER)
    assert [waits.next_round_s() for _ in range(4)] == pytest.approx([2 * LOOK, ROUND_S, ROUND_S, ROUND_S])
    assert Patience([1e-6], FOREVER).next_round_s() == FIRST_S
    assert Patience([], FOREVER).next_round_s() == ROUND_S


def test_without_a_forecast_of_computing_only_the_deadline_counts() -> None:
    now = 7.0
    patience = Patience([], 8.0, clock=lambda: now)
    patience.look(0, 1e6)
    assert not patience.ended
    now = 7.95
    assert patience.next_round_s() == pytest.approx(0.05)
    now = 8.0
    assert patience.ended
    assert patience.next_round_s() == 0
