"""Replay traces of block references through the eviction policies, as the tiers use them.

Of each request the leading blocks that are held are hits (a chain stops at the first that is missing; of a trace that
names chunks any held one is a hit), then all its blocks are used or stored, and what is too much leaves. Beside the
policies stand FIFO, the best of the eleven policies that were replayed the same way before, where they were, and the
optimum: Belady's, which knows when each block is used next. The speed is that of the policy alone, in block
references a second of processor time.

Formats: one JSON object a request with ``hash_ids``, a list (Mooncake, Bailian) or a table of lists by kind of chunk
(RAGPulse). Without a file, prompts are made up: conversations, agents whose prompts grow, passages by popularity.

    python bench/replay.py TRACE… --out bench/results/replay.json
"""

from __future__ import annotations

import heapq
import json
import random
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from common import arguments, finish

from kvstore.eviction import make_policy, names
from kvstore.eviction.base import EvictionPolicy, Item

SHARES = (1, 2, 5, 10, 20)
POLICIES = ("lhd", "chooser", "lru", "arc", "mq", "s3-fifo", "gdsf")
BEST_KNOWN = {
    "mooncake_conversation": {2: 14.1, 5: 22.1, 10: 29.2, 20: 34.5},
    "ragpulse": {1: 48.5, 5: 62.6},
}
"""Best of FIFO, LRU, LFU, ARC, LIRS, S3-FIFO, SIEVE, W-TinyLFU, GDSF, Cacheus and MQ, replayed by the same rules."""

Request = list[Hashable]


class FIFO(EvictionPolicy[Item]):
    """First in, first out."""

    name = "fifo"

    def __init__(self) -> None:
        self._order: dict[Item, None] = {}

    def insert(self, item: Item, nbytes: int, *, cost: float = 1.0, parent: Item | None = None) -> None:
        self._order[item] = None

    def touch(self, items: list[Item]) -> None:
        pass

    def remove(self, item: Item, *, evicted: bool = False) -> None:
        del self._order[item]

    def victims(self) -> Iterator[Item]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class Replay:
    """A cache of so many blocks in front of a trace."""

    def __init__(self, policy: EvictionPolicy[Any], capacity: int, chained: bool) -> None:
        self._policy, self._capacity, self._chained = policy, capacity, chained
        self._held: set[Hashable] = set()
        self.hits = self.references = 0
        self.seconds = 0.0

    def run(self, requests: list[Request]) -> Replay:
        """Replay all requests."""
        for blocks in requests:
            present, new = self._split(blocks)
            began = time.thread_time()
            self._use(present, new)
            self.seconds += time.thread_time() - began
            self.hits += len(present)
            self.references += len(blocks)
        return self

    def _split(self, blocks: Request) -> tuple[Request, Request]:
        held = self._held
        if not self._chained:
            once = list(dict.fromkeys(blocks))
            return [b for b in once if b in held], [b for b in once if b not in held]
        at = next((i for i, b in enumerate(blocks) if b not in held), len(blocks))
        return blocks[:at], blocks[at:]

    def _use(self, present: Request, new: Request) -> None:
        policy, held = self._policy, self._held
        if present:
            policy.touch(present)
        parent = present[-1] if present and self._chained else None
        for block in new:
            if block in held:
                policy.touch([block])
            else:
                policy.insert(block, 1, parent=parent)
                held.add(block)
            if self._chained:
                parent = block
        over = len(held) - self._capacity
        if over > 0:
            victims = policy.victims()
            leaving = [next(victims) for _ in range(over)]
            for block in leaving:
                policy.remove(block, evicted=True)
                held.discard(block)


def belady(requests: list[Request], capacity: int, chained: bool) -> float:
    """Hit ratio of the optimum: what is used latest leaves first, the tail of a prompt before its head."""
    uses: dict[Hashable, list[int]] = {}
    for number, blocks in enumerate(requests):
        for block in dict.fromkeys(blocks):
            uses.setdefault(block, []).append(number)
    for numbers in uses.values():
        numbers.reverse()
    never = len(requests)
    due: dict[Hashable, tuple[int, int]] = {}
    heap: list[tuple[int, int, int, Hashable]] = []
    hits = references = tick = 0
    for blocks in requests:
        once = list(dict.fromkeys(blocks))
        held = [block in due for block in once]
        hits += (held.index(False) if False in held else len(held)) if chained else sum(held)
        references += len(blocks)
        for depth, block in enumerate(once):
            uses[block].pop()
            following = uses[block][-1] if uses[block] else never
            tick += 1
            due[block] = (following, tick)
            heapq.heappush(heap, (-following, -depth, tick, block))
        while len(due) > capacity:
            _, _, stamp, block = heapq.heappop(heap)
            if block in due and due[block][1] == stamp:
                del due[block]
    return hits / references


# -- traces ------------------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> tuple[str, list[Request], bool]:
    """Name, requests, and whether the blocks of a request are a chain.

    Raises
    ------
    SystemExit
        If a record is not of a known format; it names the file and the record.
    """
    text, decoder, at = path.read_text(), json.JSONDecoder(), 0
    requests: list[Request] = []
    chained = True
    while (at := _skip(text, at)) < len(text):
        try:
            record, at = decoder.raw_decode(text, at)
            ids = record["hash_ids"]
            chained = isinstance(ids, list)
            requests.append(ids if isinstance(ids, list) else [(kind, i) for kind, some in ids.items() for i in some])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"{path}: record {len(requests) + 1} is no request with hash_ids ({error!r}).") from None
    return (path.parent.name if path.name == "0_trace.jsonl" else path.stem), requests, chained


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def conversations(rng: random.Random) -> list[Request]:
    """Many people talk, with pauses; each turn sends all that was said, behind a common system prompt."""
    talks: dict[int, list[Hashable]] = {}
    requests: list[Request] = []
    for number in range(12_000):
        if talks and rng.random() < 0.6:
            talk = rng.choice(list(talks)[-200:])
        else:
            talk = number
            talks[talk] = ["system", *((talk, i) for i in range(1, rng.randrange(2, 20)))]
        said = talks[talk]
        _grow(said, talk, rng.randrange(1, 6))
        requests.append([*said])
        if rng.random() < 0.3:
            del talks[talk]
    return requests


def agents(rng: random.Random) -> list[Request]:
    """A few agents at work; each step sends the whole history and a little more."""
    histories: dict[int, list[Hashable]] = {}
    requests: list[Request] = []
    for number in range(6_000):
        if len(histories) < 24:
            histories[number] = [("tools", i) for i in range(8)]
        agent = rng.choice(list(histories))
        history = histories[agent]
        _grow(history, agent, rng.randrange(1, 4))
        requests.append([*history])
        if len(history) > 120:
            del histories[agent]
    return requests


def _grow(said: list[Hashable], who: int, count: int) -> None:
    said += [(who, i) for i in range(len(said), len(said) + count)]


def passages(rng: random.Random) -> list[Request]:
    """Prompts made of passages, popular ones often; what is popular drifts."""
    return [
        [("system", 0), *((int(rng.paretovariate(0.9)) + number // 400) % 30_000 for _ in range(6)), ("user", number)]
        for number in range(12_000)
    ]


MADE_UP: dict[str, tuple[Callable[[random.Random], list[Request]], bool]] = {
    "conversations": (conversations, True),
    "agents": (agents, True),
    "passages": (passages, False),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("traces", nargs="*", type=Path, help="trace files; none for made-up ones")
    parser.add_argument("--policies", nargs="*", default=POLICIES, choices=names(), help="policies to replay")
    parser.add_argument("--seed", type=int, default=1, help="seed of the made-up traces (default 1)")
    args = parser.parse_args()
    traces = [read_trace(path) for path in args.traces]
    traces += [(name, make(random.Random(args.seed)), chained) for name, (make, chained) in MADE_UP.items()]
    results: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    for name, requests, chained in traces:
        distinct = len({block for blocks in requests for block in blocks})
        references = sum(map(len, requests))
        print(f"{name}: {len(requests)} requests, {references} references, {distinct} distinct", flush=True)
        results[name] = {"references": references, "distinct": distinct, "sizes": {}}
        for share in SHARES:
            row = one_size(requests, max(1, distinct * share // 100), chained, args.policies)
            row["best_known"] = BEST_KNOWN.get(name, {}).get(share)
            results[name]["sizes"][share] = row
            hit = [f"{row['hit_percent'][p]:.1f}" for p in ("fifo", *args.policies)]
            rows.append((name, f"{share} %", *hit, row["best_known"] or "", f"{row['belady']:.1f}", _speed(row)))
    header = ("trace", "size", "fifo", *args.policies, "best known", "belady", f"{args.policies[0]} refs/s")
    finish(args, "replay", results, header, rows)


def one_size(requests: list[Request], capacity: int, chained: bool, policies: list[str]) -> dict[str, Any]:
    """All policies at one cache size."""
    runs = {"fifo": Replay(FIFO(), capacity, chained).run(requests)}
    runs |= {name: Replay(make_policy(name), capacity, chained).run(requests) for name in policies}
    return {
        "blocks": capacity,
        "hit_percent": {name: round(100 * run.hits / run.references, 2) for name, run in runs.items()},
        "references_per_s": {name: round(run.references / run.seconds) for name, run in runs.items()},
        "belady": round(100 * belady(requests, capacity, chained), 2),
    }


def _speed(row: dict[str, Any]) -> str:
    return f"{list(row['references_per_s'].values())[1]:,}"


if __name__ == "__main__":
    main()
