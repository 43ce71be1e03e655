"""What a blended prompt costs the host before and while the device computes, without a device.

Prompts are as those of ``gpu_blend.py``: chunks of 512 tokens of text behind a system prompt, then a question. Two
parts, in milliseconds by the clock and of processor time, medians of rounds:

- ask: a real daemon, with a block of 256 tokens for each half of a chunk, is asked which spans are chunks, and for
  their memory; its own processor time stands beside it;
- copies: what asking a device for the copies takes, all layers together, calls of CUDA replaced by ones that do
  nothing (`gpu_host.py`).

    .venv-vllm/bin/python bench/blend_host.py --out bench/results/blend_host.json
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engines"))

from common import ROOT, arguments, cpu_seconds, finish, pid_of, running_daemon
from gpu_blend import CHUNK, QUESTION, SYSTEM, words
from gpu_host import Moment, no_device
from gpu_vllm import prompt as random_tokens

LAYERS, HEADS, DIM, BLOCK = 32, 1, 128, 256
"""Fewer heads than a model has: the host's part knows nothing of them, and the daemon's memory stays small."""

LENGTHS = (31, 63)
"""Chunks of a prompt."""

KINDS = ("ms", "processor_ms", "daemon_ms")


class Prompts:
    """Prompts of so many chunks, each of another order and question."""

    def __init__(self, chunks: int) -> None:
        text = words([ROOT / "docs", ROOT / "kvstore"], (chunks + 16) * CHUNK)
        self.system = random_tokens(SYSTEM, 1)
        self.chunks = [text[i * CHUNK :][:CHUNK] for i in range(chunks)]
        self._rest = text[chunks * CHUNK :]
        self.spans = [(SYSTEM + i * CHUNK, SYSTEM + (i + 1) * CHUNK) for i in range(chunks)]

    def ids(self, number: int) -> np.ndarray:
        """Token ids of one of them."""
        order = random.Random(number).sample(self.chunks, len(self.chunks))
        question = self._rest[number % 16 * CHUNK :][:QUESTION]
        return np.array([*self.system, *(token for chunk in order for token in chunk), *question], "<i4")


class Clocks:
    """Milliseconds of steps, by name: by the clock, of this thread, of the daemon."""

    def __init__(self, daemon: int = 0) -> None:
        self._daemon = daemon
        self._seen: dict[str, list[tuple[float, float, float]]] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work under the clocks."""
        begun = (time.perf_counter(), time.thread_time(), self._daemon and cpu_seconds(self._daemon))
        answer = work()
        ended = (time.perf_counter(), time.thread_time(), self._daemon and cpu_seconds(self._daemon))
        self._seen.setdefault(name, []).append(tuple(1e3 * (b - a) for a, b in zip(begun, ended, strict=True)))  # type: ignore[arg-type]
        return answer

    def medians(self) -> dict[str, dict[str, float]]:
        """By step and clock."""
        kinds = KINDS if self._daemon else KINDS[:2]
        return {
            name: {kind: round(median(one[at] for one in seen), 3) for at, kind in enumerate(kinds)}
            for name, seen in self._seen.items()
        }


def asking(prompts: Prompts, rounds: int) -> dict[str, dict[str, float]]:
    """From the search to the last copy that is asked for."""
    from kvstore.client import KVStoreClient
    from kvstore.rope import rotary
    from kvstore.types import Namespace
    from kvstore_connectors.base import Tally
    from kvstore_connectors.blend.prompt import LayerKV
    from kvstore_connectors.chunk_loads import ChunkLoad, Wanted, describe

    namespace = Namespace(
        model="bench", dtype="bfloat16", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, block_tokens=BLOCK
    )
    tally, turning = Tally(), rotary({"rope_theta": 5e5, "head_dim": DIM})
    tokens = len(prompts.ids(0))
    room = torch.zeros(LAYERS, 2, tokens, HEADS, DIM, dtype=torch.bfloat16)
    cache = [LayerKV(keys, values) for keys, values in room]
    stream: Any = Moment()
    with running_daemon({"host.bytes": "4GiB"}) as address, KVStoreClient(address, namespace=namespace) as client:
        store(client, namespace, prompts)
        clocks = Clocks(pid_of(address))
        for number in range(rounds + 1):
            clocks = clocks if number > 1 else Clocks(pid_of(address))
            ids = prompts.ids(number)
            found, _ = clocks.take("match", partial(client.match, ids, spans=prompts.spans, namespace=namespace))
            wanted = [Wanted(one.start, one.stop, 0, one.key, False) for one in found]
            if len(wanted) != len(prompts.spans):
                raise SystemExit("a chunk was not found")
            raw = ids.tobytes()
            described = clocks.take("describe", partial(describe, client, namespace, wanted, raw, 5.0, tally))
            load = ChunkLoad(namespace, described, cache, turning, tally, stream)
            if not clocks.take("lease", partial(load.begin, client, time.monotonic() + 5.0)):
                raise SystemExit("chunks were not had")
            clocks.take("copies", partial(bring, load))
            if not clocks.take("finish", load.finish):
                raise SystemExit("chunks were not had")
    return clocks.medians()


def bring(load: Any) -> None:
    """Ask for all layers, as a pass over them does."""
    for layer in range(LAYERS):
        load.wait(layer)
        load.ahead()


def store(client: Any, namespace: Any, prompts: Prompts) -> None:
    """Chunks as they are captured."""
    from kvstore.client import chunk_parts

    size = 2 * LAYERS * HEADS * DIM * 2
    for chunk in prompts.chunks:
        parts = chunk_parts(namespace, chunk, before=prompts.system)
        items = [(part.key, np.zeros((part.stop - part.start) * size, np.uint8), part.header) for part in parts]
        client.put_many(items, namespace=namespace)


def main() -> None:
    """Run and report."""
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    made = [Prompts(chunks) for chunks in LENGTHS]
    no_device()
    results = {str(len(prompts.ids(0))): asking(prompts, 4 * args.rounds) for prompts in made}
    rows = [
        (tokens, name, *(f"{clocks[kind]:.2f}" if kind in clocks else "" for kind in KINDS))
        for tokens, steps in results.items()
        for name, clocks in steps.items()
    ]
    finish(args, "blend_host", results, ("tokens", "step", "ms", "processor", "daemon's"), rows)


if __name__ == "__main__":
    main()
