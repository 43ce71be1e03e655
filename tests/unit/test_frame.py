"""The frame parser: however a stream is cut it gives the same frames, and no stream makes it hold more than it may."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import FrameTooLarge, ProtocolError
from kvstore.wire.frame import MAX_HEAD_BYTES, FrameReader, pack

MAX_HEAD = 100_000
MAX_PAYLOAD = 50_000
ROOM = 64 * 1024 + 8
"""What a reader may hold beside the largest head."""

frames = st.tuples(st.binary(max_size=300), st.one_of(st.just(b""), st.binary(max_size=300)))


class Sink:
    """The owner of a reader: keeps what it is told, and gives payloads places of odd sizes."""

    def __init__(self, max_head: int = MAX_HEAD, max_payload: int = MAX_PAYLOAD) -> None:
        self.frames: list[tuple[bytes, bytes]] = []
        self._head = b""
        self._places: list[bytearray] = []
        self.reader = FrameReader(self._on_head, self._on_frame, max_head=max_head, max_payload=max_payload)

    def _on_head(self, head: bytes, payload_bytes: int) -> list[memoryview]:
        if not payload_bytes:
            self.frames.append((head, b""))
            return []
        third = payload_bytes // 3
        self._head = head
        self._places = [bytearray(third), bytearray(), bytearray(payload_bytes - third)]
        return [memoryview(place) for place in self._places]

    def _on_frame(self) -> None:
        self.frames.append((self._head, b"".join(self._places)))

    def feed(self, data: bytes, most: int = 1 << 30) -> None:
        """Hand bytes over as a transport does: into the reader's own buffer, as many as fit."""
        rest = memoryview(data)
        while len(rest):
            into = self.reader.buffer()
            assert len(into) > 0
            take = min(len(into), len(rest), most)
            into[:take] = rest[:take]
            self.reader.advance(take)
            rest = rest[take:]

    @property
    def held(self) -> int:
        return len(self.reader._buffer)


@given(st.lists(frames, max_size=12), st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_any_split_of_a_stream_gives_the_same_frames(sent: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = b"".join(pack(head, len(payload)) + payload for head, payload in sent)
    sink = Sink()
    position = 0
    for turn in range(len(stream)):
        take = cuts[turn % len(cuts)]
        sink.feed(stream[position : position + take])
        position += take
        if position >= len(stream):
            break
    assert sink.frames == sent
    assert not sink.reader.mid_frame


@given(st.lists(frames, min_size=1, max_size=4), st.data())
def test_a_stream_cut_short_gives_only_whole_frames(sent: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    stream = b"".join(pack(head, len(payload)) + payload for head, payload in sent)
    cut = data.draw(st.integers(0, len(stream) - 1))
    sink = Sink()
    sink.feed(stream[:cut])
    assert sink.frames == sent[: len(sink.frames)]
    assert len(sink.frames) < len(sent)
    sink.feed(stream[cut:])
    assert sink.frames == sent


@given(st.binary(max_size=4000), st.integers(1, 700))
def test_any_bytes_give_frames_or_a_typed_error(junk: bytes, step: int) -> None:
    sink = Sink()
    try:
        sink.feed(junk, step)
    except ProtocolError:
        pass
    assert sink.held <= ROOM + MAX_HEAD


@given(st.lists(st.tuples(st.integers(0, MAX_HEAD), st.integers(500, 1 << 16)), max_size=6))
def test_what_is_held_stays_bounded_by_one_head(heads: list[tuple[int, int]]) -> None:
    sink = Sink()
    for nbytes, step in heads:
        sink.feed(pack(bytes(nbytes)), step)
        assert sink.held <= ROOM + MAX_HEAD
    assert [len(head) for head, _ in sink.frames] == [nbytes for nbytes, _ in heads]


def test_one_byte_at_a_time() -> None:
    sink = Sink()
    sent = [(b"first", b""), (b"", b""), (b"second", b"p" * 999), (b"third", b"")]
    sink.feed(b"".join(pack(head, len(payload)) + payload for head, payload in sent), most=1)
    assert sink.frames == sent


@pytest.mark.parametrize("nbytes", [MAX_HEAD + 1, 0xFFFF_FFFF])
def test_a_head_over_the_limit_is_refused_before_anything_is_allocated(nbytes: int) -> None:
    sink = Sink()
    before = sink.held
    with pytest.raises(FrameTooLarge):
        sink.feed(struct.pack("<II", nbytes, 0))
    assert sink.held == before


def test_a_payload_over_the_limit_is_refused_with_its_prefix() -> None:
    sink = Sink()
    with pytest.raises(FrameTooLarge):
        sink.feed(struct.pack("<II", 1, MAX_PAYLOAD + 1))
    assert sink.frames == []


def test_where_payloads_are_not_allowed_one_byte_is_too_much() -> None:
    with pytest.raises(FrameTooLarge):
        Sink(max_payload=0).feed(pack(b"head", 1))


def test_a_payload_of_another_size_than_its_place_is_refused() -> None:
    place = bytearray(10)
    reader = FrameReader(lambda head, nbytes: [memoryview(place)], lambda: None, max_payload=MAX_PAYLOAD)
    data = pack(b"head", 11)
    reader.buffer()[: len(data)] = data
    with pytest.raises(ProtocolError):
        reader.advance(len(data))


def test_the_largest_head_passes() -> None:
    sink = Sink(max_head=MAX_HEAD_BYTES)
    head = bytes(range(256)) * (MAX_HEAD_BYTES // 256)
    sink.feed(pack(head) + pack(b"next"))
    assert sink.frames == [(head, b""), (b"next", b"")]


def test_memory_of_a_large_head_is_given_back() -> None:
    """A connection that once sent a large frame does not keep room for another."""
    sink = Sink(max_head=MAX_HEAD_BYTES)
    sink.feed(pack(bytes(MAX_HEAD_BYTES)))
    sink.feed(pack(b"small"))
    sink.reader.buffer()
    assert sink.held <= ROOM


def test_a_payload_goes_straight_into_its_place() -> None:
    """Bytes of a payload that come after the head are received where they belong, not copied there."""
    place = bytearray(100)
    reader = FrameReader(lambda head, nbytes: [memoryview(place)], lambda: None, max_payload=100)
    data = pack(b"head", 100) + b"a" * 40
    reader.buffer()[: len(data)] = data
    reader.advance(len(data))
    assert bytes(place[:40]) == b"a" * 40
    into = reader.buffer()
    assert len(into) == 60
    into[:] = b"b" * 60
    reader.advance(60)
    assert bytes(place) == b"a" * 40 + b"b" * 60
    assert not reader.mid_frame


def test_a_paused_reader_keeps_what_came_and_goes_on_later() -> None:
    sink = Sink()
    take_one = sink.reader._on_head

    def on_head(head: bytes, nbytes: int) -> list[memoryview]:
        sink.reader.paused = True
        return list(take_one(head, nbytes))

    sink.reader._on_head = on_head
    sent = [(b"one", b""), (b"two", b"payload"), (b"three", b"")]
    sink.feed(b"".join(pack(head, len(payload)) + payload for head, payload in sent))
    assert sink.frames == sent[:1]
    for seen in (2, 3):
        sink.reader.paused = False
        sink.reader.advance(0)
        assert sink.frames == sent[:seen]


def test_an_owner_that_fails_stops_the_stream() -> None:
    def on_head(head: bytes, nbytes: int) -> list[memoryview]:
        raise ProtocolError("not understood.")

    reader = FrameReader(on_head, lambda: None)
    data = pack(b"one") + pack(b"two")
    reader.buffer()[: len(data)] = data
    with pytest.raises(ProtocolError):
        reader.advance(len(data))
