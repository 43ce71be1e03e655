"""Replay a trace of retrieval-augmented prompts: what is computed by full prefill, prefix caching, and reuse of chunks.

Each request names its pieces (system prompts, passages, history, web search, what the user typed) in prompt order, with
their lengths in tokens. Full prefill computes all of them. Prefix caching finds pieces as long as everything before
them is the same. Reuse of chunks finds the same prefixes, and behind them every piece that was seen before, wherever it
stands: of these a share is computed again, and the question once more, which choosing costs where it is read. What the
user typed is computed always, and pieces under `LEAST` tokens are, too. A prompt of which more than `MOST` would be
computed is left to the engine: then it is prefix caching.

Unlimited, and with a cache of some share of all distinct tokens, from which the daemon's own policy evicts; reuse of
chunks keeps both prefixes and chunks in the same room. No model is needed: this counts tokens, `kvstore eval` says what
a share costs in quality.

    python bench/chunks_replay.py FOLDER --out bench/results/chunks_replay.json
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, finish

from kvstore.eviction import make_policy

FILES = {
    "sys_prompt": ("1_sys_prompt", "sys_prompt_id"),
    "passages_ids": ("2_passages", "passage_id"),
    "history": ("3_history", "history_id"),
    "web_search": ("5_web_search", "web_search_id"),
    "user_input": ("4_user_input", "user_input_id"),
}
SHARES = (0.0, 0.05, 0.15, 0.3)
ROOMS = (0.05, 0.2, 1.0)
LEAST, MOST = 32, 0.65


class Piece(NamedTuple):
    """A piece of a prompt."""

    kind: str
    number: int
    tokens: int


class Cache:
    """So many tokens of KV; None: as many as come."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._policy = make_policy("lhd")
        self._held: dict[Hashable, int] = {}
        self._used = 0

    def __contains__(self, item: Hashable) -> bool:
        return item in self._held

    def use(self, item: Hashable, tokens: int, parent: Hashable | None = None) -> None:
        """Touch what is held, store what is not, and let go of what is too much."""
        if self._capacity is None:
            self._held[item] = tokens
            return
        if item in self._held:
            self._policy.touch([item])
            return
        self._policy.insert(item, tokens, parent=parent if parent in self._held else None)
        self._held[item] = tokens
        self._used += tokens
        while self._used > self._capacity:
            victim = next(iter(self._policy.victims()))
            self._policy.remove(victim, evicted=True)
            self._used -= self._held.pop(victim)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file, whatever stands between them."""
    text, decoder, at = path.read_text().strip(), json.JSONDecoder(), 0
    while at < len(text):
        one, at = decoder.raw_decode(text, at)
        yield one
        while at < len(text) and text[at].isspace():
            at += 1


def read(folder: Path) -> list[list[Piece]]:
    """Prompts of a trace in RAGPulse's format."""
    lengths = {}
    for kind, (file, name) in FILES.items():
        for one in records(folder / f"{file}.jsonl"):
            lengths[kind, one[name]] = one["token_length"]
    prompts = []
    for one in records(folder / "0_trace.jsonl"):
        ids = one["hash_ids"]
        prompts.append([Piece(kind, i, lengths[kind, i]) for kind in FILES for i in ids[kind]])
    return prompts


def chain(prompt: list[Piece]) -> list[tuple[Piece, ...]]:
    """Names of a prompt's prefixes."""
    return [tuple(prompt[: place + 1]) for place in range(len(prompt))]


def prefix_computed(prompts: list[list[Piece]], capacity: int | None) -> int:
    """Tokens that prefix caching computes."""
    cache, computed = Cache(capacity), 0
    for prompt in prompts:
        names = chain(prompt)
        known = next((place for place, name in enumerate(names) if name not in cache), len(names))
        computed += sum(piece.tokens for piece in prompt[known:])
        for place, piece in enumerate(prompt):
            cache.use(names[place], piece.tokens, names[place - 1] if place else None)
    return computed


def chunks_computed(prompts: list[list[Piece]], share: float, capacity: int | None) -> tuple[float, int]:
    """Tokens that reuse of chunks computes, and how many it reuses apart from prefixes."""
    cache, computed, reused = Cache(capacity), 0.0, 0
    for prompt in prompts:
        names = chain(prompt)
        known = next((place for place, name in enumerate(names) if name not in cache), len(names))
        rest = prompt[known:]
        found = sum(p.tokens for p in rest if p.kind != "user_input" and p.tokens >= LEAST and p in cache)
        fresh = sum(piece.tokens for piece in rest) - found
        typed = sum(piece.tokens for piece in rest if piece.kind == "user_input")
        blended = fresh + share * found + (typed if share else 0)
        if found and blended <= MOST * (fresh + found):
            computed, reused = computed + blended, reused + found
        else:
            computed += fresh + found
        for place, piece in enumerate(prompt):
            cache.use(names[place], piece.tokens, names[place - 1] if place else None)
            if piece.kind != "user_input" and piece.tokens >= LEAST:
                cache.use(piece, piece.tokens)
    return computed, reused


def main() -> None:
    """Replay, print and save."""
    parser = arguments(__doc__)
    parser.add_argument("trace", type=Path, help="folder of a trace in RAGPulse's format")
    options = parser.parse_args()
    prompts = read(options.trace)
    total = sum(piece.tokens for prompt in prompts for piece in prompt)
    distinct = sum(piece.tokens for piece in {piece for prompt in prompts for piece in prompt})
    rows: list[list[Any]] = []
    found: list[dict[str, Any]] = []
    for room in ROOMS:
        capacity = None if room == 1.0 else int(room * distinct)
        prefix = prefix_computed(prompts, capacity)
        for share in SHARES:
            computed, reused = chunks_computed(prompts, share, capacity)
            one = {
                "room": "unlimited" if capacity is None else room,
                "share": share,
                "prefix_computed": prefix / total,
                "computed": computed / total,
                "reused_as_chunks": reused / total,
                "less_than_prefix": 1 - computed / prefix,
                "less_than_full": 1 - computed / total,
            }
            found.append(one)
            rows.append([one["room"], f"{share:.0%}", *(f"{one[name]:.1%}" for name in list(one)[2:])])
    results = {"trace": options.trace.name, "requests": len(prompts), "tokens": total, "distinct": distinct}
    head = ["room", "share", "prefix computes", "chunks compute", "reused as chunks", "less than prefix", "than full"]
    finish(
        options, "chunks_replay", {**results, "least_tokens": LEAST, "most_computed": MOST, "rows": found}, head, rows
    )


if __name__ == "__main__":
    main()
