"""Answers that come late, are wrong, or that nobody asked for: what becomes of them, without a daemon."""

from __future__ import annotations

import pytest

from kvstore.client.mailbox import Mailbox
from kvstore.errors import ConnectionLost, FrameTooLarge, KVStoreError, ProtocolError
from kvstore.wire import envelope, frame
from kvstore.wire import messages as m


class Told:
    """A mailbox and what it told the daemon."""

    def __init__(self) -> None:
        self.said: list[tuple[str, m.Message]] = []
        self.mailbox = Mailbox(lambda method, params: self.said.append((method, params)))

    def hear(self, data: bytes) -> None:
        self.mailbox.reader.buffer()[: len(data)] = data
        self.mailbox.reader.advance(len(data))

    def reply(self, call_id: int, result: m.Message) -> None:
        self.hear(frame.pack(envelope.encode_reply(call_id, result)))


def test_a_late_lease_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("lease", m.Lease(bytes(32), b""), 0, [])
    assert told.mailbox.abandon(pending)
    told.reply(1, m.LeaseReply(77, 30.0, [], [], 3))
    assert told.said == [("release", m.Release([77]))]


def test_a_late_reservation_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("reserve", m.Reserve(bytes(32), []), 0, [])
    assert told.mailbox.abandon(pending)
    told.reply(1, m.ReserveReply(78, 30.0, [], []))
    assert told.said == [("abort", m.Abort(78))]


def test_a_grant_that_comes_in_the_moment_of_giving_up_is_given_back() -> None:
    told = Told()
    pending, _ = told.mailbox.call("lease", m.Lease(bytes(32), b""), 0, [])
    told.reply(1, m.LeaseReply(77, 30.0, [], [], 0))
    assert told.said == []
    assert told.mailbox.abandon(pending)
    assert told.said == [("release", m.Release([77]))]


def test_an_answer_into_a_callers_buffer_cannot_be_abandoned() -> None:
    told = Told()
    pending, _ = told.mailbox.call("fetch", m.Fetch(1, 0), 0, [memoryview(bytearray(10))])
    assert not told.mailbox.abandon(pending)


@pytest.mark.parametrize(
    "answer",
    [
        envelope.encode_reply(2, m.Empty()),  # to a call that was not made
        envelope.encode_reply(1, m.CountReply(1)),  # of another verb
        envelope.encode_request(1, "lookup", m.Lookup(bytes(32), b"")),
        envelope.encode_notice("unknown", m.Empty()),
        b"\xc1",
        b"",
    ],
)
def test_an_answer_that_cannot_be_is_a_protocol_error(answer: bytes) -> None:
    told = Told()
    pending, _ = told.mailbox.call("lookup", m.Lookup(bytes(32), b""), 0, [])
    with pytest.raises(ProtocolError):
        told.hear(frame.pack(answer))
    woken: list[bool] = []
    pending.wake = lambda: woken.append(True)
    told.mailbox.fail(ConnectionLost("gone."))  # what the face does next reaches the caller who waits
    assert woken == [True]
    assert isinstance(pending.result, KVStoreError)


def test_what_the_daemon_says_of_the_connection_is_raised() -> None:
    told = Told()
    with pytest.raises(FrameTooLarge):
        told.hear(frame.pack(envelope.encode_error(0, FrameTooLarge("too large."))))


def test_a_payload_that_nobody_asked_for_is_refused() -> None:
    told = Told()
    told.mailbox.call("lookup", m.Lookup(bytes(32), b""), 0, [])
    with pytest.raises(ProtocolError):
        told.hear(frame.pack(envelope.encode_reply(1, m.LookupReply(b"")), 1 << 30))


def test_numbers_of_calls_go_round() -> None:
    told = Told()
    told.mailbox._next = 0xFFFF_FFFE
    for expected in (0xFFFF_FFFF, 1, 2):
        pending, _ = told.mailbox.call("stats", m.Stats(), 0, [])
        told.reply(expected, m.StatsReply({}))
        assert pending.result == m.StatsReply({})
