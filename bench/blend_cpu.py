"""What a prompt of chunks costs on the processor before the first kernel: each step of the way, without an engine.

Chunks of 512 random tokens are stored behind a system prompt in a daemon of its own; their KV is small, since only the
steps around it are measured. Then prompts of all of them, in an order of their own, go through what the scheduler and a
worker do: the wish is read and the search sent, the daemon answers, spans are chosen and names replaced, the job is
made, headers are read, bytes are leased, `trail` chooses. Milliseconds of this process's own processor time, and by the
clock; medians.

    python bench/blend_cpu.py --out bench/results/blend_cpu.json
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import arguments, finish, running_daemon, touched

from kvstore.client import KVStoreClient, Room, chunk_keys, chunk_parts
from kvstore.types import Namespace
from kvstore_connectors.base import Breaker, Link, Tally
from kvstore_connectors.blend.prompt import Capture, Prompt, Span
from kvstore_connectors.blend.selectors.trail import Trail
from kvstore_connectors.chunk_loads import Wanted, describe
from kvstore_connectors.vllm.blend_scheduler import Blends
from kvstore_connectors.vllm.blend_search import Searches
from kvstore_connectors.vllm.blend_wish import Wish
from kvstore_connectors.vllm.identity import Scope

CHUNK, SYSTEM, QUESTION, VOCABULARY = 512, 64, 64, 128_256
ENGINE_BLOCK, BLOCK, TOKEN_BYTES = 16, 256, 16
RANK = Namespace(model="bench", block_tokens=BLOCK)


class OpenGate:
    """A verdict that has passed."""

    def why_closed(self, namespace: Namespace, share: float) -> str:
        return ""


class Clock:
    """Milliseconds of each step: of this thread's processor time, and by the clock."""

    def __init__(self) -> None:
        self.used: dict[str, list[float]] = {}
        self.passed: dict[str, list[float]] = {}

    def take(self, name: str, step: Callable[[], Any]) -> Any:
        """Do a step and note what it took."""
        used, begun = time.thread_time(), time.perf_counter()
        answer = step()
        self.passed.setdefault(name, []).append(1e3 * (time.perf_counter() - begun))
        self.used.setdefault(name, []).append(1e3 * (time.thread_time() - used))
        return answer


def store(client: KVStoreClient, system: list[int], chunk: list[int]) -> None:
    """Store a chunk as it is captured behind the system prompt."""
    parts = chunk_parts(RANK, chunk, before=system)
    offers = [(part.key, (part.stop - part.start) * TOKEN_BYTES, part.header) for part in parts]
    with client.reserve(offers, namespace=RANK) as reservation:
        rooms = [room for room in reservation.blocks if isinstance(room, Room)]
        for room in rooms:
            room.write(np.zeros(room.nbytes, np.uint8))
        reservation.commit([room.index for room in rooms])


def through(clock: Clock, blends: Blends, client: KVStoreClient, name: str, tokens: list[int], chunks: int) -> None:
    """One prompt, from its arrival to the choice of its tokens."""
    hashes = [hashlib.sha256(f"{name}/{at}".encode()).digest() for at in range(len(tokens) // ENGINE_BLOCK)]
    params = {"kvstore": {"blend": True, "selector": "trail"}}
    request = SimpleNamespace(
        request_id=name, prompt_token_ids=tokens, kv_transfer_params=params, block_hashes=hashes, num_tokens=len(tokens)
    )
    clock.take("arrival", lambda: blends.arrived(request, Scope()))
    search = blends.waits(name)
    if search is not None:
        clock.take("waiting for the search", lambda: blends.wait(search, 10.0))
    promised = clock.take("promise, names replaced", lambda: blends.promise(request, SYSTEM, SYSTEM))
    blends.allocated(name, promised)
    table = list(range(-(-len(tokens) // ENGINE_BLOCK)))
    job = clock.take("job", lambda: blends.job(name, SYSTEM, table, hashes, set()))
    if job is None or len(job.spans) != chunks:
        raise SystemExit("not all chunks were found")
    wanted = [Wanted(one.start, one.stop, one.offset, next(iter(one.keys.values())), one.exact) for one in job.spans]
    told = clock.take("headers", lambda: describe(client, RANK, wanted, job.tokens, 10.0, Tally()))
    if told is None:
        raise SystemExit("a header was not to be had")
    keys = clock.take("keys", lambda: [key for one in told for key in chunk_keys(one.wanted.key, one.info)])
    with clock.take("lease", lambda: client.lease(keys, namespace=RANK, ttl_s=30.0, wait_s=10.0)) as lease:
        clock.take("still valid", lease.valid)
    ids = torch.from_numpy(np.frombuffer(job.tokens, dtype="<i4").astype(np.int64))
    prompt = Prompt(ids, tuple(Span(one.start, one.stop, Capture.SYSTEM) for one in job.spans), exact=job.exact)
    work: Any = SimpleNamespace(prompt=prompt, notes={})
    clock.take("trail", lambda: list(Trail().scores(work)))
    blends.forget(name)


def measure(address: str, counts: list[int], rounds: int) -> dict[str, Any]:
    """All steps, for prompts of so many chunks each."""
    rng = np.random.default_rng(5)
    system, *chunks = (rng.integers(0, VOCABULARY, n).tolist() for n in (SYSTEM, *[CHUNK] * max(counts)))
    client = KVStoreClient(address)
    for chunk in chunks:
        store(client, system, chunk)
    tally = Tally()
    breaker = Breaker("bench", tally)
    searches = Searches(Link(lambda: KVStoreClient(address), breaker, tally), tally, 10.0)
    blends = Blends(searches, tally, ENGINE_BLOCK, BLOCK, Wish(), OpenGate(), lambda blend, tokens: True)  # type: ignore[arg-type]
    blends.know_ranks([RANK])
    breaker.start(10.0)
    results = {}
    for count in counts:
        clock = Clock()
        for at in range(rounds + 1):
            order = rng.permutation(count).tolist()
            tokens = [
                *system,
                *(one for i in order for one in chunks[i]),
                *rng.integers(0, VOCABULARY, QUESTION).tolist(),
            ]
            if at == 1:
                clock = Clock()  # the first one warms up
            through(clock, blends, client, f"{count}/{at}", tokens, count)
        results[str(count * CHUNK + SYSTEM + QUESTION)] = {
            name: {"processor_ms": round(median(used), 3), "clock_ms": round(median(clock.passed[name]), 3)}
            for name, used in clock.used.items()
        }
    blends.close()
    breaker.close()
    client.close()
    return results


def main() -> None:
    """Measure, print and save."""
    parser = arguments(__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[31, 63], help="chunks of 512 tokens in a prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    touched(30 << 20)  # an engine has let go of much memory: malloc no longer gives each temporary back to the kernel
    with running_daemon() as address:
        results = measure(address, options.chunks, options.rounds)
    rows = [
        [tokens, name, f"{one['processor_ms']:.2f}", f"{one['clock_ms']:.2f}"]
        for tokens, steps in results.items()
        for name, one in steps.items()
    ]
    finish(options, "blend_cpu", results, ["tokens", "step", "processor, ms", "clock, ms"], rows)


if __name__ == "__main__":
    main()
