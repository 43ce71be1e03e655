"""What of a server's answers reaches the parser: every answer that is one, however it is cut, and nothing boundless."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import InvalidResponse

from kvstore.remote.clients import MOST_BYTES, MOST_ITEMS, Bounds

ANSWERS = st.recursive(
    st.one_of(
        st.binary(max_size=80).map(lambda value: b"$%d\r\n%b\r\n" % (len(value), value)),
        st.integers(-(1 << 63), (1 << 63) - 1).map(lambda number: b":%d\r\n" % number),
        st.sampled_from([b"+OK\r\n", b"$-1\r\n", b"*-1\r\n", b"_\r\n", b"-ERR no\r\n", b"$4\r\n*9\r\n\r\n"]),
    ),
    lambda item: st.lists(item, max_size=5).map(lambda items: b"*%d\r\n%b" % (len(items), b"".join(items))),
    max_leaves=20,
)


def see(bounds: Bounds, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        bounds.look(piece)


@given(st.lists(ANSWERS, max_size=8), st.data())
def test_answers_pass_however_they_are_cut(answers: list[bytes], data: st.DataObject) -> None:
    """Also strings that look like headers: after them a header is seen as one again."""
    bounds, rest = Bounds(), b"".join(answers)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        bounds.look(rest[:size])
        rest = rest[size:]
    with pytest.raises(InvalidResponse):
        bounds.look(b"*%d\r\n" % (MOST_ITEMS + 1))


@pytest.mark.parametrize(
    "head", [b"*%d\r\n" % (MOST_ITEMS + 1), b"$%d\r\n" % (MOST_BYTES + 1), b"%" + b"9" * 30 + b"\r\n"]
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_announces_too_much_does_not_pass(head: bytes, size: int) -> None:
    bounds = Bounds()
    bounds.look(b"*2\r\n$11\r\n*99999999\r\n\r\n")
    with pytest.raises(InvalidResponse, match="announces"):
        see(bounds, (head[at : at + size] for at in range(0, len(head), size)))


def test_arrays_in_arrays_have_one_bound() -> None:
    """Each is memory as soon as it is announced."""
    bounds, most = Bounds(), b"*%d\r\n" % MOST_ITEMS
    see(bounds, [most, most])
    bounds.answered()
    see(bounds, [most, most])
    with pytest.raises(InvalidResponse, match="announces"):
        bounds.look(b"*1\r\n")


def test_an_answer_ends_and_the_next_has_its_own_bound() -> None:
    bounds, piece = Bounds(), b"$%d\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
    for _ in range(2 * MOST_BYTES // len(piece)):
        bounds.look(piece)
        bounds.answered()
    with pytest.raises(InvalidResponse, match="no end"):
        see(bounds, [piece] * (2 * MOST_BYTES // len(piece)))


def test_a_line_has_an_end() -> None:
    bounds = Bounds()
    with pytest.raises(InvalidResponse, match="a line has no end"):
        see(bounds, [b"+" * 1000] * 100)
