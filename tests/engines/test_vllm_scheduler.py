"""The scheduler's side without an engine: what is promised, what is stored, and that nothing waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import BLOCK, ENGINE_BLOCK, RANKS, FakeClient, eventually, hash_of

from kvstore.errors import ConnectionLost
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import TierCode
from kvstore_connectors.base import Breaker, Link, Tally
from kvstore_connectors.vllm.decisions import Decisions
from kvstore_connectors.vllm.jobs import Report
from kvstore_connectors.vllm.lookups import Lookups
from kvstore_connectors.vllm.scheduler import SchedulerSide


def make_request(name: str = "r", tokens: int = 40, **fields: Any) -> Any:
    hashes = [hash_of(i) for i in range(tokens // ENGINE_BLOCK)]
    ids = list(range(tokens))
    return SimpleNamespace(
        request_id=name, block_hashes=hashes, num_tokens=tokens, num_computed_tokens=0, all_token_ids=ids,
        lora_request=None, cache_salt=None, skip_reading_prefix_cache=False, **fields,
    )  # fmt: skip


def step(scheduled: dict[str, int], new: dict[str, list[int]] | None = None, **cached: Any) -> Any:
    """As much of a scheduler output as is read."""
    news = [SimpleNamespace(req_id=name, block_ids=(ids,), num_computed_tokens=0) for name, ids in (new or {}).items()]
    known = SimpleNamespace(
        req_ids=list(cached.get("grown", {})),
        new_block_ids=[None if ids is None else (ids,) for ids in cached.get("grown", {}).values()],
        resumed_req_ids=cached.get("resumed", set()),
    )
    total = sum(scheduled.values())
    return SimpleNamespace(
        scheduled_new_reqs=news,
        scheduled_cached_reqs=known,
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=total,
    )


class Bench:
    """A scheduler's side over a fake daemon."""

    def __init__(self, *, async_load: bool = True, deadline_s: float = 0.05) -> None:
        self.client = FakeClient()
        self.tally = Tally()
        self.breaker = Breaker("test", self.tally)
        link = Link(lambda: self.client, self.breaker, self.tally)
        assert self.breaker.start(1.0)
        self.lookups = Lookups(link, self.tally, deadline_s)
        self.now = 1000.0
        self.decisions = Decisions(self.tally, BLOCK, 64, clock=lambda: self.now)
        self.side = SchedulerSide(self.lookups, self.tally, ENGINE_BLOCK, BLOCK, self.decisions, async_load=async_load)
        self.side.know_ranks(RANKS, 1000)

    def hold(self, blocks: Sequence[int], ranks: Sequence[int] = (0, 1), tier: TierCode = TierCode.HOST) -> None:
        """Make blocks present, named by their place in the prompt."""
        for rank in ranks:
            ns = namespace_digest(RANKS[rank])
            for block in blocks:
                key = derived_key(ns, hash_of(block * 2 + 1))
                self.client.blocks[ns, key] = b"x"
                self.client.tiers[ns, key] = tier

    def matched(self, request: Any, n_local: int = 0) -> tuple[int | None, bool]:
        """Ask until there is an answer."""
        for _ in range(2000):
            answer = self.side.matched(request, n_local)
            if answer[0] is not None:
                return answer
            time.sleep(0.001)
        raise AssertionError("never answered")


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for one in made:
        one.client.gate.set()
        one.breaker.close()
        one.lookups.close()


# -- lookups -----------------------------------------------------------------------------------------------------------


def test_only_what_every_rank_has_counts(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold([0, 1, 2, 3], ranks=[0])
    one.hold([0, 1], ranks=[1])
    assert one.matched(make_request()) == (16, True)
    assert one.client.calls.count("lookup") == 1  # both ranks in one round trip, and only once


def test_one_token_is_left_to_compute(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold(range(5))
    assert one.matched(make_request(tokens=40)) == (39, True)
    assert one.matched(make_request("other", tokens=41)) == (40, True)


@pytest.mark.parametrize(("n_local", "expected"), [(0, 0), (4, 0), (8, 24), (12, 20), (28, 4), (32, 0), (36, 0)])
def test_what_the_engine_has_is_skipped(bench: Callable[..., Bench], n_local: int, expected: int) -> None:
    """Blocks 1 to 3 are there, block 0 is gone: it does not matter to who has it."""
    one = bench()
    one.hold([1, 2, 3])
    count, beside = one.matched(make_request(), n_local)
    assert (count, beside) == (expected, expected > 0)


def test_scheduler_never_waits(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold(range(4))
    one.client.gate.clear()  # the daemon hangs
    request = make_request()
    one.side.arrived(request)
    begun = time.monotonic()
    answers, times = [], []
    while time.monotonic() - begun < 0.2:
        asked = time.monotonic()
        answers.append(one.side.matched(request, 0))
        times.append(time.monotonic() - asked)
    assert answers[0] == (None, False)
    assert answers[-1] == (0, False)  # after the deadline of 50 ms it is a miss
    assert sorted(times)[len(times) * 9 // 10] < 0.005  # single ones wait for the machine
    assert sum(times) < 0.25
    assert one.tally.peek()["lookup_late"] == 1
    one.client.gate.set()
    assert one.matched(request)[0] in (0, 32)


def test_an_outage_is_a_miss(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold(range(4))
    one.client.error = ConnectionLost("gone.")
    assert one.matched(make_request()) == (0, False)
    assert one.matched(make_request("next")) == (0, False)
    assert one.client.calls.count("lookup") == 1  # the second was not even tried
    one.client.error = None
    assert one.breaker.start(2.0) or eventually(one.breaker.allow)
    assert one.matched(make_request("third")) == (32, True)


def test_requests_that_may_not_read_are_not_looked_up(bench: Callable[..., Bench]) -> None:
    one = bench()
    request = make_request()
    request.skip_reading_prefix_cache = True
    one.side.arrived(request)
    assert one.side.matched(request, 0) == (0, False)
    short = make_request("short", tokens=7)
    assert one.side.matched(short, 0) == (0, False)
    assert one.client.calls == []


def test_tiers_add_up(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold([0, 1])
    one.hold([2], tier=TierCode.DISK)
    request = make_request()
    assert one.matched(request, 4) == (20, True)
    assert one.side.sources(request, 20) == {TierCode.HOST: 12, TierCode.DISK: 8}
    assert sum(one.side.sources(request, 7).values()) == 7


# -- loads and saves ---------------------------------------------------------------------------------------------------


def test_a_promise_becomes_a_job(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold(range(3))
    request = make_request()
    count, _ = one.matched(request, 4)
    one.side.allocated(request, [50, 51, 52, 53, 54, 55], count or 0)
    meta = one.side.plan(step({}))
    (job,) = meta.loads
    assert meta.fresh == job.engine_ids
    assert job.hashes == [hash_of(1), hash_of(3), hash_of(5)]
    assert (job.skip, job.engine_ids, job.tokens) == (1, [51, 52, 53, 54, 55], 20)
    assert one.side.plan(step({})).loads == []
    one.side.allocated(request, [50, 51, 52, 53, 54, 55, 56], 0)  # after the load, when the rest is allocated
    assert one.side.plan(step({})).loads == []


def saved(meta: Any) -> list[tuple[int, list[int]]]:
    return [(block.position // BLOCK, block.engine_ids) for job in meta.saves for block in job.blocks]


@pytest.mark.parametrize("known", [True, False])
def test_a_job_says_what_computing_costs_from_each_block_on(bench: Callable[..., Bench], known: bool) -> None:
    b = bench()
    b.hold(range(4))
    if known:
        b.decisions.prefill.learn([(0, 512)], 51.2)
    request = make_request(tokens=40)
    assert b.matched(request) == (32, True)
    b.side.allocated(request, list(range(10)), 32)
    (job,) = b.side.plan(step({})).loads
    assert job.ranks == 2
    assert job.saves_s == (pytest.approx((3.2, 2.4, 1.6, 0.8), rel=1e-3) if known else ())
    b.side.allocated(request, list(range(10)), 0)  # taken up without a choice: nothing of the last one is left
    assert b.side._requests["r"].taken is None


def test_blocks_are_stored_as_they_fill(bench: Callable[..., Bench]) -> None:
    one = bench()
    request = make_request()
    assert one.matched(request) == (0, False)
    one.side.allocated(request, [7, 8, 9], 0)
    meta = one.side.plan(step({"r": 12}, {"r": [7, 8, 9]}))
    assert saved(meta) == [(0, [7, 8])]
    assert meta.fresh == [7, 8, 9]
    request.num_computed_tokens = 12
    meta = one.side.plan(step({"r": 12}, grown={"r": [3, 4, 5]}))
    assert saved(meta) == [(1, [9, 3]), (2, [4, 5])]
    assert meta.fresh == [3, 4, 5]
    block = meta.saves[0].blocks[1]
    assert (block.hash, block.parent) == (hash_of(5), hash_of(3))
    assert np.frombuffer(block.tokens, "<i4").tolist() == list(range(16, 24))
    request.num_computed_tokens = 24
    meta = one.side.plan(step({"r": 1}, grown={"r": None}))
    assert saved(meta) == []
    assert meta.fresh == []


def test_what_was_loaded_is_not_stored_again(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold([0, 1])
    request = make_request()
    count, _ = one.matched(request, 4)
    one.side.allocated(request, list(range(10)), count or 0)
    one.side.plan(step({}))
    request.num_computed_tokens = 16
    assert saved(one.side.plan(step({"r": 24}, {"r": list(range(10))}))) == [(2, [4, 5]), (3, [6, 7]), (4, [8, 9])]


def test_a_failed_load_is_computed_and_stored(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold([0, 1, 2])
    request = make_request()
    count, _ = one.matched(request)
    one.side.allocated(request, list(range(10)), count or 0)
    (job,) = one.side.plan(step({})).loads
    one.side.failed(set(job.engine_ids[2:]))
    request.num_computed_tokens = 8  # the engine goes back to the last good block
    assert one.matched(request) == (0, False)  # and does not try again
    meta = one.side.plan(step({"r": 32}, {"r": list(range(10))}))
    assert [index for index, _ in saved(meta)] == [1, 2, 3, 4]


def test_preempted_requests_start_over(bench: Callable[..., Bench]) -> None:
    one = bench()
    request = make_request()
    one.matched(request)
    one.side.allocated(request, [7, 8, 9], 0)
    one.side.plan(step({"r": 12}, {"r": [7, 8, 9]}))
    request.num_computed_tokens = 12
    one.side.plan(step({"r": 8}, grown={"r": [10, 11]}))
    request.num_computed_tokens = 0  # preempted: blocks are gone
    one.side.allocated(request, [1, 2, 3, 4, 5], 0)
    meta = one.side.plan(step({"r": 20}, grown={"r": [1, 2, 3, 4, 5]}, resumed={"r"}))
    assert saved(meta) == [(0, [1, 2]), (1, [3, 4])]


def test_nothing_is_stored_on_top_of_a_load_in_doubt(bench: Callable[..., Bench]) -> None:
    """A synchronous load may fail on another rank; until every rank has confirmed it, no block is stored by anybody."""
    one = bench(async_load=False)
    one.hold([0])
    request, other = make_request(), make_request("other")
    count, beside = one.matched(request)
    assert (count, beside) == (8, False)
    one.matched(other)
    one.side.allocated(request, list(range(10)), 8)
    request.num_computed_tokens = 8
    meta = one.side.plan(step({"r": 16, "other": 8}, {"r": list(range(10)), "other": [20, 21]}))
    assert len(meta.loads) == 1
    assert meta.saves == []
    one.side.confirmed(Report({meta.step: 1}))  # one rank of two
    request.num_computed_tokens, other.num_computed_tokens = 24, 8
    assert one.side.plan(step({"r": 1})).saves == []
    one.side.confirmed(Report({meta.step: 1}))
    made_up = one.side.plan(step({"r": 1, "other": 1}))
    assert saved(made_up) == [(1, [2, 3]), (2, [4, 5]), (0, [20, 21])]


def test_reports_of_ranks_add_up() -> None:
    both = Report({3: 1}).aggregate(Report({3: 1, 4: 1}))
    assert isinstance(both, Report)
    assert both.steps == {3: 2, 4: 1}


def test_a_reset_separates_and_keeps_running_requests_private(bench: Callable[..., Bench]) -> None:
    one = bench()
    one.hold(range(4))
    old = make_request("old")
    one.matched(old)
    one.side.reset()
    new = make_request("new")
    assert one.matched(new) == (0, False)
    meta = one.side.plan(step({"old": 8, "new": 8}, {"old": [0, 1], "new": [2, 3]}))
    assert [job.request for job in meta.saves] == ["new"]
    assert meta.saves[0].scope.epoch
