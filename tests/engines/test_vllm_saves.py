"""What is stored and when: the same as if every request were looked at in every step."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import BLOCK, ENGINE_BLOCK, hash_of

from kvstore_connectors.vllm.identity import Scope
from kvstore_connectors.vllm.jobs import ConnectorMeta
from kvstore_connectors.vllm.saves import Saves
from kvstore_connectors.vllm.tracked import Tracked

RATIO = BLOCK // ENGINE_BLOCK


class Engine:
    """Requests that are computed in steps of any kind, and what should be stored after each of them."""

    def __init__(self, seed: int, lag: int, exact: int | None) -> None:
        self.rng = random.Random(seed)
        self.lag = lag
        self.exact = exact
        self.tracked: dict[str, Tracked] = {}
        self.saves = Saves(self.tracked, ENGINE_BLOCK, BLOCK, self)  # type: ignore[arg-type]
        self.capturing: set[str] = set()
        self.reached: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.away: set[str] = set()
        self.step = 0

    def exact_tokens(self, name: str) -> int | None:
        return self.exact

    def _add(self) -> str:
        name = f"r{len(self.reached)}"
        request = SimpleNamespace(
            request_id=name, num_computed_tokens=self.rng.randrange(0, 20), prompt=self.rng.randrange(20, 60),
            all_token_ids=list(range(400)), block_hashes=[],
        )  # fmt: skip
        self.tracked[name] = Tracked(request, Scope())
        return name

    def _roll_back(self, name: str) -> None:
        request = self.tracked[name].request
        request.num_computed_tokens = self.rng.randrange(request.num_computed_tokens + 1)

    def run(self, hold: bool) -> tuple[Any, list[tuple[str, int]]]:
        """A step: what it plans, and what is to be stored."""
        rng, self.step = self.rng, self.step + 1
        new = [self._add()] if len(self.reached) < 6 and rng.random() < 0.3 else []
        resumed = {name for name in self.away if rng.random() < 0.3}
        running = [name for name in self.tracked if name not in self.away and name not in new]
        if running and rng.random() < 0.05:  # a load failed
            self._roll_back(rng.choice(running))
            self.saves.look_at_all()
        if running and rng.random() < 0.05:
            self.away.add(running.pop(rng.randrange(len(running))))
        for name in resumed:
            self._roll_back(name)
        self.away -= resumed
        scheduled = {}
        for name in [*running, *resumed, *new]:
            request = self.tracked[name].request
            left = request.prompt - request.num_computed_tokens
            if rng.random() < 0.9:
                scheduled[name] = rng.randint(1, left) if left > 0 else 1
            elif name not in running:
                scheduled[name] = 1
        expected = [one for name, count in scheduled.items() for one in self._full(name, count, hold)]
        for name, count in scheduled.items():
            self.reached[name] = self.tracked[name].request.num_computed_tokens + count
        output = SimpleNamespace(
            scheduled_new_reqs=[_new(name) for name in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[*running, *resumed], resumed_req_ids=resumed,
                new_block_ids=[None] * len(running) + [(list(range(100)),)] * len(resumed),
            ),
            num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values()),
        )  # fmt: skip
        meta = ConnectorMeta(step=self.step)
        self.saves.follow(output)
        self.saves.plan(meta, output, hold=hold)
        for name, count in scheduled.items():
            self.tracked[name].request.num_computed_tokens += count
        return meta, expected

    def _full(self, name: str, count: int, hold: bool) -> list[tuple[str, int]]:
        """Blocks of a request that are full after this step and were not before, or are computed again."""
        request = self.tracked[name].request
        known = max(request.prompt, request.num_computed_tokens + count) - self.lag
        request.block_hashes = [hash_of(i) for i in range(max(known, 0) // ENGINE_BLOCK)]
        begin = request.num_computed_tokens
        saved = self.saved.get(name, begin // BLOCK)
        if begin < self.reached.get(name, 0):
            saved = min(saved, begin // BLOCK)
        end = min(begin + count, len(request.block_hashes) * ENGINE_BLOCK, 10**9 if self.exact is None else self.exact)
        self.saved[name] = saved if hold else max(saved, end // BLOCK)
        if hold:
            return []
        return [(name, index) for index in range(saved, end // BLOCK)]


def _new(name: str) -> Any:
    return SimpleNamespace(req_id=name, block_ids=(list(range(100)),), num_computed_tokens=0)


@pytest.mark.parametrize("seed", range(40))
def test_as_if_all_were_looked_at_in_every_step(seed: int) -> None:
    engine = Engine(seed, lag=seed % 3, exact=24 if seed % 5 == 0 else None)
    total = 0
    for _ in range(150):
        meta, expected = engine.run(hold=engine.rng.random() < 0.2)
        planned = [(job.request, block.position // BLOCK) for job in meta.saves for block in job.blocks]
        assert sorted(planned) == sorted(expected)
        total += len(planned)
    assert total > 10
