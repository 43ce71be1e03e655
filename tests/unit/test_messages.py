"""Messages: whatever bytes come, only typed errors; what we encode another msgpack library reads, and vice versa."""

from __future__ import annotations

import contextlib
import math
from typing import Any, cast

import msgpack
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.errors import BY_CODE, InvalidParams, KVStoreError, ProtocolError, UnknownMethod, from_wire
from kvstore.quotas import QuotaRule
from kvstore.types import DIGEST_BYTES, BlockHeader, Namespace
from kvstore.wire import envelope
from kvstore.wire import messages as m

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
"""Anything msgpack can say."""

digests = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
keys = st.lists(digests, max_size=4).map(b"".join)
seconds = st.floats(0, 86_400)
shares = st.floats(0, 1)
handles = st.integers(0, (1 << 63) - 1)
small = st.integers(0, m.MAX_KEYS)
texts = st.text(max_size=20)
counts = st.integers(0, (1 << 53))
extents = st.lists(st.tuples(counts, counts, counts), max_size=3).map(tuple)
namespaces = st.builds(Namespace, model=texts, revision=texts, layers=counts, tenant=texts, salt=texts)
offers = st.builds(m.Offer, digests, st.integers(1, 1 << 32), st.binary(max_size=50))
grants = st.builds(m.Grant, small, counts, small, extents, st.binary(max_size=30))
refusals = st.builds(m.Refusal, small, texts)
rules = st.builds(QuotaRule, name=st.just("a.b-1"), tenant=st.text(max_size=5), priority=st.integers(-100, 100))

verdicts = st.builds(m.Verdict, shares, st.text(min_size=1, max_size=9), counts, seconds, shares, seconds, shares)

PARAMS: dict[str, st.SearchStrategy[m.Message]] = {
    "hello": st.builds(m.Hello, small, texts, st.lists(namespaces, max_size=2), texts),
    "lookup": st.builds(m.Lookup, digests, keys, st.booleans()),
    "lease": st.builds(m.Lease, digests, keys, seconds, st.booleans()),
    "reach": st.builds(m.Reach, handles, st.binary(min_size=16, max_size=16)),
    "open_slab": st.builds(m.OpenSlab, handles),
    "slabs": st.builds(m.Slabs),
    "release": st.builds(m.Release, st.lists(handles, max_size=5)),
    "reserve": st.builds(m.Reserve, digests, st.lists(offers, max_size=3), seconds, seconds),
    "commit": st.builds(m.Commit, handles, st.lists(small, max_size=4), st.booleans()),
    "abort": st.builds(m.Abort, handles),
    "fetch": st.builds(m.Fetch, handles, small),
    "fill": st.builds(m.Fill, handles, small),
    "prefetch": st.builds(m.Prefetch, digests, keys, st.booleans()),
    "match": st.builds(
        m.Match,
        digests,
        st.binary(max_size=20),
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3),
        st.binary(max_size=8),
        st.booleans(),
        st.lists(st.text(min_size=1, max_size=9), max_size=2),
    ),
    "events": st.builds(m.Events, st.binary(max_size=16), handles, handles, seconds, st.integers(1, m.MAX_KEYS)),
    "quota": st.builds(m.Quota, st.none() | rules, st.text(max_size=8)),
    "report": st.builds(m.Report, digests, counts, counts, counts, st.none() | verdicts),
    "explain": st.builds(m.Explain, digests, keys),
    "leases": st.builds(m.Leases),
    "policy": st.builds(m.Policy, st.text(max_size=8), st.text(max_size=8)),
    "pin": st.builds(m.Pin, digests, keys, seconds),
    "unpin": st.builds(m.Unpin, digests, keys),
    "drop": st.builds(m.Drop, digests, st.none() | keys),
    "stats": st.builds(m.Stats),
}
RESULTS: dict[str, st.SearchStrategy[m.Message]] = {
    "hello": st.builds(
        m.HelloReply, small, texts, st.binary(max_size=16), st.binary(max_size=16), texts, st.booleans(), counts, counts
    ),
    "lookup": st.builds(
        m.LookupReply,
        st.binary(max_size=20),
        st.dictionaries(small, st.tuples(seconds, seconds, seconds), max_size=2),
    ),
    "lease": st.builds(
        m.LeaseReply, handles, seconds, st.lists(grants, max_size=2), st.lists(refusals, max_size=2), small
    ),
    "reserve": st.builds(
        m.ReserveReply,
        handles,
        seconds,
        st.lists(st.builds(m.Room, small, extents), max_size=2),
        st.lists(st.builds(m.NoRoom, small, texts), max_size=2),
    ),
    "reach": st.builds(
        m.ReachReply, st.binary(max_size=16), st.lists(st.builds(m.Place, small, counts, counts), max_size=2)
    ),
    "open_slab": st.builds(m.OpenSlabReply, counts, st.binary(max_size=64)),
    "slabs": st.builds(m.SlabsReply, st.lists(counts, max_size=8)),
    "commit": st.builds(m.CommitReply, st.lists(st.builds(m.Outcome, small, texts), max_size=3)),
    "stats": st.builds(m.StatsReply, st.dictionaries(texts, plain, max_size=3)),
    "quota": st.builds(m.QuotaReply, st.lists(rules, max_size=2), st.dictionaries(texts, plain, max_size=2)),
    "explain": st.builds(m.ExplainReply, st.lists(st.dictionaries(texts, plain, max_size=2), max_size=2)),
    "leases": st.builds(m.LeasesReply, st.lists(st.dictionaries(texts, plain, max_size=2), max_size=2)),
    "policy": st.builds(m.PolicyReply, st.dictionaries(texts, texts, max_size=2)),
    "match": st.builds(
        m.MatchReply,
        st.lists(st.builds(m.Found, counts, counts, digests, counts, small, texts, st.floats(0, 1)), max_size=2),
        st.lists(st.tuples(counts, counts), max_size=2),
    ),
    "events": st.builds(
        m.EventsReply,
        st.binary(max_size=16),
        counts,
        st.booleans(),
        counts,
        st.lists(st.builds(m.Event, counts, texts, digests, small, keys, st.lists(counts, max_size=3)), max_size=2),
    ),
    **{name: st.builds(m.CountReply, counts) for name in ("prefetch", "pin", "unpin", "drop")},
    **{name: st.builds(m.Empty) for name in ("release", "abort", "fetch", "fill", "report")},
}


def packed(value: Any) -> bytes:
    """As the other library encodes it."""
    return cast(bytes, msgpack.packb(value))


def as_plain(value: Any) -> Any:
    """A message as the values another library sees: arrays in field order, namespaces as maps."""
    if isinstance(value, Namespace):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, QuotaRule):
        return msgspec.to_builtins(value)
    if isinstance(value, m.Message):
        return [as_plain(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    return value


def test_every_verb_is_covered_here() -> None:
    assert PARAMS.keys() == RESULTS.keys() == m.METHODS.keys()


# -- two libraries, one meaning ----------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(sorted(PARAMS)), st.integers(0, (1 << 32) - 1))
def test_calls_mean_the_same_to_another_library(data: st.DataObject, method: str, call_id: int) -> None:
    params = data.draw(PARAMS[method])
    wire = envelope.encode_request(call_id, method, params)
    said = msgpack.unpackb(wire)
    assert said == [envelope.REQUEST, call_id, method, as_plain(params)]
    theirs = envelope.decode_request(packed(said))
    assert isinstance(theirs, envelope.Request)
    assert (theirs.id, theirs.method) == (call_id, method)
    assert envelope.decode_params(method, theirs.params) == params


@given(st.data(), st.sampled_from(sorted(RESULTS)), st.integers(0, (1 << 32) - 1))
def test_answers_mean_the_same_to_another_library(data: st.DataObject, method: str, call_id: int) -> None:
    result = data.draw(RESULTS[method])
    said = msgpack.unpackb(envelope.encode_reply(call_id, result), strict_map_key=False)
    assert said == [envelope.REPLY, call_id, None, as_plain(result)]
    theirs = envelope.decode_answer(packed(said))
    assert isinstance(theirs, envelope.Answer)
    assert theirs.error is None
    assert envelope.decode_result(method, theirs.result) == result


@given(st.builds(m.LeaseNotice, handles, st.lists(grants, max_size=3), st.lists(refusals, max_size=3)))
def test_notices_mean_the_same_to_another_library(notice: m.LeaseNotice) -> None:
    said = msgpack.unpackb(envelope.encode_notice("leased", notice))
    assert said == [envelope.NOTICE, "leased", as_plain(notice)]
    for decode in (envelope.decode_request, envelope.decode_answer):
        theirs = decode(packed(said))
        assert isinstance(theirs, envelope.Notice)
        assert envelope.decode_notice(theirs) == notice


@given(plain)
def test_the_two_libraries_read_each_other(value: Any) -> None:
    assert msgpack.unpackb(msgspec.msgpack.encode(value), strict_map_key=False) == value
    assert msgspec.msgpack.decode(packed(value)) == value


@given(st.builds(BlockHeader, parent=st.binary(max_size=32), tokens=st.binary(max_size=64), position=counts))
def test_block_headers_mean_the_same_to_another_library(header: BlockHeader) -> None:
    said = msgpack.unpackb(msgspec.msgpack.encode(header))
    assert BlockHeader(**said) == header
    assert msgspec.msgpack.decode(packed(said), type=BlockHeader) == header


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_travels(code: str) -> None:
    error = BY_CODE[code]("What happened.", "What to do.")
    answer = envelope.decode_answer(envelope.encode_error(7, error))
    assert isinstance(answer, envelope.Answer)
    assert answer.error is not None
    back = from_wire(*answer.error)
    assert (type(back), back.cause, back.remedy) == (type(error), error.cause, error.remedy)


def test_an_error_of_a_newer_daemon_is_still_an_error_of_ours() -> None:
    assert type(from_wire("KV999", "What.", "Do.")) is KVStoreError


# -- hostile bytes -----------------------------------------------------------------------------------------------------


def read_all(head: bytes) -> None:
    """Decode as daemon and as client would; only typed errors may come out."""
    with contextlib.suppress(ProtocolError):
        found = envelope.decode_request(head)
        if isinstance(found, envelope.Notice):
            envelope.decode_notice(found)
        envelope.decode_params(found.method, found.params)
    with contextlib.suppress(ProtocolError):
        found = envelope.decode_answer(head)
        if isinstance(found, envelope.Notice):
            envelope.decode_notice(found)
        else:
            envelope.decode_result("stats", found.result)


BOMB = b"\x91" * 100_000
"""Arrays in arrays, deeper than any stack."""
HOSTILE = [
    b"",
    b"\x93\x02",
    b"\x94\x00",
    BOMB,
    b"\x94\x00\x01\xa5stats" + BOMB,
    b"\x93\x02\xa6leased" + BOMB,
    b"\x94\x01\x01\xc0" + BOMB,
    b"\x81\xa1a" * 50_000,
    b"\xdd\xff\xff\xff\xff",  # an array of 4 Gi elements
    b"\xdf\xff\xff\xff\xff",  # a map of 4 Gi pairs
    b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
    b"\xdb\xff\xff\xff\xff",  # 4 GiB of text
    b"\xc9\xff\xff\xff\xff\x01",  # an extension of 4 GiB
    b"\x94\x00\x01\xa5stats\xdd\xff\xff\xff\xff",
    b"\x94\x00\x01\xa5stats\xc7\x08\xff" + bytes(8),  # a timestamp
    b"\x94\x00\x01\xa5\xff\xfe\xfd\xfc\xfb\x90",  # a verb that is not UTF-8
    b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    b"cos\nsystem\n(S'id'\ntR.",
    b"\xc1" * 10,  # the one byte that msgpack never uses
]


@pytest.mark.parametrize("head", HOSTILE, ids=range(len(HOSTILE)))
def test_known_attacks_are_typed_errors(head: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_request(head)
    read_all(head)


def read_request(head: bytes) -> m.Message:
    """As the daemon does."""
    request = envelope.decode_request(head)
    return envelope.decode_params(request.method, request.params)


@given(st.binary(max_size=200))
@example(b"\x94\x00\x01\xa5stats\x90")
def test_any_bytes_are_a_message_or_a_typed_error(head: bytes) -> None:
    read_all(head)


@given(plain)
def test_anything_msgpack_can_say_is_a_message_or_a_typed_error(value: Any) -> None:
    read_all(packed(value))


@given(st.sampled_from(sorted(m.METHODS)), plain)
def test_any_parameters_are_decoded_or_refused(method: str, params: Any) -> None:
    raw = msgspec.Raw(packed(params))
    try:
        decoded = envelope.decode_params(method, raw)
    except InvalidParams:
        return
    # What passes is of the type, so encoding and decoding it again changes nothing.
    assert envelope.decode_params(method, msgspec.Raw(msgspec.msgpack.encode(decoded))) == decoded


@given(st.data(), st.sampled_from(sorted(PARAMS)))
def test_one_damaged_byte_is_a_message_or_a_typed_error(data: st.DataObject, method: str) -> None:
    wire = bytearray(envelope.encode_request(1, method, data.draw(PARAMS[method])))
    wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    read_all(bytes(wire))


@given(st.data(), st.sampled_from(sorted(PARAMS)))
def test_parameters_cut_short_are_refused(data: st.DataObject, method: str) -> None:
    wire = envelope.encode_request(1, method, data.draw(PARAMS[method]))
    cut = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(ProtocolError):
        read_request(wire[:cut])


@pytest.mark.parametrize("method", sorted(m.METHODS))
def test_surplus_and_missing_fields_are_refused(method: str) -> None:
    fields = m.METHODS[method][0].__struct_fields__
    required = len(fields) - len(m.METHODS[method][0].__struct_defaults__)
    for params in ([None] * (len(fields) + 1), [0] * (len(fields) + 1), [None] * (required - 1)):
        if len(params) < required or len(params) > len(fields):
            with pytest.raises(InvalidParams):
                envelope.decode_params(method, msgspec.Raw(packed(params)))


@pytest.mark.parametrize("method", ["", "Lookup", "lookup ", "__class__", "call", "payload", "x" * 10_000, "ключ"])
def test_only_verbs_can_be_called(method: str) -> None:
    with pytest.raises(UnknownMethod) as caught:
        envelope.decode_params(method, msgspec.Raw(b"\x90"))
    assert len(caught.value.cause) < 200


NS = bytes(DIGEST_BYTES)
BAD: list[tuple[str, Any]] = [
    ("lookup", [NS[:-1], b""]),
    ("lookup", [NS + b"x", b""]),
    ("lookup", [NS.hex(), b""]),
    ("lookup", [NS, b"", 1]),
    ("lookup", [NS, [NS]]),
    ("lookup", [NS, bytes((m.MAX_KEYS + 1) * DIGEST_BYTES)]),
    ("lease", [NS, b"", -1.0]),
    ("lease", [NS, b"", math.inf]),
    ("lease", [NS, b"", math.nan]),
    ("lease", [NS, b"", 86_401.0]),
    ("lease", [NS, b"", "30"]),
    ("release", [[-1]]),
    ("release", [[1 << 63]]),
    ("release", [[1.5]]),
    ("release", [[True]]),
    ("release", [list(range(m.MAX_KEYS + 1))]),
    ("reserve", [NS, [[NS, 0]]]),
    ("reserve", [NS, [[NS, -1]]]),
    ("reserve", [NS, [[NS, (1 << 32) + 1]]]),
    ("reserve", [NS, [[NS, 1, bytes(64 * 1024 + 1)]]]),
    ("reserve", [NS, [[NS, 1]] * (m.MAX_KEYS + 1)]),
    ("reserve", [NS, [], 30.0, math.nan]),
    ("commit", [1, [-1]]),
    ("commit", [1, [m.MAX_KEYS + 1]]),
    ("commit", [1, "01"]),
    ("commit", [1, [0], "yes"]),
    ("fetch", [1, -1]),
    ("hello", ["1", "name", []]),
    ("hello", [1, "n" * 201, []]),
    ("hello", [1, "name", [{}]]),
    ("hello", [1, "name", [{"model": "m", "color": "red"}]]),
    ("hello", [1, "name", [{"model": 1}]]),
    ("hello", [1, "name", [{"model": "m"}] * 257]),
    ("hello", [1, "name", [], "t" * 1001]),
    ("drop", [NS]),
    ("stats", [1]),
    ("stats", {}),
]


@pytest.mark.parametrize(("method", "params"), BAD, ids=range(len(BAD)))
def test_values_out_of_range_are_refused(method: str, params: Any) -> None:
    with pytest.raises(InvalidParams):
        envelope.decode_params(method, msgspec.Raw(packed(params)))


@pytest.mark.parametrize("kind", [envelope.REPLY, envelope.NOTICE, 3, -1, "0", None, 0.0, True])
def test_a_client_may_only_send_calls_and_notices(kind: Any) -> None:
    with pytest.raises(ProtocolError):
        envelope.decode_request(packed([kind, 1, "stats", []]))


@pytest.mark.parametrize("kind", [envelope.REQUEST, envelope.NOTICE, 3, "1", None])
def test_a_daemon_may_only_send_answers_and_notices(kind: Any) -> None:
    with pytest.raises(ProtocolError):
        envelope.decode_answer(packed([kind, 1, None, []]))


@given(st.binary(max_size=300))
def test_keys_are_split_whole_or_refused(joined: bytes) -> None:
    if len(joined) % DIGEST_BYTES:
        with pytest.raises(InvalidParams):
            m.split_keys(joined)
    else:
        assert b"".join(m.split_keys(joined)) == joined
        assert {len(k) for k in m.split_keys(joined)} <= {DIGEST_BYTES}
