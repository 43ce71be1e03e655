"""The scheduler's and the worker's side without an engine: client and requests of our own, each moment in our hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import LeasedBlock, Room
from kvstore.errors import ConnectionLost, DeadlineExceeded, KVStoreError, VersionMismatch
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import BlockHeader, Exists, Miss, MissReason, Namespace, Stored, TierCode
from kvstore_connectors.base import Breaker, Link, Tally, shielded
from kvstore_connectors.vllm.identity import Scope
from kvstore_connectors.vllm.jobs import LoadJob, Report, SaveBlock, SaveJob
from kvstore_connectors.vllm.layout import PageViews
from kvstore_connectors.vllm.lookups import Lookups
from kvstore_connectors.vllm.pages import HostPages
from kvstore_connectors.vllm.scheduler import SchedulerSide
from kvstore_connectors.vllm.transfers import Transfers
from kvstore_connectors.vllm.worker import Loader

RANKS = [Namespace(model="m", tp_rank=rank, tp_size=2, block_tokens=8) for rank in range(2)]
ENGINE_BLOCK, BLOCK = 4, 8


class FakeClient:
    """A daemon in a dictionary: (namespace digest, key) -> bytes."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, bytes], bytes] = {}
        self.tiers: dict[tuple[bytes, bytes], TierCode] = {}
        self.refuse: dict[bytes, list[MissReason]] = {}
        self.valid = True
        self.error: KVStoreError | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.gate.wait(5)
        if self.error is not None:
            raise self.error

    def connect(self) -> None:
        if self.error is not None:
            raise self.error

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass

    def lookup_many(self, queries: Sequence[tuple[Namespace, list[bytes]]], *, prefix: bool) -> list[list[TierCode]]:
        self._called("lookup")
        out = []
        for namespace, keys in queries:
            ids = [(namespace_digest(namespace), key) for key in keys]
            found = [self.tiers.get(one, TierCode.HOST) if one in self.blocks else TierCode.ABSENT for one in ids]
            out.append(found)
        return out

    def lease(self, keys: Sequence[bytes], *, namespace: Namespace, ttl_s: float, wait_s: float) -> Any:
        self._called("lease")
        blocks: list[Any] = []
        for index, key in enumerate(keys):
            data = self.blocks.get((namespace_digest(namespace), key))
            reasons = self.refuse.get(key)
            if reasons:
                blocks.append(Miss(reasons.pop(0)))
            elif data is None:
                blocks.append(Miss(MissReason.ABSENT))
            else:
                array = np.frombuffer(data, dtype=np.uint8)
                half = len(array) // 2  # every other block lies in two parts
                parts = [array] if index % 2 == 0 else [array[:half], array[half:]]
                blocks.append(LeasedBlock(index, len(data), TierCode.HOST, parts, None))
        return _Context(blocks=blocks, valid=lambda: self.valid)

    def reserve(self, offers: Any, *, namespace: Namespace, ttl_s: float, wait_s: float) -> Any:
        self._called("reserve")
        ns = namespace_digest(namespace)
        rooms: list[Any] = []
        for index, (key, nbytes, _) in enumerate(offers):
            memory = [np.zeros(nbytes // 2, dtype=np.uint8), np.zeros(nbytes - nbytes // 2, dtype=np.uint8)]
            rooms.append(Exists() if (ns, key) in self.blocks else Room(index, nbytes, memory))

        def commit(indexes: list[int]) -> list[Any]:
            self._called("commit")
            for index in indexes:
                self.blocks[ns, offers[index][0]] = b"".join(part.tobytes() for part in rooms[index].parts)
            return [Stored() if isinstance(room, Room) else room for room in rooms]

        return _Context(blocks=rooms, commit=commit)


class _Context(SimpleNamespace):
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def hash_of(index: int) -> bytes:
    return bytes([index]) * 32


def make_request(name: str = "r", tokens: int = 40, **fields: Any) -> Any:
    hashes = [hash_of(i) for i in range(tokens // ENGINE_BLOCK)]
    ids = list(range(tokens))
    return SimpleNamespace(
        request_id=name, block_hashes=hashes, num_tokens=tokens, num_computed_tokens=0, all_token_ids=ids,
        lora_request=None, cache_salt=None, skip_reading_prefix_cache=False, **fields,
    )  # fmt: skip


def step(scheduled: dict[str, int], new: dict[str, list[int]] | None = None, **cached: Any) -> Any:
    """As much of a scheduler output as is read."""
    news = [SimpleNamespace(req_id=name, block_ids=(ids,)) for name, ids in (new or {}).items()]
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
        self.side = SchedulerSide(self.lookups, self.tally, ENGINE_BLOCK, BLOCK, async_load=async_load)
        self.side.know_ranks(RANKS)

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
    answers, longest = [], 0.0
    while time.monotonic() - begun < 0.2:
        asked = time.monotonic()
        answers.append(one.side.matched(request, 0))
        longest = max(longest, time.monotonic() - asked)
    assert answers[0] == (None, False)
    assert answers[-1] == (0, False)  # after the deadline of 50 ms it is a miss
    assert longest < 0.02
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
    assert one.breaker.start(2.0) or _eventually(one.breaker.allow)
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
    (job,) = one.side.plan(step({})).loads
    assert job.hashes == [hash_of(1), hash_of(3), hash_of(5)]
    assert (job.skip, job.engine_ids, job.tokens) == (1, [51, 52, 53, 54, 55], 20)
    assert one.side.plan(step({})).loads == []
    one.side.allocated(request, [50, 51, 52, 53, 54, 55, 56], 0)  # after the load, when the rest is allocated
    assert one.side.plan(step({})).loads == []


def saved(meta: Any) -> list[tuple[int, list[int]]]:
    return [(block.position // BLOCK, block.engine_ids) for job in meta.saves for block in job.blocks]


def test_blocks_are_stored_as_they_fill(bench: Callable[..., Bench]) -> None:
    one = bench()
    request = make_request()
    assert one.matched(request) == (0, False)
    one.side.allocated(request, [7, 8, 9], 0)
    assert saved(one.side.plan(step({"r": 12}, {"r": [7, 8, 9]}))) == [(0, [7, 8])]
    request.num_computed_tokens = 12
    meta = one.side.plan(step({"r": 12}, grown={"r": [3, 4, 5]}))
    assert saved(meta) == [(1, [9, 3]), (2, [4, 5])]
    block = meta.saves[0].blocks[1]
    assert (block.hash, block.parent) == (hash_of(5), hash_of(3))
    assert np.frombuffer(block.tokens, "<i4").tolist() == list(range(16, 24))
    request.num_computed_tokens = 24
    assert saved(one.side.plan(step({"r": 1}, grown={"r": None}))) == []


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


# -- transfers ---------------------------------------------------------------------------------------------------------


class Rank:
    """A worker's pages and transfers over a fake daemon: 2 layers, pages of 4 tokens, blocks of 8."""

    def __init__(self, deadline_s: float = 0.5) -> None:
        self.client = FakeClient()
        self.tally = Tally()
        self.breaker = Breaker("test", self.tally)
        self.link = Link(lambda: self.client, self.breaker, self.tally)
        assert self.breaker.start(1.0)
        self.caches = [torch.zeros(2, 64, ENGINE_BLOCK, 2, 4) for _ in range(2)]
        views = [PageViews("lkthd1", (cache[0], cache[1])) for cache in self.caches]
        self.pages = HostPages(views, BLOCK, ENGINE_BLOCK, ENGINE_BLOCK)
        self.transfers = Transfers(self.pages, RANKS[0], self.tally, deadline_s)

    def store(self, count: int) -> list[bytes]:
        """Fill engine blocks 0.. with random numbers and store `count` blocks of them."""
        for cache in self.caches:
            cache[:, : 2 * count] = torch.randn(2, 2 * count, ENGINE_BLOCK, 2, 4)
        hashes = [hash_of(i) for i in range(count)]
        blocks = [SaveBlock(h, b"", i * BLOCK, b"", [2 * i, 2 * i + 1]) for i, h in enumerate(hashes)]
        self.transfers.save(self.link, [SaveJob("r", Scope(), blocks)])
        return hashes

    def job(self, hashes: list[bytes], first: int = 32, skip: int = 0) -> LoadJob:
        """Load into engine blocks from `first` on."""
        count = 2 * len(hashes) - skip
        return LoadJob("r", Scope(), hashes, skip, list(range(first, first + count)), count * ENGINE_BLOCK, True)

    def same(self, source: range, target: range) -> bool:
        return all(torch.equal(cache[:, list(source)], cache[:, list(target)]) for cache in self.caches)


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.breaker.close()


def test_stored_and_loaded(rank: Rank) -> None:
    hashes = rank.store(3)
    assert rank.transfers.load(rank.link, rank.job(hashes, skip=1)) == set()
    assert rank.same(range(1, 6), range(32, 37))
    counts = rank.tally.peek()
    assert (counts["saved_blocks"], counts["loaded_blocks"]) == (3, 3)
    rank.transfers.save(rank.link, [SaveJob("r", Scope(), [SaveBlock(hashes[0], b"", 0, b"", [0, 1])])])
    assert rank.tally.peek()["save_exists"] == 1


@pytest.mark.parametrize("scope", [Scope(lora="a"), Scope(salt="b"), Scope(epoch="c")])
def test_another_scope_finds_nothing(rank: Rank, scope: Scope) -> None:
    job = rank.job(rank.store(1))
    job.scope = scope
    assert rank.transfers.load(rank.link, job) == {32, 33}


def test_everything_behind_a_hole_has_failed(rank: Rank) -> None:
    hashes = rank.store(4)
    del rank.client.blocks[namespace_digest(RANKS[0]), derived_key(namespace_digest(RANKS[0]), hashes[2])]
    assert rank.transfers.load(rank.link, rank.job(hashes, skip=1)) == {35, 36, 37, 38}
    assert rank.same(range(1, 4), range(32, 35))
    assert rank.tally.peek()["recomputed_tokens"] == 16


def test_a_lease_that_ended_is_worth_nothing(rank: Rank) -> None:
    job = rank.job(rank.store(2))
    rank.client.valid = False
    assert rank.transfers.load(rank.link, job) == {32, 33, 34, 35}


def test_blocks_of_another_size_are_refused(rank: Rank) -> None:
    hashes = rank.store(2)
    ns = namespace_digest(RANKS[0])
    rank.client.blocks[ns, derived_key(ns, hashes[1])] += b"x"
    assert rank.transfers.load(rank.link, rank.job(hashes)) == {34, 35}
    assert rank.tally.peek()["load_wrong_size"] == 1


def test_slow_tiers_are_asked_again_until_the_deadline(rank: Rank) -> None:
    hashes = rank.store(3)
    slow = derived_key(namespace_digest(RANKS[0]), hashes[1])
    rank.client.refuse[slow] = [MissReason.DEADLINE, MissReason.DEADLINE]
    assert rank.transfers.load(rank.link, rank.job(hashes)) == set()
    assert rank.client.calls.count("lease") == 3
    rank.client.refuse[slow] = [MissReason.DEADLINE] * 1_000_000
    begun = time.monotonic()
    assert rank.transfers.load(rank.link, rank.job(hashes)) == {34, 35, 36, 37}
    assert 0.4 < time.monotonic() - begun < 2


@pytest.mark.parametrize("reason", [MissReason.CORRUPT, MissReason.NO_SPACE, MissReason.TIER_DOWN])
def test_other_reasons_are_final(rank: Rank, reason: MissReason) -> None:
    hashes = rank.store(2)
    rank.client.refuse[derived_key(namespace_digest(RANKS[0]), hashes[0])] = [reason]
    assert rank.transfers.load(rank.link, rank.job(hashes)) == {32, 33, 34, 35}
    assert rank.client.calls.count("lease") == 1


def test_a_promise_that_can_not_be_kept_fails_as_a_whole(rank: Rank) -> None:
    job = LoadJob("r", Scope(), [], 0, [32, 33], 8, True)
    assert rank.transfers.load(rank.link, job) == {32, 33}


def test_every_load_is_reported_once_and_failures_not_later(rank: Rank) -> None:
    done = threading.Event()

    def load(job: LoadJob, after: Any, stop: Callable[[], bool]) -> set[int]:
        done.wait(1)
        if job.request == "bad":
            raise ZeroDivisionError
        return set()

    loader = Loader(load)
    loader.submit(LoadJob("good", Scope(), [], 0, [1], 4, True), None)
    loader.submit(LoadJob("bad", Scope(), [], 0, [2, 3], 8, True), None)
    assert loader.take(0.001) == (set(), set())
    done.set()
    finished: set[str] = set()
    failed: set[int] = set()
    deadline = time.monotonic() + 5
    while len(finished) < 2 and time.monotonic() < deadline:
        names, blocks = loader.take(0.01)
        assert not names & finished
        finished |= names
        failed |= blocks
        if "bad" in names:
            assert failed == {2, 3}
    assert finished == {"good", "bad"}
    begun = time.monotonic()
    loader.take(1.0)  # nothing is under way: nothing to wait for
    assert time.monotonic() - begun < 0.1
    loader.close()


# -- the breaker -------------------------------------------------------------------------------------------------------


def _eventually(condition: Callable[[], bool], wait_s: float = 5.0) -> bool:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_one_failure_opens_and_an_answer_closes(rank: Rank) -> None:
    rank.client.error = DeadlineExceeded("hung.")
    assert rank.link.run("load", lambda client: client.lookup_many([], prefix=False)) is None
    assert not rank.breaker.allow()
    calls = len(rank.client.calls)
    for _ in range(100):
        rank.link.run("load", lambda client: client.lookup_many([], prefix=False))
    assert len(rank.client.calls) == calls
    assert rank.tally.peek()["skipped_load"] == 100
    rank.client.error = None
    assert _eventually(rank.breaker.allow)
    assert rank.link.run("load", lambda client: client.lookup_many([], prefix=False)) == []


def test_a_failed_call_is_not_an_outage(rank: Rank) -> None:
    def fail(client: Any) -> None:
        raise ValueError

    assert rank.link.run("save", fail) is None
    assert rank.breaker.allow()
    assert rank.tally.peek()["failed_save"] == 1


def test_errors_that_last_are_tried_rarely(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    breaker = Breaker("test", tally)
    client = FakeClient()
    client.error = VersionMismatch("protocol 2.")
    Link(lambda: client, breaker, tally)
    with caplog.at_level("WARNING", logger="kvstore.connector"):
        assert not breaker.start(0.5)
        time.sleep(0.3)
    assert len([r for r in caplog.records if "continuing without" in r.getMessage()]) == 1
    begun = time.monotonic()
    breaker.close()
    assert time.monotonic() - begun < 1
    assert not breaker.allow()


def test_hooks_never_raise() -> None:
    @shielded(lambda: (0, False))
    def hook() -> tuple[int, bool]:
        raise ZeroDivisionError

    assert hook() == (0, False)


def test_headers_carry_what_a_block_is(rank: Rank) -> None:
    offered: list[tuple[bytes, int, BlockHeader]] = []
    reserve = rank.client.reserve

    def spy(offers: Any, **options: Any) -> Any:
        offered.extend(offers)
        return reserve(offers, **options)

    rank.client.reserve = spy  # type: ignore[method-assign]
    tokens = np.arange(8, dtype="<i4").tobytes()
    block = SaveBlock(hash_of(3), hash_of(1), 8, tokens, [0, 1])
    rank.transfers.save(rank.link, [SaveJob("r", Scope(), [block])])
    digest = namespace_digest(RANKS[0])
    assert offered[0][0] == derived_key(digest, hash_of(3))
    assert offered[0][2] == BlockHeader(parent=derived_key(digest, hash_of(1)), tokens=tokens, position=8)
