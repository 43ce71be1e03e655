"""Names, headers and checksums of the disk format."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.disk.format import (
    ALIGN,
    MAX_HEADER,
    PART_BYTES,
    Shape,
    block_name,
    check_payload,
    decode_header,
    encode_header,
    is_block_id,
    is_domain,
    parse_name,
    part_sums,
    round_up,
    shape_of,
)
from kvstore.errors import CorruptBlock
from kvstore.types import BlockHeader, BlockId, Scope

BLOCK = BlockId(Scope("uid-1000", bytes(range(32))), bytes(range(32, 64)))
HEADER = BlockHeader(parent=b"p" * 32, tokens=b"t" * 1024, position=512)
PAYLOAD = random.Random(0).randbytes(2 * PART_BYTES + 77)


def encoded(payload: bytes = PAYLOAD) -> tuple[bytes, Shape]:
    shape = shape_of(BLOCK, HEADER, len(payload))
    return encode_header(BLOCK, HEADER, shape, part_sums([memoryview(payload)])), shape


def test_a_header_comes_back() -> None:
    raw, shape = encoded()
    assert len(raw) == shape.offset
    assert shape.offset % ALIGN == 0
    header, sums = decode_header(memoryview(raw), BLOCK, shape)
    assert header == HEADER
    check_payload([memoryview(PAYLOAD)], memoryview(bytes(10)), sums)


@pytest.mark.parametrize("n_tokens", [0, 1, 255, 1000, 5000, 100_000])
def test_the_shape_is_exact_before_encoding(n_tokens: int) -> None:
    header = BlockHeader(tokens=bytes(4 * n_tokens))
    shape = shape_of(BLOCK, header, 1)
    raw = encode_header(BLOCK, header, shape, part_sums([memoryview(b"x")]))
    assert len(raw) == shape.offset
    assert shape.offset - ALIGN < 40 + 4 * n_tokens + 400 <= shape.offset + ALIGN
    assert decode_header(raw, BLOCK, shape)[0] == header


def test_every_byte_of_the_header_counts() -> None:
    raw, shape = encoded()
    for position in range(len(raw)):
        for mask in (0x01, 0x80, 0xFF):
            bad = bytearray(raw)
            bad[position] ^= mask
            with pytest.raises(CorruptBlock):
                decode_header(bytes(bad), BLOCK, shape)


def test_a_header_of_another_length_is_refused() -> None:
    raw, shape = encoded()
    for length in (0, 1, 39, 40, len(raw) - 1):
        with pytest.raises(CorruptBlock):
            decode_header(raw[:length], BLOCK, shape)
    with pytest.raises(CorruptBlock):
        decode_header(raw + bytes(ALIGN), BLOCK, shape)


@pytest.mark.parametrize(
    "other",
    [
        BlockId(BLOCK.scope, b"x" * 32),
        BlockId(Scope("uid-1001", BLOCK.scope.ns), BLOCK.key),
        BlockId(Scope("uid-1000", b"n" * 32), BLOCK.key),
    ],
)
def test_a_header_of_another_block_is_refused(other: BlockId) -> None:
    raw, shape = encoded()
    with pytest.raises(CorruptBlock, match="another block"):
        decode_header(raw, other, shape)


def test_a_header_of_another_shape_is_refused() -> None:
    raw, shape = encoded()
    with pytest.raises(CorruptBlock):
        decode_header(raw, BLOCK, Shape(shape.offset, shape.nbytes + 1))


def test_a_newer_version_is_refused_in_words() -> None:
    raw, shape = encoded()
    bad = bytearray(raw)
    bad[8] = 2
    with pytest.raises(CorruptBlock, match="version 2"):
        decode_header(bytes(bad), BLOCK, shape)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=ALIGN), st.booleans())
def test_any_bytes_raise_only_corrupt_block(data: bytes, with_magic: bool) -> None:
    raw = (b"KVSBLOCK\x01\x00" if with_magic else b"") + data
    with pytest.raises(CorruptBlock):
        decode_header(raw.ljust(ALIGN, b"\0")[:ALIGN], BLOCK, Shape(ALIGN, 5))


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=600), claimed=st.integers(0, 2**32 - 1))
def test_any_body_under_a_right_checksum_raises_only_corrupt_block(body: bytes, claimed: int) -> None:
    from xxhash import xxh3_64_intdigest

    from kvstore.disk import format as fmt

    raw = bytearray(ALIGN)
    length = claimed if claimed % 2 else len(body)
    fmt._FIXED.pack_into(raw, 0, b"KVSBLOCK", 1, 0, ALIGN, length, 0, 5, 0)
    raw[40 : 40 + len(body)] = body
    fmt._CHECKSUM.pack_into(raw, 32, xxh3_64_intdigest(raw))
    with pytest.raises(CorruptBlock):
        decode_header(bytes(raw), BLOCK, Shape(ALIGN, 5))


# -- payload -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * PART_BYTES), st.lists(st.integers(0, 3 * PART_BYTES), max_size=6))
def test_checksums_do_not_depend_on_how_the_payload_is_cut(nbytes: int, cuts: list[int]) -> None:
    data = memoryview(PAYLOAD * 2)[:nbytes]
    edges = [0, *sorted(min(cut, nbytes) for cut in cuts), nbytes]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    sums = part_sums([data])
    assert len(sums) == 8 * -(-nbytes // PART_BYTES)
    assert part_sums(pieces) == sums


def test_a_wrong_byte_anywhere_in_the_payload_is_seen() -> None:
    sums = part_sums([memoryview(PAYLOAD)])
    bad = bytearray(PAYLOAD)
    for position in [*range(0, len(bad), 9973), PART_BYTES - 1, PART_BYTES, len(bad) - 1]:
        bad[position] ^= 1
        with pytest.raises(CorruptBlock):
            check_payload([memoryview(bad)], memoryview(b""), sums)
        bad[position] ^= 1
    check_payload([memoryview(bad)], memoryview(b""), sums)
    with pytest.raises(CorruptBlock, match="padding"):
        check_payload([memoryview(bad)], memoryview(b"\0\0\1\0"), sums)


# -- names -------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, MAX_HEADER // ALIGN), st.integers(0, 1 << 36))
def test_a_name_comes_back(key: bytes, header_pages: int, nbytes: int) -> None:
    shape = Shape(header_pages * ALIGN, nbytes)
    assert parse_name(block_name(key, shape)) == (key, shape)


KEY = "ab" * 32


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        ".kv",
        f"{KEY}.kv",
        f"{KEY}-1000-.kv",
        f"{KEY}-1000-5.tmp",
        f"{KEY}-1000-5.kv ",
        f"{KEY}-1000-5.kv\n",
        f"{KEY.upper()}-1000-5.kv",
        f"{KEY[:-2]}-1000-5.kv",
        f"{KEY}ab-1000-5.kv",
        f"{KEY}-1000-05.kv",
        f"{KEY}-01000-5.kv",
        f"{KEY}-1001-5.kv",
        f"{KEY}-fff-5.kv",
        f"{KEY}-0000-5.kv",
        f"{KEY}-101000-5.kv",
        f"{KEY}-1000-fffffffffff.kv",
        f"{KEY}-1000-ffffffffff.kv",
        f"{KEY}-1000--5.kv",
        f"../{KEY}-1000-5.kv",
        f"{KEY}-1000-5.kv/..",
    ],
)
def test_a_foreign_name_is_none(name: str) -> None:
    assert parse_name(name) is None


@given(st.text(max_size=120))
def test_any_name_is_parsed_without_an_exception(name: str) -> None:
    parsed = parse_name(name)
    assert parsed is None or block_name(*parsed) == name


@pytest.mark.parametrize("name", ["uid-0", "u", "A_b.c@d-9", "x" * 64])
def test_a_domain_that_may_be_a_directory(name: str) -> None:
    assert is_domain(name)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "a\0", "-x", ".x", "x" * 65, "ü", "a b", "a\n"])
def test_a_domain_that_may_not(name: str) -> None:
    assert not is_domain(name)
    assert not is_block_id(BlockId(Scope(name, bytes(32)), bytes(32)))


def test_identities_have_their_length() -> None:
    assert is_block_id(BLOCK)
    assert not is_block_id(BlockId(Scope("u", bytes(31)), bytes(32)))
    assert not is_block_id(BlockId(Scope("u", bytes(32)), bytes(33)))


def test_cost_covers_the_file() -> None:
    assert round_up(0) == 0
    assert round_up(1) == round_up(ALIGN) == ALIGN
    shape = Shape(ALIGN, ALIGN + 1)
    assert shape.file_bytes == 3 * ALIGN
    assert shape.cost > shape.file_bytes
