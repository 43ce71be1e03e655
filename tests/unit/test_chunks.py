"""The chunk index: what is found in a prompt, who may use it, what it refuses, what it costs."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.chunks import ChunkIndex, fix_overhead, numbered
from kvstore.chunks.index import check_chunk
from kvstore.chunks.rolling import Roller
from kvstore.chunks.spans import between, check_spans
from kvstore.chunks.table import WINDOW
from kvstore.errors import InvalidParams
from kvstore.keys import chunk_block_keys, content_key, context_digest
from kvstore.types import MAX_CHUNK_TOKENS, BlockHeader, BlockId, ChunkInfo, Scope, TierCode

SCOPE = Scope("uid-1", b"n" * 32)


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count, dtype=np.int32)


def chunk(tokens: np.ndarray, before: np.ndarray | None = None, ns: bytes = SCOPE.ns, **info):
    """A chunk of one block as (key, header)."""
    before = np.empty(0, np.int32) if before is None else before
    content, context = content_key(ns, tokens), context_digest(before)
    (key,) = chunk_block_keys(content, context, 1)
    kind = "live" if info.get("lineage") else "system" if len(before) else "isolated"
    fields = {"position": len(before), "capture": kind, **info}
    described = ChunkInfo(content=content, context=context, tokens=tokens.tobytes(), **fields)
    return key, BlockHeader(tokens=tokens.tobytes(), position=len(before), chunk=described)


def index(**options) -> ChunkIndex:
    return ChunkIndex(options.pop("capacity", 1 << 24), lambda scope, keys: TierCode.HOST, seed=3, **options)


def put(into: ChunkIndex, tokens: np.ndarray, scope: Scope = SCOPE, **info) -> bytes:
    key, header = chunk(tokens, ns=scope.ns, **info)
    into.stored(BlockId(scope, key), header)
    return key


def spans_of(found) -> list[tuple[int, int]]:
    return [(one.start, one.stop) for one in found]


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_equal_spans_have_equal_hashes_wherever_they_stand():
    roller, piece = Roller(1), ids(40, 1)
    one = roller.roll(np.concatenate([ids(7, 2), piece, ids(900, 3)]))
    two = roller.roll(np.concatenate([ids(611, 4), piece]))
    assert one.span(7, 47) == two.span(611, 651) == int(one.windows(40)[7]) == int(two.windows(40)[611])
    assert one.span(8, 48) != one.span(7, 47)


def test_windows_of_a_short_sequence():
    rolled = Roller(1).roll(ids(31, 1))
    assert len(rolled.windows(32)) == 0
    assert len(rolled.windows(31)) == 1


def test_zeros_and_order_count():
    roller = Roller(1)
    zeros = roller.roll(np.zeros(64, np.int32))
    assert zeros.span(0, 32) != zeros.span(0, 33)
    a, b = np.arange(32, dtype=np.int32), np.arange(32, dtype=np.int32)[::-1].copy()
    assert roller.roll(a).span(0, 32) != roller.roll(b).span(0, 32)


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 33, 255])
def test_a_chunk_is_found_at_any_offset(offset):
    chunks, piece = index(), ids(100, 1)
    put(chunks, piece)
    prompt = np.concatenate([ids(offset, 2), piece, ids(50, 3)])
    assert spans_of(chunks.match(SCOPE, prompt.tobytes(), find=True)) == [(offset, offset + 100)]


def test_without_find_only_named_spans_are_looked_up():
    chunks, piece = index(), ids(100, 1)
    put(chunks, piece)
    prompt = np.concatenate([piece, piece]).tobytes()
    assert chunks.match(SCOPE, prompt) == []
    assert spans_of(chunks.match(SCOPE, prompt, [(100, 200)])) == [(100, 200)]
    assert spans_of(chunks.match(SCOPE, prompt, [(100, 200)], find=True)) == [(0, 100), (100, 200)]
    assert chunks.match(SCOPE, prompt, [(99, 199)]) == []


def test_one_token_that_differs_is_no_match():
    chunks, piece = index(), ids(100, 1)
    put(chunks, piece)
    other = piece.copy()
    other[99] += 1
    assert chunks.match(SCOPE, other.tobytes(), [(0, 100)], find=True) == []


def test_the_longest_that_begins_here_is_taken_and_none_overlap():
    chunks, long = index(), ids(200, 1)
    for piece in (long[:100], long, long[50:150]):
        put(chunks, piece)
    prompt = np.concatenate([ids(10, 2), long, long[:150]]).tobytes()
    assert spans_of(chunks.match(SCOPE, prompt, find=True)) == [(10, 210), (210, 310)]


def test_chunks_shorter_than_the_window_are_found_by_name_only():
    chunks, piece = index(), ids(WINDOW - 1, 1)
    put(chunks, piece)
    assert chunks.match(SCOPE, piece.tobytes(), find=True) == []
    assert len(chunks.match(SCOPE, piece.tobytes(), [(0, WINDOW - 1)])) == 1


def test_namespaces_and_trust_domains_are_apart():
    chunks, piece = index(), ids(100, 1)
    put(chunks, piece)
    for other in (Scope("uid-2", SCOPE.ns), Scope("uid-1", b"m" * 32)):
        assert chunks.match(other, piece.tobytes(), [(0, 100)], find=True) == []


def test_who_may_not_read_the_lineage_does_not_find_the_chunk():
    chunks, piece = index(), ids(100, 1)
    put(chunks, piece, labels=["board", "legal"])
    raw = piece.tobytes()
    assert chunks.match(SCOPE, raw, find=True) == []
    assert chunks.match(SCOPE, raw, [(0, 100)], labels=["board"]) == []
    assert len(chunks.match(SCOPE, raw, labels=["legal", "board", "x"], find=True)) == 1


def test_a_chunk_that_lost_a_block_is_not_offered():
    held: set[bytes] = set()
    chunks = ChunkIndex(1 << 20, lambda scope, keys: TierCode.HOST if held.issuperset(keys) else None)
    key = put(chunks, ids(100, 1))
    raw = ids(100, 1).tobytes()
    assert chunks.match(SCOPE, raw, find=True) == []
    held.add(key)
    assert chunks.match(SCOPE, raw, find=True)[0].key == key


def test_tokens_made_to_agree_nearly_everywhere_cost_bounded_work():
    chunks = index(capacity=1 << 28)
    for length in range(WINDOW, 1500, 3):
        piece = np.zeros(length + 1, np.int32)
        piece[-1] = length
        put(chunks, piece)
    assert chunks.match(SCOPE, np.zeros(20_000, np.int32).tobytes(), find=True) == []


# -- variants ----------------------------------------------------------------------------------------------------------


def test_the_variant_made_behind_these_very_tokens_is_exact_and_comes_first():
    chunks, piece, system = index(), ids(100, 1), ids(40, 2)
    put(chunks, piece)
    exact = put(chunks, piece, before=system)
    found = chunks.match(SCOPE, np.concatenate([system, piece]).tobytes(), find=True)
    assert (found[0].key, found[0].overhead, found[0].capture) == (exact, 0.0, "system")
    elsewhere = chunks.match(SCOPE, np.concatenate([ids(40, 9), piece]).tobytes(), find=True)
    assert elsewhere[0].key == exact
    assert elsewhere[0].overhead > 0.5


def test_the_variant_with_the_nearest_lineage_is_chosen():
    chunks = index()
    a, b, c, d = (ids(64, seed) for seed in range(4))
    for piece in (a, b, c):
        put(chunks, piece)
    keys = [content_key(SCOPE.ns, piece) for piece in (a, b, c)]
    near = put(chunks, d, before=np.concatenate([a, b]), lineage=keys[:2])
    put(chunks, d, before=c, lineage=keys[2:])
    prompt = np.concatenate([a, ids(9, 5), b, d])
    assert chunks.match(SCOPE, prompt.tobytes(), find=True)[-1].key == near


def test_the_variant_with_the_least_score_makes_room():
    dropped: list[bytes] = []
    chunks = index(most_variants=2, replaced=lambda scope, keys: dropped.extend(keys))
    piece, first, second = ids(100, 1), ids(5, 2), ids(6, 3)
    used = put(chunks, piece, before=first)
    unused = put(chunks, piece, before=second)
    chunks.match(SCOPE, np.concatenate([first, piece]).tobytes(), find=True)
    newest = put(chunks, piece, before=ids(7, 4))
    assert dropped == [unused]
    assert len(chunks) == 2
    assert chunks.info(BlockId(SCOPE, used))
    assert chunks.info(BlockId(SCOPE, newest))
    assert chunks.check() == ""


def test_the_same_chunks_in_other_text_are_not_the_same_context():
    chunks = index()
    a, b = ids(64, 0), ids(64, 1)
    put(chunks, a)
    lineage = [content_key(SCOPE.ns, a)]
    put(chunks, b, before=np.concatenate([ids(5, 2), a]), lineage=lineage)
    found = chunks.match(SCOPE, np.concatenate([ids(5, 3), a, b]).tobytes(), find=True)
    assert 0.0 < found[-1].overhead < 1e-3
    found = chunks.match(SCOPE, np.concatenate([ids(5, 2), a, b]).tobytes(), find=True)
    assert found[-1].overhead == 0.0


def info(lineage, inter=(), cci=0.6) -> ChunkInfo:
    return ChunkInfo(content=b"c" * 32, context=b"x" * 32, tokens=b"1234", lineage=lineage, inter=list(inter), cci=cci)


def overhead(known: ChunkInfo, before: list[bytes], alpha: float = 1.0) -> float:
    return fix_overhead(known, numbered(before), alpha)


def test_fix_overhead_follows_the_paper():
    a, b, c = b"a" * 32, b"b" * 32, b"c" * 32
    assert overhead(info([a, b], [3.0, 1.0]), [a, b]) == 0.0
    assert overhead(info([a, b], [3.0, 1.0]), [a]) == pytest.approx(0.6 * 0.25)
    assert overhead(info([a, b], [3.0, 1.0]), [b]) == pytest.approx(0.6 * 0.75)
    assert overhead(info([a, b]), [b, a]) == pytest.approx(0.6)  # reversed: gamma is 1
    assert overhead(info([a]), [c]) == pytest.approx(0.6)
    assert overhead(info([a]), [a, c]) == pytest.approx(0.6 * 0.5 * 0.5)  # nothing lost, half is new
    assert overhead(info([]), [a]) == pytest.approx(0.6)
    assert overhead(info([], cci=0.0), []) == pytest.approx(0.62)
    assert overhead(info([a, a], [1.0, 1.0]), [a]) == pytest.approx(0.3)  # occurrences count one by one
    assert overhead(info([a, a, b]), [a, b, a]) == pytest.approx(0.6 / 3)  # of three pairs one is the other way round


@given(
    old=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True),
    new=st.lists(st.sampled_from("abcdef"), max_size=6, unique=True),
    weights=st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
    alphas=st.tuples(st.floats(0, 2), st.floats(0, 2)),
)
def test_fix_overhead_is_monotone_and_bounded(old: list[str], new: list[str], weights: list[float], alphas: Any):
    lineage, before = ([letter.encode() * 32 for letter in some] for some in (old, new))
    known = info(lineage, weights[: len(old)])
    low, high = sorted(alphas)
    assert 0 <= overhead(known, before, low) <= overhead(known, before, high) <= 1
    whole = overhead(known, before)
    assert whole <= 0.6 + 1e-9  # alpha times CCI
    if not set(old) & set(new):
        assert whole == pytest.approx(0.6)
    kept = [one for one in before if one in lineage]
    for one in kept:  # what is lost can only make it worse: beta' falls
        rest = [other for other in before if other != one]
        if set(rest) <= set(lineage):
            ordered = sorted(rest, key=lineage.index)
            assert overhead(known, sorted(kept, key=lineage.index)) <= overhead(known, ordered) + 1e-9
    in_order = sorted(kept, key=lineage.index)
    assert overhead(known, in_order) <= overhead(known, in_order[::-1]) + 1e-9  # disorder only adds


# -- coming and going --------------------------------------------------------------------------------------------------


def test_bounded_in_bytes_the_least_recently_used_is_forgotten():
    chunks = index(capacity=3 * 2000)
    first, second, third, fourth = (ids(100, seed) for seed in range(4))
    for piece in (first, second, third):
        put(chunks, piece)
    assert len(chunks) == 3
    chunks.match(SCOPE, first.tobytes(), find=True)
    put(chunks, fourth)
    assert chunks.used <= chunks.capacity
    assert [bool(chunks.match(SCOPE, p.tobytes(), find=True)) for p in (first, second, third, fourth)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert chunks.counts["forgotten"] == 1
    assert chunks.check() == ""


def test_what_left_every_tier_is_not_found():
    chunks, piece = index(), ids(100, 1)
    key = put(chunks, piece)
    chunks.removed(BlockId(SCOPE, b"another".ljust(32)))
    chunks.removed(BlockId(SCOPE, key))
    assert chunks.match(SCOPE, piece.tobytes(), find=True) == []
    assert (len(chunks), chunks.used) == (0, 0)
    assert chunks.check() == ""


def test_the_filter_grows_and_forgets():
    chunks = index(capacity=1 << 26)
    keys = [put(chunks, ids(40, seed)) for seed in range(1500)]
    assert chunks.check() == ""
    for key in keys[:1499]:
        chunks.removed(BlockId(SCOPE, key))
    assert chunks.check() == ""
    assert spans_of(chunks.match(SCOPE, ids(40, 1499).tobytes(), find=True)) == [(0, 40)]


# -- lies --------------------------------------------------------------------------------------------------------------


def changed(header: BlockHeader, **fields) -> BlockHeader:
    described = header.chunk
    assert described is not None
    return msgspec.structs.replace(header, chunk=msgspec.structs.replace(described, **fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens": ids(100, 2).tobytes()}, "content key"),
        ({"content": b"z" * 32}, "content key"),
        ({"tokens": ids(100, 1).tobytes()[:-1]}, "cut off"),
        ({"blocks": b"k" * 31}, "cut off"),
        ({"external": b"1"}, "float16"),
        ({"lineage": [b"short"], "capture": "live", "position": 9}, "lineage"),
        ({"lineage": [b"a" * 32], "inter": [1.0, 2.0], "capture": "live", "position": 9}, "lineage"),
        ({"capture": "isolated", "position": 7}, "position 7"),
        ({"capture": "system", "position": 7, "lineage": [b"a" * 32]}, "1 chunks"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(fields, says):
    key, header = chunk(ids(100, 1))
    check_chunk(SCOPE.ns, key, header)
    wrong = changed(header, **fields)
    with pytest.raises(InvalidParams, match=says):
        check_chunk(SCOPE.ns, key, wrong)
    chunks = index()
    chunks.stored(BlockId(SCOPE, key), wrong)
    assert (len(chunks), chunks.counts["refused"]) == (0, 1)


def test_a_chunk_of_another_namespace_is_refused():
    key, header = chunk(ids(100, 1), ns=b"m" * 32)
    with pytest.raises(InvalidParams, match="content key"):
        check_chunk(SCOPE.ns, key, header)


def test_the_last_block_must_hold_the_last_tokens_under_a_chunks_key():
    key, header = chunk(ids(100, 1))
    with pytest.raises(InvalidParams, match="last of its tokens"):
        check_chunk(SCOPE.ns, key, msgspec.structs.replace(header, tokens=ids(8, 5).tobytes()))
    with pytest.raises(InvalidParams, match="key"):
        check_chunk(SCOPE.ns, b"p" * 32, header)


# -- spans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [[(5, 5)], [(6, 5)], [(-1, 5)], [(0, 11)], [(0, 5), (4, 8)], [(5, 8), (0, 5)]])
def test_spans_that_are_empty_overlap_or_leave_the_prompt(spans):
    with pytest.raises(InvalidParams):
        check_spans(spans, 10)


def test_a_span_longer_than_a_chunk_may_be():
    check_spans([(0, MAX_CHUNK_TOKENS)], 10**6)
    with pytest.raises(InvalidParams, match="more than"):
        check_spans([(0, MAX_CHUNK_TOKENS + 1)], 10**6)


def test_between_separators():
    def split(tokens, separator):
        return between(np.array(tokens, np.int32), np.array(separator, np.int32))

    assert split([1, 9, 2, 3, 9, 4, 9, 5], [9]) == [(2, 4), (5, 6)]
    assert split([1, 7, 8, 2, 7, 8, 7, 8, 3], [7, 8]) == [(3, 4)]
    assert split([9, 9, 9, 9, 1, 9, 9], [9, 9]) == [(4, 5)]
    assert split([1, 2, 3], [9]) == split([1, 9, 2], [9]) == split([1], [9, 9]) == split([1, 2], []) == []
