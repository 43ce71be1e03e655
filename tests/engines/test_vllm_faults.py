"""A daemon that is absent, hung, killed or restarted: the engine goes on, with the same tokens, and hardly waits."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import Daemon, Engine, engine, numbers

from kvstore.errors import ConfigError
from kvstore_connectors.vllm.pages import HostPages
from kvstore_connectors.vllm.transfers import Transfers

PROMPT = 700
ONCE_S = 0.25
"""What an outage may cost the worst request."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that is not running yet."""
    made = Daemon(tmp_path_factory.mktemp("faults"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def vllm(own: Daemon, tiny: Path) -> Iterator[Engine]:
    """An engine that was started while there was no daemon."""
    with engine(tiny, own.address, {"block_tokens": 64}) as made:
        yield made


@pytest.fixture(scope="module")
def truth(vllm: Engine) -> list[list[int]]:
    """Tokens computed without any daemon."""
    assert not vllm.scheduler_connector._breaker.allow()
    return [vllm.ask(numbers(PROMPT, seed))[0].tokens for seed in range(8)]


@pytest.fixture
def running(own: Daemon, vllm: Engine, truth: Any) -> Iterator[Daemon]:
    """The daemon, running and known to the engine; ended after the test."""
    if own.process is None:
        own.start()
    assert vllm.connected(), "the engine did not meet the daemon"
    yield own
    own.kill()


def usual_seconds(vllm: Engine, seed: int) -> float:
    """Time of a request that computes everything, as it is on this machine now."""
    times = sorted(vllm.ask(numbers(PROMPT, seed))[0].seconds for _ in range(5))
    return times[-1]


def test_absent_at_start_then_met(own: Daemon, vllm: Engine, truth: list[list[int]]) -> None:
    before = vllm.metrics()
    assert vllm.ask(numbers(PROMPT))[0].cached == 0
    assert vllm.metrics()["kvstore_saved_blocks"] == before["kvstore_saved_blocks"] == 0
    own.start()
    assert vllm.connected()
    assert vllm.ask(numbers(PROMPT))[0].tokens == truth[0]
    warm = vllm.ask(numbers(PROMPT))[0]
    assert (warm.cached, warm.tokens) == (640, truth[0])
    own.kill()


def test_killed_and_restarted(running: Daemon, vllm: Engine, truth: list[list[int]]) -> None:
    vllm.ask(numbers(PROMPT, 1))
    running.kill()
    gone = vllm.ask(numbers(PROMPT, 1))[0]
    assert (gone.cached, gone.tokens) == (0, truth[1])
    running.start()
    assert vllm.connected()
    empty = vllm.ask(numbers(PROMPT, 1))[0]  # it had no disk
    assert (empty.cached, empty.tokens) == (0, truth[1])
    assert vllm.ask(numbers(PROMPT, 1))[0].cached == 640


def test_restarted_between_two_requests(running: Daemon, vllm: Engine, truth: list[list[int]]) -> None:
    """Nobody noticed the outage: the first call finds another daemon at the old place."""
    vllm.ask(numbers(PROMPT, 2))
    running.kill()
    running.start()
    anew = vllm.ask(numbers(PROMPT, 2))[0]
    assert (anew.cached, anew.tokens) == (0, truth[2])
    assert vllm.connected()
    vllm.ask(numbers(PROMPT, 2))
    assert vllm.ask(numbers(PROMPT, 2))[0].cached == 640


def test_hung_daemon_costs_one_deadline(running: Daemon, vllm: Engine, truth: list[list[int]]) -> None:
    usual = usual_seconds(vllm, 3)
    running.send(signal.SIGSTOP)
    try:
        first = vllm.ask(numbers(PROMPT, 4))[0]
        later = [vllm.ask(numbers(PROMPT, 4))[0] for _ in range(3)]
    finally:
        running.send(signal.SIGCONT)
    assert first.tokens == truth[4]
    assert all(answer.tokens == truth[4] for answer in later)
    assert first.seconds < usual + ONCE_S + 0.1, (first.seconds, usual)
    assert min(answer.seconds for answer in later) < usual + 0.05
    assert vllm.connected(), "the engine did not come back"
    assert vllm.ask(numbers(PROMPT, 4))[0].tokens == truth[4]
    assert vllm.ask(numbers(PROMPT, 4))[0].cached == 640


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_struck_between_lookup_and_load(
    running: Daemon, vllm: Engine, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    usual = usual_seconds(vllm, 3)
    assert vllm.ask(numbers(PROMPT, 5))[0].tokens == truth[5]
    load = Transfers.load

    def strike(self: Transfers, *args: Any, **kwargs: Any) -> set[int]:
        running.send(blow)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(Transfers, "load", strike)
    struck = vllm.ask(numbers(PROMPT, 5))[0]
    assert struck.tokens == truth[5]
    assert struck.seconds < usual + ONCE_S + 0.15, (struck.seconds, usual)


def test_struck_while_bytes_are_copied(
    running: Daemon, vllm: Engine, truth: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory stays mapped, so nothing crashes; but the lease is gone, so nothing of it is used."""
    vllm.ask(numbers(PROMPT, 6))
    copy_in = HostPages.load

    def strike(self: HostPages, *args: Any, **kwargs: Any) -> None:
        running.send(signal.SIGKILL)
        time.sleep(0.05)
        copy_in(self, *args, **kwargs)

    before = vllm.metrics()
    monkeypatch.setattr(HostPages, "load", strike)
    assert vllm.ask(numbers(PROMPT, 6))[0].tokens == truth[6]
    after = vllm.metrics()
    assert after["kvstore_recomputed_tokens"] - before["kvstore_recomputed_tokens"] == 640


def test_struck_at_random(own: Daemon, vllm: Engine, truth: list[list[int]]) -> None:
    """Kills, stops and restarts from another thread while requests run: the tokens never change."""
    dice, ending = random.Random(7), threading.Event()

    def torment() -> None:
        while not ending.is_set():
            if own.process is None:
                own.start()
            ending.wait(dice.uniform(0.1, 0.6))
            if dice.random() < 0.5:
                own.kill()
            else:
                own.send(signal.SIGSTOP)
                ending.wait(dice.uniform(0.05, 0.4))
                own.send(signal.SIGCONT)

    tormentor = threading.Thread(target=torment)
    tormentor.start()
    try:
        deadline = time.monotonic() + 12
        while time.monotonic() < deadline:
            seeds = dice.sample(range(8), 3)
            answers = vllm.ask(*[numbers(PROMPT, seed) for seed in seeds])
            assert [answer.tokens for answer in answers] == [truth[seed] for seed in seeds]
    finally:
        ending.set()
        tormentor.join()
    own.kill()


def test_outages_are_counted_and_told_once(running: Daemon, vllm: Engine, caplog: pytest.LogCaptureFixture) -> None:
    before = vllm.metrics()["kvstore_outages"]
    with caplog.at_level("WARNING", logger="kvstore.connector"):
        running.kill()
        for _ in range(3):
            vllm.ask(numbers(PROMPT, 7))
    told = [record.getMessage() for record in caplog.records if "continuing without kvstore" in record.getMessage()]
    assert len(told) <= 2  # the scheduler's side and the worker's
    assert told
    assert 1 <= vllm.metrics()["kvstore_outages"] - before <= 2


def test_what_does_not_fit_is_refused_at_start(vllm: Engine, own: Daemon, tiny: Path) -> None:
    """The last test of this module: it ends its engine, since engines do not run side by side."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    vllm.close()
    vllm.close = lambda: None  # type: ignore[method-assign]
    try:
        with pytest.raises(ConfigError, match="--prefix-caching-hash-algo sha256_cbor"):
            Engine(tiny, own.address, prefix_caching_hash_algo="xxhash")
    finally:
        cleanup_dist_env_and_memory()
