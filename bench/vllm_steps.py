"""What a decode step of many requests costs in the connector, and what a block costs the thread that stores it.

Three measurements, in microseconds:

- the scheduler's side alone, over vLLM's own requests and scheduler outputs: 64 requests of 512 tokens that generate;
- the thread that stores from a device, over a daemon of its own, with pages that cost nothing: its processor time a
  block, all of which it may take from the engine's thread, since both need the interpreter;
- with ``--engine`` both sides in a real vLLM on the CPU with a tiny model: time inside the connector's hooks.

    python bench/vllm_steps.py --engine --out bench/results/vllm_steps.json
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1] / "tests" / "engines"))

from common import arguments, finish, running_daemon  # noqa: E402
from kit import numbers, set_environment  # noqa: E402

REQUESTS, PROMPT, GENERATED = 64, 512, 520
ENGINE_BLOCK, BLOCK, CHUNK = 16, 256, 8192
BLOCK_BYTES = 1 << 20
HOOKS = {
    "scheduler": "build_connector_meta update_connector_output get_kv_connector_stats",
    "worker": (
        "bind_connector_metadata start_load_kv wait_for_layer_load save_kv_layer wait_for_save get_finished "
        "get_block_ids_with_load_errors get_kv_connector_stats build_connector_worker_meta clear_connector_metadata"
    ),
}


# -- the scheduler's side ----------------------------------------------------------------------------------------------


class Steps:
    """As much of vLLM's scheduler as the connector sees: prompts in chunks, then a token a step each."""

    def __init__(self) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256_cbor)
        hasher = get_request_block_hasher(ENGINE_BLOCK, sha256_cbor)
        sampling = SamplingParams(max_tokens=GENERATED)
        self.requests = {
            f"cmpl-{i:032x}-0": Request(f"cmpl-{i:032x}-0", numbers(PROMPT, i), sampling, None, block_hasher=hasher)
            for i in range(REQUESTS)
        }
        self._tables: dict[str, list[int]] = {name: [] for name in self.requests}
        self._next = 0

    def prompts(self) -> Any:
        """The steps that compute the prompts."""
        names = list(self.requests)
        for at in range(0, REQUESTS, CHUNK // PROMPT):
            yield self._output(dict.fromkeys(names[at : at + CHUNK // PROMPT], PROMPT), new=True)

    def generate(self) -> Any:
        """One step after the other of one token each."""
        for _ in range(GENERATED):
            yield self._output(dict.fromkeys(self.requests, 1), new=False)

    def _output(self, scheduled: dict[str, int], new: bool) -> Any:
        from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, NewRequestData, SchedulerOutput

        grown: dict[str, list[int]] = {}
        for name, count in scheduled.items():
            need = -(-(self.requests[name].num_computed_tokens + count) // ENGINE_BLOCK) - len(self._tables[name])
            grown[name] = list(range(self._next, self._next + need))
            self._next += need
            self._tables[name] += grown[name]
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = scheduled
        output.total_num_scheduled_tokens = sum(scheduled.values())
        if new:
            output.scheduled_new_reqs = [
                NewRequestData.from_request(self.requests[name], (list(grown[name]),)) for name in scheduled
            ]
        else:
            cached = CachedRequestData.make_empty()
            cached.req_ids = list(scheduled)
            cached.new_block_ids = [(grown[name],) if grown[name] else None for name in scheduled]
            output.scheduled_cached_reqs = cached
        output.kv_connector_block_state = KVConnectorBlockState(set(scheduled), lambda name: (self._tables[name],), {})
        return output

    def ended(self, output: Any) -> None:
        """A step's tokens are there."""
        for name, count in output.num_scheduled_tokens.items():
            request = self.requests[name]
            request.num_computed_tokens += count
            request.append_output_token_ids(7)


def scheduler() -> dict[str, float]:
    """Microseconds a step in the scheduler's side."""
    from kvstore.types import Namespace
    from kvstore_connectors.base import Breaker, Link, Tally
    from kvstore_connectors.vllm.blend_scheduler import Blends
    from kvstore_connectors.vllm.blend_search import Searches
    from kvstore_connectors.vllm.blend_wish import Wish
    from kvstore_connectors.vllm.decisions import Decisions
    from kvstore_connectors.vllm.lookups import Lookups
    from kvstore_connectors.vllm.scheduler import SchedulerSide

    tally = Tally()
    breaker = Breaker("bench", tally)
    lookups, searches = (
        kind(Link(lambda: None, breaker, tally), tally, 0.02) for kind in (Lookups, Searches)
    )  # fmt: skip
    blends = Blends(searches, tally, ENGINE_BLOCK, BLOCK, Wish(), None, lambda blend, tokens: True)
    side = SchedulerSide(lookups, tally, ENGINE_BLOCK, BLOCK, Decisions(tally, BLOCK, CHUNK), blends=blends)
    side.know_ranks([Namespace(model="bench", block_tokens=BLOCK)], BLOCK_BYTES)
    steps = Steps()
    for request in steps.requests.values():
        side.arrived(request)
        side.matched(request, 0)
    without, storing, blocks = [], [], 0

    def planned(output: Any) -> tuple[float, int]:
        begun = time.perf_counter()
        meta = side.plan(output)
        side.ended(None, ())
        took = time.perf_counter() - begun
        steps.ended(output)
        return 1e6 * took, sum(len(job.blocks) for job in meta.saves)

    prompts = [planned(output) for output in steps.prompts()]
    for took, stored in map(planned, steps.generate()):
        (storing if stored else without).append(took)
        blocks += stored
    if blocks + sum(stored for _, stored in prompts) != REQUESTS * ((PROMPT + GENERATED) // BLOCK):
        raise SystemExit("not every full block was to be stored")
    for one in (lookups, searches, breaker):
        one.close()
    return {
        "requests": REQUESTS,
        "step_us": round(median(without), 1),
        "step_mean_us": round(mean(without + storing), 1),
        "block_us": round((sum(storing) - len(storing) * median(without)) / blocks, 1),
    }


# -- the thread that stores --------------------------------------------------------------------------------------------


class Pages:
    """Pages on a device that cost nothing."""

    per_block = BLOCK // ENGINE_BLOCK

    def mark(self) -> Any:
        return None

    def reach(self, piece: Any) -> Any:
        return piece

    def take(self, parts: Any, after: Any) -> Any:
        good = [True] * len(parts)
        return SimpleNamespace(taken=None, wait=lambda: good)

    def seal(self, room: Any, position: int) -> None:
        pass

    def hold(self, event: Any) -> None:
        pass

    def stored_nbytes(self, position: int) -> int:
        return BLOCK_BYTES


def store(address: str) -> dict[str, float]:
    """Microseconds of processor time a block in the thread that stores, and in the one that hands over."""
    from kvstore.client import KVStoreClient
    from kvstore.types import Namespace
    from kvstore_connectors.base import Breaker, Link, Tally
    from kvstore_connectors.vllm.identity import Scope
    from kvstore_connectors.vllm.jobs import SaveBlock, SaveJob
    from kvstore_connectors.vllm.saver import Saver
    from kvstore_connectors.vllm.transfers import Transfers

    pages: Any = Pages()
    tally = Tally()
    breaker = Breaker("bench", tally)
    link = Link(lambda: KVStoreClient(address), breaker, tally)
    namespace = Namespace(model="bench", block_tokens=BLOCK)
    transfers = Transfers(pages, namespace, tally, 1.0)

    def stores(scope: Any, blocks: Any, fill: Any) -> None:
        transfers.store(link, namespace, blocks, fill)

    saver = Saver(pages, stores, tally)
    breaker.start(5.0)
    rng = np.random.default_rng(0)
    handed, thread_before = 0.0, _thread_seconds("kvstore-save")
    rounds, a_job = 6, 2
    for round_ in range(rounds):
        jobs = [
            SaveJob(f"r{i}", Scope(), [
                SaveBlock(rng.bytes(32), rng.bytes(32), k * BLOCK, bytes(4 * BLOCK), list(range(16 * k, 16 * k + 16)))
                for k in range(a_job)
            ]) for i in range(REQUESTS)
        ]  # fmt: skip
        for at in range(0, REQUESTS, CHUNK // PROMPT):  # the jobs of one step
            begun = time.perf_counter()
            saver.submit(jobs[at : at + CHUNK // PROMPT])
            handed += time.perf_counter() - begun
        wanted = (round_ + 1) * REQUESTS * a_job
        deadline = time.monotonic() + 20
        while sum(tally.peek().get(name, 0) for name in ("saved_blocks", "save_dropped")) < wanted:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                raise SystemExit(f"not all was stored: {tally.peek()}")
    blocks = rounds * REQUESTS * a_job
    spent = _thread_seconds("kvstore-save") - thread_before
    saver.close()
    breaker.close()
    return {"blocks": blocks, "thread_us_a_block": round(1e6 * spent / blocks, 1),
            "handing_over_us_a_job": round(1e6 * handed / (blocks / a_job), 1)}  # fmt: skip


def _thread_seconds(name: str) -> float:
    """Processor time of one of our threads."""
    number = next(one.native_id for one in threading.enumerate() if one.name == name)
    return int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]) / 1e9


# -- a real engine -----------------------------------------------------------------------------------------------------


class Clock:
    """Time inside hooks, by step."""

    def __init__(self) -> None:
        self.seconds = {"scheduler": 0.0, "worker": 0.0}
        self.steps: list[tuple[dict[str, float], int]] = []

    def watch(self, connector: Any, role: str) -> None:
        """Count the calls of these hooks."""
        for name in HOOKS[role].split():
            setattr(connector, name, self._timed(getattr(connector, name), role, name))

    def _timed(self, hook: Any, role: str, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            answer = hook(*args, **kwargs)
            self.seconds[role] += time.perf_counter() - begun
            if name == "build_connector_meta":
                self._stored = sum(len(job.blocks) for job in answer.saves)
            if role == "scheduler" and name == "get_kv_connector_stats":  # the last of a step
                self.steps.append((self.seconds, self._stored))
                self.seconds = {"scheduler": 0.0, "worker": 0.0}
            return answer

        return call

    _stored = 0


def engine(folder: Path) -> dict[str, float]:
    """Microseconds a step inside the connector, in a real vLLM."""
    from kit import Daemon, Engine
    from model import tiny_llama

    daemon = Daemon(folder, host_bytes="1GiB")
    daemon.start()
    vllm = Engine(tiny_llama(), daemon.address, max_num_seqs=REQUESTS, max_model_len=512, max_num_batched_tokens=2048)
    try:
        vllm.ask(numbers(300, 999_983), max_tokens=2)
        clock = Clock()
        clock.watch(vllm.scheduler_connector, "scheduler")
        clock.watch(vllm.worker_connector, "worker")
        vllm.ask(*(numbers(100, i) for i in range(REQUESTS)), max_tokens=120)
    finally:
        vllm.close()
        daemon.kill()
    quiet = [seconds for seconds, stored in clock.steps[8:] if not stored]
    return {f"{role}_step_us": round(1e6 * median(one[role] for one in quiet), 1) for role in HOOKS}


def main() -> None:
    """Measure, print and save."""
    parser = arguments(__doc__)
    parser.add_argument("--engine", action="store_true", help="with a real engine, too")
    options = parser.parse_args()
    set_environment()
    os.environ.setdefault("PYTHONHASHSEED", "0")
    results: dict[str, Any] = {"scheduler": scheduler()}
    with running_daemon({"host.bytes": "1GiB"}) as address:
        results["store"] = store(address)
    if options.engine:
        with tempfile.TemporaryDirectory(prefix="kvstore-steps-") as folder:
            results["engine"] = engine(Path(folder))
    rows = [[part, name, value] for part, found in results.items() for name, value in found.items()]
    finish(options, "vllm_steps", results, ["part", "figure", "value"], rows)


if __name__ == "__main__":
    main()
