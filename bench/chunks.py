"""How long it takes to find the chunks of a prompt among many stored ones, at any offset.

Stored are chunks of 256 random tokens in one namespace, a tenth of which begin with the same 64 tokens. Prompts of
32,768 tokens hold 64 of them at odd offsets, between other text; half of that text begins like a stored chunk and then
differs. Every search must find exactly the chunks that were put in. Beside it stands the same with the spans named,
which needs no search. The clock counts what else the machine does; processor time does not.

    python bench/chunks.py --out bench/results/chunks.json
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from common import arguments, finish

from kvstore.chunks import ChunkIndex
from kvstore.keys import chunk_block_keys, content_key, context_digest
from kvstore.types import BlockHeader, BlockId, ChunkInfo, Scope, TierCode

CHUNK, PROMPT, HELD, SHARED = 256, 32_768, 64, 64
VOCABULARY = 128_256
WANTED_MS = 5.0
SCOPE = Scope("uid-0", b"n" * 32)
EMPTY = context_digest([])


def header_of(tokens: np.ndarray) -> tuple[BlockId, BlockHeader]:
    """A chunk of one block, captured in isolation."""
    content = content_key(SCOPE.ns, tokens)
    (key,) = chunk_block_keys(content, EMPTY, 1)
    raw = tokens.tobytes()
    info = ChunkInfo(content=content, context=EMPTY, tokens=raw)
    return BlockId(SCOPE, key), BlockHeader(tokens=raw, chunk=info)


def stored_index(count: int, rng: np.random.Generator) -> tuple[ChunkIndex, np.ndarray, float]:
    """An index of so many chunks, their tokens, and the seconds that one took to enter."""
    chunks = rng.integers(0, VOCABULARY, (count, CHUNK), dtype=np.int32)
    chunks[: count // 10, :SHARED] = chunks[0, :SHARED]
    index = ChunkIndex(1 << 34, lambda scope, keys: TierCode.HOST)
    headers = [header_of(chunk) for chunk in chunks]
    begun = time.perf_counter()
    for block, header in headers:
        index.stored(block, header)
    return index, chunks, (time.perf_counter() - begun) / count


def prompt_of(chunks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A prompt and the spans that are stored chunks."""
    tokens = rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32)
    spans = []
    for slot, chosen in enumerate(rng.integers(0, len(chunks), HELD)):
        begin = slot * (PROMPT // HELD) + int(rng.integers(0, 64)) * 2 + 1
        tokens[begin : begin + CHUNK] = chunks[chosen]
        spans.append((begin, begin + CHUNK))
        near = chunks[int(rng.integers(0, len(chunks)))][: CHUNK // 2]
        after = min(begin + CHUNK + 7, PROMPT)
        tokens[after : after + CHUNK // 2] = near[: PROMPT - after]
    return tokens, spans


def timed_ms(work: Any) -> tuple[float, float, Any]:
    """Milliseconds of a call by the clock and of processor time, and what it answered."""
    begun, used = time.perf_counter(), time.thread_time()
    answer = work()
    return 1e3 * (time.perf_counter() - begun), 1e3 * (time.thread_time() - used), answer


def measure(count: int, rounds: int, rng: np.random.Generator) -> tuple[list[float], dict[str, Any]]:
    """Fill an index and search prompts in it: cells of the table, and results."""
    index, chunks, enter_s = stored_index(count, rng)
    searched, worked, named = [], [], []
    for _ in range(rounds):
        tokens, spans = prompt_of(chunks, rng)
        raw = tokens.tobytes()
        milliseconds, used, found = timed_ms(partial(index.match, SCOPE, raw, find=True))
        if [(one.start, one.stop) for one in found] != spans:
            raise SystemExit("the search did not find exactly the chunks that are there")
        searched.append(milliseconds)
        worked.append(used)
        milliseconds, _, found = timed_ms(partial(index.match, SCOPE, raw, spans))
        if len(found) != len(spans):
            raise SystemExit("a named chunk was not found")
        named.append(milliseconds)
    gone = [header_of(chunk)[0] for chunk in chunks[:500]]
    leave_ms, _, _ = timed_ms(lambda: [index.removed(block) for block in gone])
    cells = [median(searched), min(searched), median(worked), median(named), 1e6 * enter_s, 2 * leave_ms]
    return cells, {
        "search_ms": searched,
        "search_median_ms": median(searched),
        "search_processor_median_ms": median(worked),
        "named_median_ms": median(named),
        "enter_us": 1e6 * enter_s,
        "leave_us": 2 * leave_ms,
        "index_bytes": index.used,
    }


def main() -> None:
    """Fill indexes of growing size, search prompts in them, print and save."""
    options = arguments(__doc__).parse_args()
    rng = np.random.default_rng(7)
    rows: list[list[Any]] = []
    results: dict[str, Any] = {"chunk_tokens": CHUNK, "prompt_tokens": PROMPT, "wanted_ms": WANTED_MS, "sizes": {}}
    for count in (1_000, 10_000, 100_000):
        cells, results["sizes"][str(count)] = measure(count, max(options.rounds, 3), rng)
        rows.append([f"{count:,}", *(f"{cell:.2f}" for cell in cells)])
    heads = [
        "chunks stored",
        "search, median ms",
        "best",
        "processor, ms",
        "named spans, ms",
        "enter, us",
        "leave, us",
    ]
    finish(options, "chunks", results, heads, rows)


if __name__ == "__main__":
    main()
