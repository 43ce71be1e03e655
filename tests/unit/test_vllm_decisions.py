"""Load, blend or recompute in vLLM, with a clock that is set by hand: choices, regret, probing, failed loads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore.types import TierCode
from kvstore_connectors.base import Tally
from kvstore_connectors.choice import Blend, Choice, Speeds
from kvstore_connectors.vllm.decisions import MAX_STEPS, PROBE_S, TRY_AGAIN, Decisions

HOST, DISK = TierCode.HOST, TierCode.DISK
BLOCK, CHUNK, BLOCK_BYTES = 256, 2048, 4 << 20
TOKEN_S = 1e-3
FAST: Speeds = {DISK: (0.0, 1e-3, 1e-10)}
SLOW: Speeds = {DISK: (0.0, 1.0, 1e-9)}


class Engine:
    """An engine that computes a token in `TOKEN_S` and loads as fast as it is told; time passes only as it says."""

    def __init__(self, always: bool = False) -> None:
        self.now = 5.0
        self.tally = Tally()
        self.made = Decisions(self.tally, BLOCK, CHUNK, always=always, clock=lambda: self.now)
        self.made.block_bytes = BLOCK_BYTES
        self.steps = 0

    def counted(self, name: str) -> float:
        return self.tally.drain().get(name, 0.0)

    def compute(self, name: str, start: int, total: int) -> None:
        """Compute a prompt from a position to its end, a chunk a step."""
        while start < total:
            count = min(CHUNK, total - start)
            self.step({name: (start, count, total)}, count * TOKEN_S)
            start += count

    def step(self, spans: dict[str, tuple[int, int, int]], seconds: float, *, pure: bool = True) -> bool:
        self.steps += 1
        timed = self.made.planned(self.steps, spans, pure)
        self.now += seconds
        self.made.output({self.steps: 0.0} if timed else {}, {})
        return timed

    def learn(self) -> None:
        """Learn what computing costs."""
        for count in (512, 2048, 1024, 256):
            self.step({"warm": (0, count, count)}, count * TOKEN_S)

    def load(self, name: str, choice: Choice, tiers: Sequence[TierCode], seconds: float) -> None:
        self.made.taken(name, choice, tiers, loading=True)
        self.now += seconds
        self.made.loads_ended([name])

    def learn_memory(self, block_s: float = 1e-3) -> None:
        """Learn what loading from memory costs."""
        for number in range(10):
            tiers = [HOST] * (4 + 8 * (number % 4))
            self.load(f"m{number}", Choice(len(tiers), len(tiers), load_s=0.01), tiers, block_s * len(tiers))
            self.made.forget(f"m{number}")

    def choose(self, tiers: Sequence[TierCode], speeds: Speeds = FAST) -> Choice:
        return self.made.choose(tiers, speeds, 0, len(tiers) * BLOCK + 10)


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    made.learn()
    made.learn_memory()
    return made


# -- the choice --------------------------------------------------------------------------------------------------------


def test_what_is_faster_is_done(engine: Engine) -> None:
    assert engine.choose([HOST] * 16).blocks == 16
    assert engine.choose([DISK] * 16, FAST).blocks == 16
    assert engine.choose([DISK] * 16, SLOW).blocks == 0
    part = engine.choose([HOST] * 8 + [DISK] * 8, SLOW)
    assert part.blocks == 8
    assert part.total_s == pytest.approx(8 * 1e-3 + (8 * BLOCK + 10) * TOKEN_S, rel=0.05)


def test_before_anything_is_known_all_is_loaded_and_always_means_always() -> None:
    assert Engine().choose([HOST] * 16).blocks == 16
    assert Engine(always=True).choose([DISK] * 16, SLOW).blocks == 16
    assert Engine(always=True).made.wants_probe(Choice(0, 3), [DISK] * 3, SLOW) is None


def test_a_tier_that_was_never_measured_is_believed_as_long_as_that_pays(engine: Engine) -> None:
    choice = engine.choose([DISK] * 8, {})
    assert choice.blocks == 8
    assert choice.saves_s == pytest.approx([(8 - i) * BLOCK * TOKEN_S for i in range(8)], rel=0.05)


def test_loads_under_way_are_waited_for(engine: Engine) -> None:
    tiers = [DISK] * 8
    first = engine.choose(tiers, {DISK: (0.0, 0.1, 0.0)})
    assert first.load_s == pytest.approx(0.808, rel=0.05)
    engine.made.taken("a", first, tiers, loading=True)
    engine.now += 0.3
    behind = engine.choose([HOST] * 8)
    assert behind.load_s is not None
    assert first.load_s is not None
    assert behind.load_s == pytest.approx(first.load_s - 0.3 + 8e-3, rel=0.05)
    engine.now += 10
    assert engine.choose([HOST] * 8).load_s == pytest.approx(8e-3, rel=0.1), "what should have ended is not waited for"


# -- regret ------------------------------------------------------------------------------------------------------------


def test_a_load_that_was_worth_it_gained_what_computing_would_have_taken(engine: Engine) -> None:
    tiers = [HOST] * 16
    choice = engine.choose(tiers)
    engine.load("a", choice, tiers, 0.05)
    engine.compute("a", 16 * BLOCK, 16 * BLOCK + 10)
    taken = engine.tally.drain()
    assert taken["gained_seconds"] == pytest.approx((16 * BLOCK + 10) * TOKEN_S - 0.05 - 0.01, rel=0.05)
    assert taken["regret_seconds"] == 0
    assert taken["choice_load"] >= 1
    assert taken["first_token_actual_seconds"] == pytest.approx(0.06, rel=0.01)


def test_a_load_that_took_longer_than_computing_is_regretted(engine: Engine) -> None:
    tiers = [HOST] * 4
    engine.tally.drain()
    engine.load("a", engine.choose(tiers), tiers, 3.0)
    engine.compute("a", 4 * BLOCK, 4 * BLOCK + 10)
    assert engine.counted("regret_seconds") == pytest.approx(3.01 - (4 * BLOCK + 10) * TOKEN_S, rel=0.05)


def test_computing_is_regretted_where_the_load_was_forecast_to_be_sooner(engine: Engine) -> None:
    tiers = [DISK] * 4
    choice = engine.choose(tiers, SLOW)
    assert choice.blocks == 0
    assert choice.other_s is not None
    engine.tally.drain()
    engine.made.taken("a", choice, tiers, loading=False)
    engine.now += 20.0  # the engine was busy with others
    engine.compute("a", 0, 4 * BLOCK + 10)
    taken = engine.tally.drain()
    assert taken["regret_seconds"] == pytest.approx(20 + (4 * BLOCK + 10) * TOKEN_S - choice.other_s, rel=0.05)
    assert taken["gained_seconds"] == 0


def test_a_request_that_ended_or_only_decodes_counts_nothing(engine: Engine) -> None:
    tiers = [HOST] * 4
    engine.tally.drain()
    engine.made.taken("a", engine.choose(tiers), tiers, loading=True)
    engine.made.forget("a")
    engine.made.forget("a")
    engine.made.loads_ended(["a", "never there"])
    engine.made.load_failed("a", 1)
    engine.compute("a", 4 * BLOCK, 4 * BLOCK + 10)
    assert not engine.step({"a": (4 * BLOCK + 10, 1, 4 * BLOCK + 11)}, 0.01), "decoding is not timed"
    taken = engine.tally.drain()
    assert not {"regret_seconds", "gained_seconds", "load_actual_seconds"} & taken.keys()


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_step_that_does_other_things_teaches_nothing(engine: Engine) -> None:
    known = engine.made.prefill.seconds(np.array([0]), 2048)[0]
    engine.step({"a": (0, 2048, 4096)}, 60.0, pure=False)
    assert engine.made.prefill.seconds(np.array([0]), 2048)[0] == known


def test_steps_planned_ahead_are_timed_from_the_end_of_the_one_before() -> None:
    engine = Engine()
    for number in range(1, 9):
        engine.made.planned(2 * number, {"a": (0, 1000, 5000)}, True)
        engine.made.planned(2 * number + 1, {"a": (1000, 1000, 5000)}, True)
        engine.now += 1.0
        engine.made.output({2 * number: 0.0}, {})
        engine.now += 1.0
        engine.made.output({2 * number + 1: 0.0}, {})
    assert engine.made.prefill.seconds(np.array([0]), 1000)[0] == pytest.approx(1.0, rel=0.1)


def test_steps_that_compute_nothing_do_not_say_when_the_engine_was_free() -> None:
    """A worker that computes as a step is begun may be through it before the output of the one before is looked at."""
    engine = Engine()
    for number in range(1, 9):
        engine.made.idle(2 * number)
        engine.made.planned(2 * number + 1, {"a": (0, 1000, 5000)}, True)
        engine.now += 1.0
        engine.made.output({}, {})
        engine.made.output({2 * number + 1: 0.0}, {})
    assert engine.made.prefill.seconds(np.array([0]), 1000)[0] == pytest.approx(1.0, rel=0.1)


def test_a_blend_takes_what_its_worker_says(engine: Engine) -> None:
    """The output of the step before it, which computes, may be looked at when it is through."""
    one, known = part(1000), engine.made.prefill.seconds(np.array([0]), 2048)[0]
    for number in range(500, 504, 2):
        engine.made.planned(number, {"other": (0, 10, 5000)}, True)
        engine.made.planned(number + 1, {"b": (one.end, 1, 1000)}, False, one)
        engine.now += 10 * TOKEN_S + 2.0
        engine.made.output({number: 0.0}, {})
        engine.made.output({number + 1: 0.0}, {number + 1: 2.0 + one.computed * TOKEN_S})
    assert not engine.made.blend_pays(one, 1000)
    assert engine.made.prefill.seconds(np.array([0]), 2048)[0] == known


def test_steps_that_are_never_reported_are_forgotten(engine: Engine) -> None:
    for number in range(100, 100 + 10 * MAX_STEPS):
        engine.made.planned(number, {"a": (0, 100, 1000)}, True)
    assert len(engine.made._steps) <= MAX_STEPS
    engine.step({"b": (0, 100, 100)}, 0.1)


# -- blending ----------------------------------------------------------------------------------------------------------


def part(tokens: int, exact: int = 32) -> Blend:
    """All of a prompt but its last token, 15 % of it computed."""
    return Blend(exact, tokens - 1, 0.15 * (tokens - 1 - exact))


def blend(engine: Engine, tokens: int, launches_s: float) -> None:
    """Blend a prompt: launches, the computing of its share, and the engine's own last token."""
    engine.steps += 1
    one = part(tokens)
    assert engine.made.planned(engine.steps, {"b": (one.end, 1, tokens)}, False, one)
    took_s = launches_s + (one.computed + 1) * TOKEN_S
    engine.now += took_s
    engine.made.output({engine.steps: 0.0}, {engine.steps: took_s})


def test_blending_is_tried_until_it_is_known_to_be_slower(engine: Engine) -> None:
    for _ in range(2):
        assert engine.made.blend_pays(part(1000), 1000)
        blend(engine, 1000, launches_s=2.0)
    engine.tally.drain()
    asked = [engine.made.blend_pays(part(1000), 1000) for _ in range(2 * TRY_AGAIN)]
    assert [at for at, pays in enumerate(asked, 1) if pays] == [TRY_AGAIN, 2 * TRY_AGAIN], "now and then, to find out"
    assert engine.counted("blend_slower") == 2 * TRY_AGAIN - 2
    assert engine.made.blend_pays(part(8000), 8000), "launches do not grow with the prompt"


def test_a_blend_that_became_faster_is_found_to_be(engine: Engine) -> None:
    for _ in range(4):
        blend(engine, 1000, launches_s=2.0)
    while not engine.made.blend_pays(part(1000), 1000):
        pass
    blend(engine, 1000, launches_s=0.05)
    assert all(engine.made.blend_pays(part(1000), 1000) for _ in range(TRY_AGAIN))


def test_a_blend_that_became_slower_is_found_to_be_and_one_slow_prompt_is_forgotten(engine: Engine) -> None:
    for _ in range(8):
        blend(engine, 1000, launches_s=0.1)
    blend(engine, 1000, launches_s=3.0)
    assert engine.made.blend_pays(part(1000), 1000)
    slow = 0
    while engine.made.blend_pays(part(1000), 1000):
        blend(engine, 1000, launches_s=3.0)
        slow += 1
    assert 1 < slow < 20


def test_the_first_blend_compiles_and_tells_nothing(engine: Engine) -> None:
    blend(engine, 1000, launches_s=60.0)
    blend(engine, 1000, launches_s=0.1)
    assert all(engine.made.blend_pays(part(1000), 1000) for _ in range(TRY_AGAIN))


def test_blends_tell_nothing_of_what_computing_costs_nor_failed_ones_of_blending(engine: Engine) -> None:
    known = engine.made.prefill.seconds(np.array([0]), 2048)[0]
    for _ in range(3):
        engine.made.planned(900, {"b": (999, 1, 1000)}, False, part(1000))
        engine.made.blend_failed()
        engine.now += 60.0
        engine.made.output({900: 0.0}, {})
    assert engine.made.prefill.seconds(np.array([0]), 2048)[0] == known
    assert not engine.made.blending.known


def test_what_the_step_computes_of_others_is_not_the_blend(engine: Engine) -> None:
    for _ in range(3):
        engine.steps += 1
        one = part(1000)
        engine.made.planned(engine.steps, {"b": (999, 1, 1000), "other": (0, 1500, 9000)}, False, one)
        took_s = 0.1 + (one.computed + 1501) * TOKEN_S
        engine.now += took_s
        engine.made.output({engine.steps: 0.0}, {engine.steps: took_s})
    assert engine.made.blend_pays(part(1000), 1000)
    assert not engine.made.blend_pays(part(120), 120), "0.1 s of launches, and 0.09 s of computing"


def test_blending_always_if_the_user_asks_for_it() -> None:
    engine = Engine(always=True)
    engine.learn()
    for _ in range(3):
        blend(engine, 1000, launches_s=60.0)
    assert engine.made.blend_pays(part(1000), 1000)


# -- probing -----------------------------------------------------------------------------------------------------------


def test_a_tier_that_is_not_worth_it_is_looked_at_now_and_then(engine: Engine) -> None:
    tiers = [HOST, HOST, DISK, DISK]
    choice = engine.choose(tiers, SLOW)
    assert choice.blocks == 2
    assert engine.made.wants_probe(choice, tiers, SLOW) == 2, "the first block that is left there"
    assert engine.made.wants_probe(choice, tiers, SLOW) is None
    engine.now += PROBE_S
    assert engine.made.wants_probe(choice, tiers, SLOW) == 2
    assert engine.made.wants_probe(engine.choose([HOST] * 2), [HOST] * 2, SLOW) is None, "nothing is left there"


@pytest.mark.parametrize(
    ("speed", "pause_s"),
    [
        ((0.0, 0.6, 0.0), 3.0),
        ((0.0, 0.1, 0.5 / BLOCK_BYTES), 3.0),
        ((0.0, 60.0, 0.0), PROBE_S),
        ((0.0, 1e-4, 0.0), 1.0),
    ],
)
def test_a_tier_is_looked_at_for_a_fifth_of_its_time_at_most(
    engine: Engine, speed: tuple[float, float, float], pause_s: float
) -> None:
    choice, tiers = Choice(0, 4), [DISK] * 4
    assert engine.made.wants_probe(choice, tiers, {DISK: speed}) == 0
    engine.now += pause_s - 0.01
    assert engine.made.wants_probe(choice, tiers, {DISK: speed}) is None
    engine.now += 0.02
    busy = {DISK: (0.1, *speed[1:])}
    assert engine.made.wants_probe(choice, tiers, busy) == (0 if pause_s == PROBE_S else None), "others read it"
    assert engine.made.wants_probe(choice, tiers, {DISK: speed}) == (None if pause_s == PROBE_S else 0)


def test_a_clock_that_has_just_begun_makes_no_difference() -> None:
    engine = Engine()
    engine.now = 0.0
    engine.learn()
    assert engine.made.wants_probe(engine.choose([DISK] * 4, SLOW), [DISK] * 4, SLOW) == 0


def test_memory_that_was_slow_once_is_not_given_up_for_ever(engine: Engine) -> None:
    tiers = [HOST] * 16
    engine.load("hiccup", engine.choose(tiers), tiers, 100.0)
    engine.made.forget("hiccup")
    assert engine.made.loads.seconds(tiers, {}, BLOCK_BYTES)[-1] > 16 * BLOCK * TOKEN_S, (
        "that is what it looks like now"
    )
    tries = 0
    for number in range(60):
        engine.now += PROBE_S / 2
        choice = engine.choose(tiers)
        name = f"r{number}"
        if choice.blocks:
            tries += 1
            assert choice.saves_s
            engine.load(name, choice, tiers, 16e-3)
        else:
            engine.made.taken(name, choice, tiers, loading=False)
        engine.made.forget(name)
    assert engine.choose(tiers).blocks == 16
    assert tries > 10


def test_memory_that_stays_slow_is_tried_at_most_every_so_often(engine: Engine) -> None:
    tiers = [HOST] * 16
    engine.load("a", engine.choose(tiers), tiers, 100.0)
    tried: list[float] = []
    for number in range(100):
        engine.now += 1.0
        choice = engine.choose(tiers)
        if choice.blocks:
            tried.append(engine.now)
            engine.made.taken(f"r{number}", choice, tiers, loading=True)
            engine.now += choice.deadline_s
            engine.made.load_failed(f"r{number}", 0)
            engine.made.loads_ended([f"r{number}"])
        engine.made.forget(f"r{number}")
    assert len(tried) >= 2
    assert all(later - sooner >= PROBE_S for sooner, later in itertools.pairwise(tried))


# -- loads that fail ---------------------------------------------------------------------------------------------------


def test_a_load_that_gave_up_makes_its_tier_slower(engine: Engine) -> None:
    tiers, speeds = [DISK] * 8, {DISK: (0.0, 0.05, 0.0)}
    choice = engine.choose(tiers, speeds)
    before = choice.load_s
    assert choice.blocks == 8
    assert before is not None
    engine.made.taken("a", choice, tiers, loading=True)
    engine.now += 4 * before
    engine.made.load_failed("a", 1)
    engine.made.loads_ended(["a"])
    after = engine.made.loads.seconds(tiers, speeds, BLOCK_BYTES)[-1]
    assert after > 1.3 * before


@pytest.mark.parametrize("tiers", [[HOST] * 8, [DISK] * 8, [HOST] * 4 + [DISK] * 4])
def test_a_load_that_failed_at_once_makes_nothing_faster(engine: Engine, tiers: list[TierCode]) -> None:
    """A daemon that went away, a block that was damaged: that says nothing of how long loads take."""
    before = engine.made.loads.seconds(tiers, FAST, BLOCK_BYTES)
    for number in range(20):
        choice = engine.choose(tiers)
        engine.made.taken(f"a{number}", choice, tiers, loading=True)
        engine.now += 1e-4
        engine.made.load_failed(f"a{number}", 0)
        engine.made.loads_ended([f"a{number}"])
        engine.made.forget(f"a{number}")
    assert list(engine.made.loads.seconds(tiers, FAST, BLOCK_BYTES)) == pytest.approx(list(before))


def test_a_hung_tier_below_does_not_make_memory_look_slow(engine: Engine) -> None:
    tiers = [HOST] * 4 + [DISK] * 4
    choice = engine.choose(tiers)
    assert choice.blocks == 8
    engine.made.taken("a", choice, tiers, loading=True)
    engine.now += 5.0
    engine.made.load_failed("a", 4)
    engine.made.loads_ended(["a"])
    assert engine.made.loads.seconds([HOST] * 4, {}, BLOCK_BYTES)[-1] == pytest.approx(4e-3, rel=0.1)


def test_a_load_that_ended_before_its_turn_says_nothing_of_its_own_time(engine: Engine) -> None:
    """What was ahead of it had been forecast too long: that must not make memory look free."""
    below = [DISK] * 8
    engine.made.taken("a", engine.choose(below, {DISK: (0.0, 0.1, 0.0)}), below, loading=True)
    for number in range(10):
        tiers = [HOST] * 8
        engine.made.taken(f"b{number}", engine.choose(tiers), tiers, loading=True)
        engine.now += 0.01
        engine.made.loads_ended([f"b{number}"])
        engine.made.forget(f"b{number}")
    engine.made.forget("a")
    assert engine.choose([HOST] * 8).load_s == pytest.approx(8e-3, rel=0.3)
