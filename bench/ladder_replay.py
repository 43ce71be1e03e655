"""Replay traces through the ladder with bytes instead of blocks: what shrinking before evicting keeps, and costs.

The ladder is the product's own (`kvstore.ladder`), over the product's eviction order; only the bytes are not there: a
block is its size, by rung, as measured on a model. Of each request the leading blocks that
are held are hits (of a trace that names chunks any held one is), then all its blocks are used or stored. Beside the
ladder stand tiers that keep everything raw, or everything on the first or the last rung, and evict only.

The KL of a hit is that of the rung its block stands on when it is used, as measured with whole contexts on that rung.

    python bench/ladder_replay.py TRACE… [--profile PROFILE.json] --out bench/results/ladder_replay.json
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, arguments, finish
from replay import read_trace

from kvstore.cli.codec_plot import short
from kvstore.encoding import Encoded, Encoding, Form
from kvstore.eviction import make_policy
from kvstore.eviction.partitions import Partitions
from kvstore.ladder import Ladder
from kvstore.profile import Profile, Rung, load_profile
from kvstore.tiers.base import Finding, Tier, TierCounters, Usage
from kvstore.types import (
    BlockHeader,
    BlockId,
    Dropped,
    DropReason,
    Exists,
    Gone,
    Hit,
    LoadOutcome,
    Miss,
    MissReason,
    Namespace,
    Scope,
    Stored,
    StoreOutcome,
    TierCode,
)
from kvstore.watcher import Watcher

TOKEN_BYTES = 1024
"""Of a token, raw; only ratios matter."""
NAMESPACE = Namespace(model="trace", dtype="bfloat16", layers=16, kv_heads=1, head_dim=16, layout="lkthd1",
                      block_tokens=512, fidelity="lossy:trace")  # fmt: skip
SCOPE = Scope("bench", bytes(32))
ANY = memoryview(bytes(1 << 20))
Step = tuple[str, float, float]
"""Name of a rung, how many times smaller it is, its KL."""


class Sizes(Tier):
    """A tier that remembers how large blocks are, and evicts as the tiers do."""

    name, code = "sizes", TierCode.DISK

    def __init__(self, capacity: int, policy: str) -> None:
        self.counters = TierCounters()
        self.capacity, self.used = capacity, 0
        self.sizes: dict[BlockId, int] = {}
        self.order = self._order = Partitions(make_policy(policy), lambda block: (self.sizes[block], 1.0, None))
        self._watcher = Watcher()

    def size(self, block: BlockId) -> int | None:
        return self.sizes.get(block)

    def watch(self, watcher: Watcher) -> None:
        self._watcher = watcher

    async def get(self, block: BlockId, into: Sequence[memoryview]) -> LoadOutcome:
        size = self.sizes.get(block)
        return Miss(MissReason.ABSENT) if size is None else Hit(BlockHeader(), size)

    async def put(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int, *, durable: bool = False
    ) -> StoreOutcome:
        if block in self.sizes:
            return Exists()
        if not self._fits(nbytes):
            return Dropped(DropReason.TIER_FULL)
        self.sizes[block] = nbytes
        self.used += nbytes
        parent = BlockId(SCOPE, header.parent) if header.parent else None
        self._order.insert(block, nbytes, cost=1.0, parent=parent)
        return Stored()

    def _fits(self, nbytes: int) -> bool:
        need = self.used + nbytes - self.capacity
        leaving = []
        for block, size in self._order.victims(None, 0, self.sizes.__getitem__) if need > 0 else ():
            leaving.append(block)
            need -= size
            if need <= 0:
                break
        for block in leaving:
            self._forget(block, evicted=True)
        return need <= 0

    def _forget(self, block: BlockId, *, evicted: bool) -> None:
        self.used -= self.sizes.pop(block)
        self._order.remove(block, evicted=evicted)
        self.counters.evicted += evicted
        self._watcher.removed(self.code, block, Gone.EVICTED if evicted else Gone.DROPPED)

    async def replace(
        self, block: BlockId, header: BlockHeader, payload: Sequence[memoryview], nbytes: int
    ) -> StoreOutcome:
        self.used += nbytes - self.sizes[block]
        self.sizes[block] = nbytes
        return Stored()

    async def drop(self, block: BlockId) -> bool:
        known = block in self.sizes
        if known:
            self._forget(block, evicted=False)
        return known

    async def clear(self, scope: Scope) -> int:
        return sum([await self.drop(block) for block in list(self.sizes)])

    def touch(self, blocks: Iterable[BlockId]) -> None:
        self._order.touch([block for block in blocks if block in self.sizes])

    def pin(self, block: BlockId, until: float) -> bool:
        return False

    def usage(self) -> Usage:
        return Usage(self.capacity, self.used, len(self.sizes))

    async def check(self, fix: bool = False) -> list[Finding]:
        return []

    async def close(self) -> None:
        pass


class Nominal(Encoding):
    """Bytes of the right size, with nothing in them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__("raw", None)
        self.steps = steps

    def rungs(self, form: Form) -> Any:
        return self.steps, None

    def first(self, form: Form, header: BlockHeader, nbytes: int, *, durable: bool) -> Any:
        return (0, None) if self.steps and self.steps[0][1] > 1 else None

    def passes_over(self, form: Form, header: BlockHeader) -> bool:
        return False

    def encode(
        self, form: Form, header: BlockHeader, payload: Sequence[memoryview], chain: Any, rung: int = 0
    ) -> Encoded:
        return self._on(rung, payload[0].nbytes)

    def lower(self, form: Form, header: BlockHeader, data: memoryview, *, shared: bool = False) -> Encoded | None:
        rung, raw = _meaning[data.nbytes]
        return self._on(rung + 1, raw) if rung + 1 < len(self.steps) else None

    def _on(self, rung: int, raw: int) -> Encoded:
        return Encoded(ANY[: stored_size(raw, rung, self.steps[rung][1])], self.steps[rung][0], rung)


def stored_size(raw: int, rung: int, ratio: float) -> int:
    """Bytes of a block on a rung. No two rungs or lengths share a size, and none is a raw one, so that it tells all."""
    size = _known.get((raw, rung))
    if size is None:
        size = max(1, round(raw / ratio))
        while size % TOKEN_BYTES == 0 or size in _meaning:
            size += 1
        _known[raw, rung], _meaning[size] = size, (rung, raw)
    return size


_known: dict[tuple[int, int], int] = {}
_meaning: dict[int, tuple[int, int]] = {}


class Direct(Ladder):
    """The ladder without its threads: there is nothing to compute."""

    async def _work(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


Request = list[tuple[BlockId, int]]


async def replay(requests: Sequence[Request], chained: bool, capacity: int, policy: str, steps: list[Step]) -> Any:
    """Hit ratio in tokens, and the KL of the tokens that were hit, in a tier of so many bytes."""
    _known.clear()
    _meaning.clear()
    sizes = Sizes(capacity, policy)
    tier = Direct(sizes, lambda scope: NAMESPACE)
    tier._encoding = tier.steps._encoding = Nominal(steps)
    kl = [step[2] for step in steps]
    hit = asked = 0
    cost = 0.0
    by_rung: Counter[str] = Counter()
    began = time.perf_counter()
    for blocks in requests:
        held = [block in sizes.sizes for block, _ in blocks]
        count = (held.index(False) if False in held else len(held)) if chained else 0
        used = blocks[:count] if chained else [each for each, here in zip(blocks, held, strict=True) if here]
        asked += sum(tokens for _, tokens in blocks)
        for block, tokens in used:
            hit += tokens
            stored = sizes.sizes[block]
            rung = _meaning[stored][0] if stored % TOKEN_BYTES else None
            cost += 0.0 if rung is None else kl[rung] * tokens
            by_rung["raw" if rung is None else steps[rung][0]] += tokens
        tier.touch([block for block, _ in used])
        parent = used[-1][0].key if used and chained else b""
        for block, tokens in blocks[count:] if chained else blocks:
            if block in sizes.sizes:
                if chained:
                    tier.touch([block])
            else:
                raw = tokens * TOKEN_BYTES
                await tier.put(block, BlockHeader(parent=parent), [ANY[:raw]], raw)
            parent = block.key if chained else b""
    state = tier.describe_state()["codecs"]
    return {
        "hit_percent": round(100 * hit / asked, 2),
        "kl_of_hits": cost / max(hit, 1),
        "kl_of_all": cost / asked,
        "blocks_at_end": len(sizes.sizes),
        "evicted": sizes.counters.evicted,
        "stepped_down": state["stepped_down"],
        "hit_tokens_by_rung": dict(by_rung),
        "seconds": round(time.perf_counter() - began, 1),
    }


def lengths(path: Path) -> Iterator[tuple[Any, int]]:
    """Tokens of the chunks that files beside a trace tell of."""
    kinds = {"sys_prompt": "sys_prompt", "passage": "passages_ids", "history": "history", "web_search": "web_search",
             "user_input": "user_input"}  # fmt: skip
    for file in sorted(path.parent.glob("[1-9]_*.jsonl")):
        for text in re.findall(r"\{[^{}]*\}", file.read_text()):  # some stand over several lines
            record = json.loads(text)
            name = next(name for name in record if name.endswith("_id"))
            yield (kinds[name.removesuffix("_id")], record[name]), int(record["token_length"])


def tokenized(path: Path, requests: list[list[Any]], chained: bool) -> list[Request]:
    """Requests with the tokens of each block: 512 each in a chain."""
    known = {} if chained else dict(lengths(path))
    ids: dict[Any, BlockId] = {}

    def name(block: Any) -> BlockId:
        return ids.setdefault(block, BlockId(SCOPE, (len(ids) + 1).to_bytes(32, "little")))

    return [[(name(b), known.get(b, 512)) for b in dict.fromkeys(blocks)] for blocks in requests]


def measured(path: Path) -> Profile:
    """What passes the gate of the chains that a bench measured, as a profile that nobody can use but this one."""
    chains = json.loads(path.read_text())["results"]["chains"]
    rungs = [
        Rung(name, 0, c["kl"], c["kl"] + c["kl_interval"], c["top1"], c["nll"], c["ratio"], 0.0, 0.0)
        for name, c in chains.items() if c["kl"] > 0
    ]  # fmt: skip
    return Profile(name="bench", model="", revision="", layers=1, kv_heads=1, head_dim=2, frequencies=[], rungs=rungs)


def main() -> None:
    """Replay, print."""
    parser = arguments(__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--profile", type=Path, help="profile of `kvstore calibrate`")
    parser.add_argument("--figures", type=Path, default=ROOT / "bench/results/codec_quality.json",
                        help="figures of bench/codec_quality.py, where there is no profile")  # fmt: skip
    parser.add_argument("--percent", nargs="*", type=float, default=[5.0], help="budgets, of all distinct raw bytes")
    parser.add_argument("--policies", nargs="*", default=["lhd", "lru"])
    args = parser.parse_args()
    profile = load_profile(args.profile) if args.profile is not None else measured(args.figures)
    rungs: list[Step] = [(short(rung.chain), rung.ratio, rung.kl) for rung in profile.passed]
    results: dict[str, Any] = {"rungs": rungs}
    rows = []
    for path in args.traces:
        title, requests, chained = read_trace(path)
        blocks = tokenized(path, requests, chained)
        total = sum(dict(each for request in blocks for each in request).values()) * TOKEN_BYTES
        for percent in args.percent:
            for policy in args.policies:
                ways = {"raw, evicted": [], "ladder": rungs}
                ways |= {f"all {rung[0]}, evicted": [rung] for rung in (rungs[0], rungs[-1])}
                for way, steps in ways.items():
                    found = asyncio.run(replay(blocks, chained, int(total * percent / 100), policy, steps))
                    results.setdefault(title, {}).setdefault(f"{percent:g} %", {}).setdefault(policy, {})[way] = found
                    rows.append((title, f"{percent:g} %", policy, way, found["hit_percent"],
                                 f"{found['kl_of_hits']:.5f}", f"{found['kl_of_all']:.5f}", found["evicted"],
                                 found["stepped_down"]))  # fmt: skip
                    print(*rows[-1], f"{found['seconds']} s", flush=True)
    header = ("trace", "budget", "policy", "way", "hit % of tokens", "KL of hits", "KL of all", "evicted", "steps")
    finish(args, "ladder_replay", results, header, rows)


if __name__ == "__main__":
    main()
