"""Hostile bytes on the socket: a typed error or a closed connection, bounded memory, and nobody else notices."""

from __future__ import annotations

import itertools
import random
import struct
from typing import Any

import msgpack
import pytest
from daemons import NS, TOKEN, Bystander, Closed, DaemonProcess, Raw, Refused, key, until
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.wire.frame import MAX_HEAD_BYTES

pytestmark = pytest.mark.usefixtures("bystander")

MIB = 1 << 20
PROTOCOL, TOO_LARGE, UNKNOWN, INVALID = "KV200", "KV201", "KV202", "KV203"


def framed(head: bytes, payload_bytes: int = 0) -> bytes:
    return struct.pack("<II", len(head), payload_bytes) + head


def call(*message: Any) -> bytes:
    return framed(msgpack.packb(list(message)) or b"")


BOMB = b"\x91" * 200_000

ENDS: list[tuple[str, bytes, str]] = [
    ("oversized head", struct.pack("<II", MAX_HEAD_BYTES + 1, 0), TOO_LARGE),
    ("huge head", b"\xff" * 8, TOO_LARGE),
    ("payload without permission", framed(b"\x94\x00\x01\xa5stats\x90", 1), TOO_LARGE),
    ("huge payload", struct.pack("<II", 1, 0xFFFF_FFFF), TOO_LARGE),
    ("HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", TOO_LARGE),
    ("empty head", framed(b""), PROTOCOL),
    ("not msgpack", framed(b"\xc1\xc1\xc1"), PROTOCOL),
    ("a number", framed(b"\x07"), PROTOCOL),
    ("a map", framed(msgpack.packb({"kind": 0}) or b""), PROTOCOL),
    ("too few fields", call(0, 1, "stats"), PROTOCOL),
    ("too many fields", call(0, 1, "stats", [], None), PROTOCOL),
    ("a reply", call(1, 1, None, []), PROTOCOL),
    ("a kind of 3", call(3, 1, "stats", []), PROTOCOL),
    ("a kind of text", call("0", 1, "stats", []), PROTOCOL),
    ("negative id", call(0, -1, "stats", []), PROTOCOL),
    ("id of 33 bits", call(0, 1 << 32, "stats", []), PROTOCOL),
    ("verb as bytes", call(0, 1, b"stats", []), PROTOCOL),
    ("verb as a number", call(0, 1, 7, []), PROTOCOL),
    ("verb not UTF-8", framed(b"\x94\x00\x01\xa3\xff\xfe\xfd\x90"), PROTOCOL),
    ("head cut short", framed(b"\x94\x00\x01"), PROTOCOL),
    ("bytes after the message", framed(b"\x94\x00\x01\xa5stats\x90\x00"), PROTOCOL),
    ("nesting bomb", framed(BOMB), PROTOCOL),
    ("nesting bomb as parameters", framed(b"\x94\x00\x01\xa5stats" + BOMB), PROTOCOL),
    ("array of 4 Gi", framed(b"\xdd\xff\xff\xff\xff"), PROTOCOL),
    ("map of 4 Gi", framed(b"\xdf\xff\xff\xff\xff"), PROTOCOL),
    ("text of 4 GiB", framed(b"\xdb\xff\xff\xff\xff"), PROTOCOL),
    ("bytes of 4 GiB as parameters", framed(b"\x94\x00\x01\xa5stats\xc6\xff\xff\xff\xff"), PROTOCOL),
    ("extension type", framed(msgpack.packb(msgpack.ExtType(5, b"payload")) or b""), PROTOCOL),
    ("pickle", framed(b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x94."), PROTOCOL),
    ("old pickle", framed(b"cos\nsystem\n(S'id'\ntR."), PROTOCOL),
    ("notice with a payload", framed(b"\x93\x02\xa5abort\x91\x01", 4), TOO_LARGE),
]
"""What ends the connection that sent it, and the code of the last words."""


@pytest.mark.parametrize(("sent", "code"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS])
def test_a_broken_stream_ends_with_a_typed_error(shared_daemon: DaemonProcess, sent: bytes, code: str) -> None:
    with Raw(shared_daemon.socket) as raw:
        raw.send(sent)
        assert raw.last_words() == [code]


@pytest.mark.parametrize(("sent", "code"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS])
def test_the_same_before_hello(shared_daemon: DaemonProcess, sent: bytes, code: str) -> None:
    with Raw(shared_daemon.socket, hello=False) as raw:
        raw.send(sent)
        assert raw.last_words() == [code]


BAD_PARAMS: list[tuple[str, Any, str]] = [
    ("nonsense", [], UNKNOWN),
    ("", [], UNKNOWN),
    ("_limit", [], UNKNOWN),
    ("call", [], UNKNOWN),
    ("payload", [1, 0], UNKNOWN),
    ("x" * 100_000, [], UNKNOWN),
    ("stats", None, INVALID),
    ("stats", {}, INVALID),
    ("stats", [1], INVALID),
    ("stats", msgpack.ExtType(1, b"x"), INVALID),
    ("stats", msgpack.Timestamp(1, 1), INVALID),
    ("lookup", [NS, b"x" * 31], INVALID),
    ("lookup", [NS, b"", True, "surplus"], INVALID),
    ("lookup", [NS], INVALID),
    ("lookup", [msgpack.ExtType(2, NS), b""], INVALID),
    ("lookup", [NS, bytes(16_385 * 32)], INVALID),
    ("lease", [NS, b"x" * 33], INVALID),
    ("lease", [NS, b"", float("nan")], INVALID),
    ("lease", [NS, b"", -5.0], INVALID),
    ("reserve", [NS, [[key(1), 1, b"not msgpack"]]], INVALID),
    ("reserve", [NS, [[key(1), 1, b"\x81\xa5color\x01"]]], INVALID),
    ("reserve", [NS, [[key(1), 1, b"\x91" * 60_000]]], INVALID),
    ("reserve", [NS, [[key(1), 1, b"\x81\xa6tokens\xc6\xff\xff\xff\xff"]]], INVALID),
    ("reserve", [NS, [[key(1), 0]]], INVALID),
    ("pin", [NS, b"y" * 7], INVALID),
    ("drop", [NS, b"y" * 7], INVALID),
    ("prefetch", [NS, b"y" * 7], INVALID),
    ("hello", [1, "name", [{"model": "m", "surplus": 1}]], INVALID),
    ("hello", [1, "name", [{"model": "m" * (3 * MIB)}]], INVALID),
]


@pytest.mark.parametrize(("method", "params", "code"), BAD_PARAMS, ids=range(len(BAD_PARAMS)))
def test_a_bad_call_is_refused_and_the_connection_lives(
    shared_daemon: DaemonProcess, method: str, params: Any, code: str
) -> None:
    with Raw(shared_daemon.socket) as raw:
        assert raw.refusal(method, params) == code
        assert raw.call("lookup", [NS, key(10_000)]) == [b"", {}]
    assert until(shared_daemon.nothing_lent, "everything to be given back")


def test_bad_notices_are_passed_over(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket) as raw:
        for method, params, _ in BAD_PARAMS:
            raw.send(raw.frame([2, method, params]))
        for method in ("release", "abort", "commit", "fill", "fetch", "lease", "reserve", "drop"):
            raw.send(raw.frame([2, method, [1, 2, 3]]))
        assert raw.call("lookup", [NS, key(10_000)]) == [b"", {}]


def test_frames_in_pieces_of_one_byte_mix_with_others(shared_daemon: DaemonProcess) -> None:
    """Several connections send their frames a byte at a time, in turn; each gets its own answer."""
    raws = [Raw(shared_daemon.socket) for _ in range(4)]
    frames = [raw.frame([0, 77 + n, "lookup", [NS, key(n, "absent") * (n + 1), False]]) for n, raw in enumerate(raws)]
    for pieces in itertools.zip_longest(*frames):
        for raw, byte in zip(raws, pieces, strict=True):
            if byte is not None:
                raw.send(bytes([byte]))
    for n, raw in enumerate(raws):
        assert raw.answer() == [1, 77 + n, None, [bytes(n + 1), {}]]
        raw.close()


def test_many_frames_in_one_piece_are_all_answered(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket) as raw:
        raw.send(b"".join(raw.frame([0, n, "lookup", [NS, key(n, "absent"), False]]) for n in range(1, 1001)))
        assert [raw.answer()[1] for _ in range(1000)] == list(range(1, 1001))


def test_what_follows_a_broken_frame_is_not_run(shared_daemon: DaemonProcess) -> None:
    before = shared_daemon.stats()["requests"].get("prefetch", {"count": 0})["count"]
    with Raw(shared_daemon.socket) as raw:
        raw.send(raw.frame(b"\xc1") + raw.frame([0, 1, "prefetch", [NS, b""]]) * 100)
        assert raw.last_words() == [PROTOCOL]
    assert shared_daemon.stats()["requests"].get("prefetch", {"count": 0})["count"] == before


def test_large_frames_do_not_stay_in_memory(shared_daemon: DaemonProcess) -> None:
    """32 connections, each of which has sent a frame of nearly the limit and begun another, and stays."""
    before = shared_daemon.own_memory()
    raws = [Raw(shared_daemon.socket) for _ in range(32)]
    big = raws[0].frame([0, 1, "lookup", [NS, bytes(MAX_HEAD_BYTES - 100)]])
    for raw in raws:
        raw.send(big)
        assert raw.answer()[2][0] == INVALID
    until(lambda: shared_daemon.own_memory() - before < 24 * MIB, "the memory of large frames to be given back")
    for raw in raws:
        raw.send(struct.pack("<II", MAX_HEAD_BYTES, 0) + bytes(1000))
    shared_daemon.stats()
    assert shared_daemon.own_memory() - before < 24 * MIB
    for raw in raws:
        raw.close()


def test_bombs_do_not_cost_memory(shared_daemon: DaemonProcess) -> None:
    before = shared_daemon.own_memory()
    bombs = [row[1] for row in ENDS if len(row[1]) > 100_000 or b"\xff\xff\xff\xff" in row[1]]
    assert len(bombs) >= 6
    for bomb in bombs * 5:
        with Raw(shared_daemon.socket) as raw:
            raw.send(bomb)
            raw.last_words()
    assert shared_daemon.own_memory() - before < 24 * MIB


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=6), st.booleans())
def test_any_bytes_are_answered_or_end_the_connection(
    shared_daemon: DaemonProcess, parts: list[bytes], in_frames: bool
) -> None:
    """Whatever is sent, the daemon says something typed or nothing, and lets go when the client does."""
    with Raw(shared_daemon.socket) as raw:
        try:
            for part in parts:
                raw.send(framed(part) if in_frames else part)
            raw.sock.shutdown(1)  # nothing more will come
        except (Closed, OSError):
            pass
        for code in raw.last_words():
            assert code.startswith("KV2") or code in ("KV302", "KV303")


def test_a_damaged_conversation(shared_daemon: DaemonProcess, bystander: Bystander) -> None:
    """Good calls with one byte wrong somewhere: an answer, a typed error or a closed connection each time."""
    rng = random.Random(20)
    answered = refused = closed = 0
    for _ in range(300):
        with Raw(shared_daemon.socket) as raw:
            good = raw.frame([0, 1, "lookup", [NS, key(rng.randrange(9), "absent"), True]])
            position = rng.randrange(len(good))
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            raw.send(bytes(bad))
            raw.sock.shutdown(1)
            codes = raw.last_words()
            refused += bool(codes)
            closed += not codes
    answered = shared_daemon.stats()["requests"]["lookup"]["count"]
    assert refused > 100
    assert closed + answered > 0
    bystander.next_round()


# -- TCP ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS])
def test_a_broken_stream_over_tcp(shared_daemon: DaemonProcess, tcp_port: int, sent: bytes, code: str) -> None:
    """Payloads are allowed here, but only where one is awaited."""
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
        raw.send(sent)
        raw.sock.shutdown(1)
        words = raw.last_words()
        assert words in ([code], [PROTOCOL])


@pytest.mark.parametrize("method", ["stats", "lookup", "fetch", "hello", "fill"])
def test_payloads_where_none_is_awaited(shared_daemon: DaemonProcess, tcp_port: int, method: str) -> None:
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
        raw.send(raw.frame([0, 1, method, [99, 0]], payload_bytes=1 << 20) + bytes(1000))
        assert raw.last_words()[0] in (PROTOCOL, INVALID, "KV303")


def test_a_payload_of_another_size_than_the_block(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    for announced in (99, 101):
        with Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
            reservation, _, rooms, _ = raw.call("reserve", [NS, [[key(1, f"size{announced}"), 100]]])
            assert rooms == [[0, []]]
            raw.send(raw.frame([0, 9, "fill", [reservation, 0]], payload_bytes=announced) + bytes(announced))
            assert raw.last_words() == [PROTOCOL]
    assert until(shared_daemon.nothing_lent, "the room to be given back")


@pytest.mark.parametrize("as_notice", [False, True])
def test_a_fill_without_its_bytes_does_not_fill(shared_daemon: DaemonProcess, tcp_port: int, as_notice: bool) -> None:
    """Else what the memory held before would become readable as a block."""
    own = key(int(as_notice), "unfilled")
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as raw:
        reservation, _, rooms, _ = raw.call("reserve", [NS, [[own, 100]]])
        assert rooms == [[0, []]]
        if as_notice:
            raw.send(raw.frame([2, "fill", [reservation, 0]]))
        else:
            with pytest.raises((Refused, Closed)):
                raw.call("fill", [reservation, 0])
        try:
            (outcomes,) = raw.call("commit", [reservation, [0]])
            assert outcomes == [[0, "aborted"]]
        except Closed:
            pass
    with Raw(shared_daemon.socket) as raw:
        assert raw.call("lookup", [NS, own, False]) == [b"\x00", {}]
