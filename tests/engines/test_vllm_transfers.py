"""Loads and saves of a worker without an engine, and the breaker in front of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import BLOCK, ENGINE_BLOCK, RANKS, FakeClient, eventually, hash_of
from kit import Daemon

from kvstore.client import KVStoreClient
from kvstore.errors import DeadlineExceeded, VersionMismatch
from kvstore.keys import derived_key, namespace_digest
from kvstore.types import BlockHeader, Miss, MissReason, Namespace, TierCode
from kvstore_connectors.base import Breaker, Link, Tally, is_final, shielded
from kvstore_connectors.vllm import transfers
from kvstore_connectors.vllm.identity import Scope
from kvstore_connectors.vllm.jobs import LoadJob, SaveBlock, SaveJob
from kvstore_connectors.vllm.layout import PageViews
from kvstore_connectors.vllm.loader import Loader
from kvstore_connectors.vllm.pages import HostPages
from kvstore_connectors.vllm.transfers import Transfers

# -- loads and saves --------------------------------------------------------------------------------------------------


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


def test_the_first_lease_is_short_so_that_copying_begins(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    lease = rank.client.lease
    monkeypatch.setattr(transfers, "LEASE_BLOCKS", 2)
    monkeypatch.setattr(rank.client, "lease", lambda keys, **rest: asked.append(len(keys)) or lease(keys, **rest))
    assert rank.transfers.load(rank.link, rank.job(rank.store(7))) == set()
    assert asked == [2, 5]


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


def test_a_load_that_is_larger_than_memory_comes_in_parts(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, free = rank.store(7), 3
    lease = rank.client.lease

    class Pinned(SimpleNamespace):
        """A lease of as many blocks as there is room for."""

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            nonlocal free
            free += self.took

    def leased(keys: Any, **options: Any) -> Any:
        nonlocal free
        blocks = lease(keys, **options).blocks
        took = min(free, len(blocks))
        free -= took
        return Pinned(
            blocks=blocks[:took] + [Miss(MissReason.NO_SPACE)] * (len(blocks) - took), valid=lambda: True, took=took
        )

    monkeypatch.setattr(rank.client, "lease", leased)
    assert rank.transfers.load(rank.link, rank.job(hashes)) == set()
    assert rank.same(range(14), range(32, 46))
    assert "load_missing" not in rank.tally.peek()
    free = 0  # somebody else has it
    assert rank.transfers.load(rank.link, rank.job(hashes)) == set(range(32, 46))
    assert rank.tally.peek()["load_missing"] == 1


def saved(tally: Tally) -> float:
    return tally.peek().get("saved_blocks", 0)


def test_ten_mebibytes_come_from_disk_through_four(tmp_path: Path) -> None:
    count, tally = 20, Tally()
    breaker = Breaker("test", tally)
    daemon = Daemon(tmp_path, disk=True, host_bytes="4MiB")
    daemon.start()
    link = Link(lambda: KVStoreClient(daemon.address, name="test"), breaker, tally)
    assert breaker.start(5.0)
    caches = [torch.randn(2, 2 * count, 64, 4, 128).bfloat16() for _ in range(4)]
    pages = HostPages([PageViews("lkthd1", (cache[0], cache[1])) for cache in caches], 64, 64, 64)
    namespace = Namespace(model="m", dtype="bfloat16", layers=4, kv_heads=4, head_dim=128, block_tokens=64)
    moves = Transfers(pages, namespace, tally, 20.0)
    try:
        for index in range(count):
            one = SaveJob("r", Scope(), [SaveBlock(hash_of(index), b"", index * 64, b"", [index])])
            # Until the disk has taken some of those before.
            assert eventually(lambda one=one, index=index: not moves.save(link, [one]) and saved(tally) > index)
        there = list(range(count, 2 * count))
        job = LoadJob("r", Scope(), [hash_of(i) for i in range(count)], 0, there, count * 64, True)
        assert moves.load(link, job) == set()
    finally:
        breaker.close()
        daemon.stop()
    assert all(torch.equal(cache[:, :count], cache[:, count:]) for cache in caches)


def slow_from(rank: Rank, hashes: list[bytes], first: int, block_s: float) -> LoadJob:
    """A load whose blocks come from a disk that never brings those from `first` on, and takes that long for each."""
    digest = namespace_digest(RANKS[0])
    for one in hashes[first:]:
        key = derived_key(digest, one)
        rank.client.tiers[digest, key] = TierCode.DISK
        rank.client.refuse[key] = [MissReason.DEADLINE] * 1_000_000
    rank.client.speeds = {TierCode.DISK: (0.0, block_s / 2, block_s / 2 / rank.pages.nbytes)}
    job = rank.job(hashes)
    job.saves_s = tuple(float(len(hashes) - i) for i in range(len(hashes)))
    return job


def test_a_load_is_given_up_at_once_when_computing_the_rest_is_sooner(rank: Rank) -> None:
    """A block saves one second of computing."""
    hashes = rank.store(4)
    job = slow_from(rank, hashes, 2, 1.1)
    assert rank.transfers.load(rank.link, job) == {36, 37, 38, 39}
    assert rank.same(range(4), range(32, 36)), "what had come is kept"
    assert rank.client.calls.count("lease") == 1
    assert rank.tally.peek()["load_given_up"] == 1
    assert rank.tally.peek()["loaded_blocks"] == 2


def test_a_load_that_is_still_sooner_goes_on(rank: Rank) -> None:
    job = slow_from(rank, rank.store(4), 2, 0.9)
    begun = time.monotonic()
    assert rank.transfers.load(rank.link, job) == {36, 37, 38, 39}
    assert time.monotonic() - begun > 0.4, "until the deadline of all loads"


def test_ranks_that_load_at_the_same_time_share_a_disk(rank: Rank) -> None:
    job = slow_from(rank, rank.store(4), 0, 0.9)
    job.ranks = 2
    assert rank.transfers.load(rank.link, job) == set(range(32, 40))
    assert rank.client.calls.count("lease") == 1


def test_a_load_is_over_when_the_daemon_is_gone_while_it_is_waited_for(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = rank.store(4)
    job = slow_from(rank, hashes, 2, 0.1)

    def gone(queries: Any, *, prefix: bool) -> Any:
        raise DeadlineExceeded("hung.")

    monkeypatch.setattr(rank.client, "lookup_many", gone)
    rank.client.error = None
    released: list[bool] = []
    lease = rank.client.lease

    def leased(*args: Any, **options: Any) -> Any:
        made = lease(*args, **options)
        made.release = lambda: released.append(True)
        return made

    monkeypatch.setattr(rank.client, "lease", leased)
    assert rank.transfers.load(rank.link, job) == set(range(32, 40)), "nothing may land in what was reported as failed"
    assert released == [True]


def test_full_memory_ends_a_load_only_if_others_have_it() -> None:
    assert not is_final(None, held=False)
    assert not is_final(MissReason.DEADLINE, held=False)
    for reason in set(MissReason) - {MissReason.DEADLINE}:
        assert is_final(reason, held=False)
        assert is_final(reason, held=True) == (reason is not MissReason.NO_SPACE)


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
    assert eventually(rank.breaker.allow)
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
