"""Handles of others, of nobody and of before: each is refused with a typed error and nothing is lent, lost or shown."""

from __future__ import annotations

from typing import Any

import pytest
from daemons import NS, SMALL, TOKEN, DaemonProcess, Raw, key, store, until

from kvstore.service import MAX_HANDLES

FOREIGN, UNKNOWN_NS, NO_HELLO, INVALID, LIMIT = "KV303", "KV302", "KV205", "KV203", "KV402"


def reserve(raw: Raw, *keys: bytes, nbytes: int = SMALL) -> int:
    reservation, _, rooms, others = raw.call("reserve", [NS, [[k, nbytes] for k in keys]])
    assert len(rooms) == len(keys), others
    return reservation


def lookup(raw: Raw, *keys: bytes) -> bytes:
    return raw.call("lookup", [NS, b"".join(keys), False])[0]


def test_before_hello_nothing_can_be_called(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket, hello=False) as raw:
        for method, params in {
            "lookup": [NS, b""],
            "lease": [NS, b""],
            "release": [[1]],
            "reserve": [NS, []],
            "commit": [1, []],
            "abort": [1],
            "prefetch": [NS, b""],
            "pin": [NS, b""],
            "unpin": [NS, b""],
            "drop": [NS, None],
            "stats": [],
        }.items():
            assert raw.refusal(method, params) == NO_HELLO


def test_before_the_token_nothing_can_be_called(shared_daemon: DaemonProcess, tcp_port: int) -> None:
    for method, params in {"stats": [], "fetch": [1, 0], "lookup": [NS, b""]}.items():
        with Raw(("127.0.0.1", tcp_port), hello=False) as raw:
            assert raw.refusal(method, params) == NO_HELLO
    with Raw(("127.0.0.1", tcp_port), hello=False) as raw:
        raw.send(raw.frame([0, 1, "fill", [1, 0]], payload_bytes=10) + bytes(10))
        assert raw.last_words() == [NO_HELLO]


def test_a_namespace_never_introduced(raw: Raw) -> None:
    nobody = bytes(32)
    assert raw.refusal("lookup", [nobody, b""]) == UNKNOWN_NS
    assert raw.refusal("lease", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("reserve", [nobody, [[key(1), 100]]]) == UNKNOWN_NS
    assert raw.refusal("prefetch", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("pin", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("unpin", [nobody, key(1)]) == UNKNOWN_NS
    assert raw.refusal("drop", [nobody, None]) == UNKNOWN_NS


def test_another_sessions_reservation(raw: Raw, other: Raw) -> None:
    own = key(1, "foreign reservation")
    reservation = reserve(other, own)
    assert raw.refusal("commit", [reservation, [0]]) == FOREIGN
    assert raw.call("abort", [reservation]) == []  # passed over
    assert lookup(other, own) == b"\x00"
    assert other.call("commit", [reservation, [0]]) == [[[0, "stored"]]]
    assert lookup(raw, own) == b"\x01"


def test_another_sessions_lease(shared_daemon: DaemonProcess, raw: Raw, other: Raw) -> None:
    own = key(1, "foreign lease")
    store(shared_daemon.client(), [own])
    lease = other.call("lease", [NS, own])[0]
    assert raw.call("release", [[lease]]) == []  # passed over
    stats = shared_daemon.stats()
    assert stats["leases"] == 1
    assert stats["tiers"]["host"]["leased_bytes"] == SMALL
    assert other.call("release", [[lease, lease, lease + 1]]) == []
    assert shared_daemon.stats()["leases"] == 0


@pytest.mark.parametrize("number", [0, 1, 999_999_999, (1 << 63) - 1])
def test_handles_of_nobody(raw: Raw, number: int) -> None:
    assert raw.refusal("commit", [number, [0]]) == FOREIGN
    assert raw.call("abort", [number]) == []
    assert raw.call("release", [[number] * 100]) == []


@pytest.mark.parametrize("number", [-1, 1 << 63, (1 << 64) - 1, 1.5, "1", None])
def test_handles_that_are_none(raw: Raw, number: Any) -> None:
    for method, params in {"commit": [number, [0]], "abort": [number], "release": [[number]]}.items():
        assert raw.refusal(method, params) == INVALID


@pytest.mark.parametrize("indexes", [[1], [0, 1], [16_384]])
def test_indexes_that_were_not_offered(raw: Raw, indexes: list[int]) -> None:
    """Nothing is stored, not even the index that is right; the reservation is as it was."""
    own = key(indexes[-1], f"index {len(indexes)}")
    reservation = reserve(raw, own)
    assert raw.refusal("commit", [reservation, indexes]) == FOREIGN
    assert lookup(raw, own) == b"\x00"
    assert raw.call("commit", [reservation, [0]]) == [[[0, "stored"]]]


def test_an_index_named_twice(raw: Raw) -> None:
    reservation = reserve(raw, key(1, "twice"))
    assert raw.refusal("commit", [reservation, [0, 0]]) == INVALID
    assert lookup(raw, key(1, "twice")) == b"\x00"


def test_commit_twice(raw: Raw) -> None:
    own = key(1, "commit twice")
    reservation = reserve(raw, own)
    assert raw.call("commit", [reservation, [0]]) == [[[0, "stored"]]]
    assert raw.refusal("commit", [reservation, [0]]) == FOREIGN
    assert raw.call("abort", [reservation]) == []
    assert lookup(raw, own) == b"\x01"


def test_what_a_commit_does_not_name_is_given_back(shared_daemon: DaemonProcess, raw: Raw) -> None:
    keys = [key(n, "in part") for n in range(3)]
    reservation = reserve(raw, *keys)
    assert raw.call("commit", [reservation, [1]]) == [[[1, "stored"]]]
    assert lookup(raw, *keys) == b"\x00\x01\x00"
    assert shared_daemon.nothing_lent()


def test_the_same_key_twice_in_one_request(raw: Raw) -> None:
    own = key(1, "same key")
    reservation, _, rooms, others = raw.call("reserve", [NS, [[own, 100], [own, 100]]])
    assert [room[0] for room in rooms] == [0]
    assert others == [[1, "in_flight"]]
    raw.call("abort", [reservation])
    assert reserve(raw, own)


def test_fetch_and_fill_need_a_remote_session(raw: Raw) -> None:
    assert raw.refusal("fetch", [1, 0]) == INVALID
    assert raw.refusal("fill", [1, 0]) == INVALID


def test_remote_handles_of_others(shared_daemon: DaemonProcess, tcp_port: int, other: Raw) -> None:
    own = key(1, "remote")
    store(shared_daemon.client(), [own])
    lease = other.call("lease", [NS, own])[0]
    reservation = reserve(other, key(2, "remote"))
    with Raw(("127.0.0.1", tcp_port), token=TOKEN) as far:
        mine = far.call("lease", [NS, own])[0]
        assert far.refusal("fetch", [lease, 0]) == FOREIGN
        assert far.refusal("fetch", [mine, 1]) == FOREIGN
        assert far.call("fetch", [mine, 0]) is not None
        far.call("release", [[mine]])
        assert far.refusal("fetch", [mine, 0]) == FOREIGN
        far.send(far.frame([0, 50, "fill", [reservation, 0]], payload_bytes=SMALL) + bytes(100))
        assert far.last_words() == [FOREIGN]


def test_so_many_handles_and_no_more(shared_daemon: DaemonProcess) -> None:
    with Raw(shared_daemon.socket, timeout_s=30) as raw:
        for verb, params in {"lease": [NS, b""], "reserve": [NS, []]}.items():
            frames = b"".join(raw.frame([0, n, verb, params]) for n in range(1, 11))
            answers: list[Any] = []
            for _ in range(MAX_HANDLES // 10 + 1):
                raw.send(frames)
                answers = [raw.answer() for _ in range(10)]
            errors = [answer[2][0] for answer in answers if answer[2] is not None]
            # A reservation without rooms ends at once; leases stay until they are released.
            assert set(errors) == ({LIMIT} if verb == "lease" else set())
    until(shared_daemon.nothing_lent, "everything to be given back")
