"""Every message of the protocol, typed. `docs/protocol.md` is generated from this file.

Request ``[0, id, method, params]``, reply ``[1, id, error, result]``, notice ``[2, method, params]``. Params and
results are arrays in field order. Decoding refuses unknown methods, wrong types, missing and surplus fields. msgpack
is decoded by msgspec straight into these types, so a hostile message is refused at its first wrong byte, before
anything is built from it; extension types are refused everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct

from kvstore.errors import InvalidParams, KVStoreError, ProtocolError, UnknownMethod
from kvstore.quotas import QuotaRule
from kvstore.types import DIGEST_BYTES, Label, Namespace

PROTOCOL_VERSION = 1
"""Raised when a message changes its meaning; `hello` refuses a peer of another version."""

MAX_KEYS = 16_384
"""Keys in one request: 4 Mi tokens at 256 a block."""

MAX_MATCH_TOKENS = 262_144
"""Tokens of a prompt in which chunks are looked for."""

REQUEST, REPLY, NOTICE = 0, 1, 2

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Keys = Annotated[bytes, Meta(max_length=MAX_KEYS * DIGEST_BYTES)]
"""Keys one after the other, 32 bytes each: one msgpack item however many there are."""
Handle = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Indexes = Annotated[list[Annotated[int, Meta(ge=0, le=MAX_KEYS)]], Meta(max_length=MAX_KEYS)]
Span = tuple[Annotated[int, Meta(ge=0, le=MAX_MATCH_TOKENS)], Annotated[int, Meta(ge=0, le=MAX_MATCH_TOKENS)]]
Seconds = Annotated[float, Meta(ge=0.0, le=86_400.0)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Measured = Annotated[float, Meta(ge=0.0, le=1e6)]


class Message(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of params and results. Trees, never cycles, so the garbage collector need not look at them."""


# -- hello -------------------------------------------------------------------------------------------------------------


class Hello(Message):
    """First call on a connection, and later to introduce more namespaces."""

    protocol: int
    client: Annotated[str, Meta(max_length=200)]
    namespaces: Annotated[list[Namespace], Meta(max_length=256)]
    token: Annotated[str, Meta(max_length=1000)] = ""


class HelloReply(Message):
    """Who the daemon is. A changed `boot` means a restart: every slab and handle of before is gone."""

    protocol: int
    version: str
    boot: bytes
    session: bytes
    domain: str
    shared_memory: bool
    max_block_bytes: int
    max_keys: int


# -- looking and reading
# ------------------------------------------------------------------------------------------------


class Lookup(Message):
    """Where blocks are. Free of side effects. With `prefix` the answer ends before the first absent block."""

    ns: Digest
    keys: Keys
    prefix: bool = True


class LookupReply(Message):
    """One byte a key: `kvstore.types.TierCode`. For tiers below host memory that hold some of them, what a load costs.

    That is, now and as measured: seconds of waiting, then seconds for each block and for each byte. What has not been
    measured yet is not said.
    """

    tiers: bytes
    speeds: dict[int, tuple[float, float, float]] = {}


class Lease(Message):
    """Ask for the right to read blocks for `ttl_s` seconds. Blocks in lower tiers are brought up."""

    ns: Digest
    keys: Keys
    ttl_s: Seconds = 30.0
    headers: bool = False


class Grant(Message):
    """A block that can be read now: `extents` are (slab, offset, nbytes); empty for a remote client."""

    index: int
    nbytes: int
    tier: int
    extents: tuple[tuple[int, int, int], ...]
    header: bytes = b""


class Refusal(Message):
    """A block that can not be had, and why (`kvstore.types.MissReason`)."""

    index: int
    reason: str


class LeaseReply(Message):
    """The right lasts `ttl_s` from when the request was sent. The `pending` blocks follow in `LeaseNotice`s."""

    lease: int
    ttl_s: float
    granted: list[Grant]
    refused: list[Refusal]
    pending: int


class LeaseNotice(Message):
    """Blocks of a lease that were pending and no longer are."""

    lease: int
    granted: list[Grant]
    refused: list[Refusal]


class Release(Message):
    """End leases. May be sent as a notice."""

    leases: Annotated[list[Handle], Meta(max_length=MAX_KEYS)]


class Prefetch(Message):
    """Bring blocks up without lending them, when nobody waits for others; or, to `cancel`, no longer do.

    What is queued fills at most a quarter of host memory; more is not taken, and not counted in the answer.
    """

    ns: Digest
    keys: Keys
    cancel: bool = False


class Match(Message):
    """Which parts of a prompt are stored chunks: of named `spans`, of what is between `separator`s, of all (`find`).

    Spans are half-open ranges of token positions, in order. Chunks whose lineage asks for other `labels` than these are
    not found. Each chunk found counts as used.
    """

    ns: Digest
    tokens: Annotated[bytes, Meta(max_length=4 * MAX_MATCH_TOKENS)]
    spans: Annotated[list[Span], Meta(max_length=4096)] = []
    separator: Annotated[bytes, Meta(max_length=256)] = b""
    find: bool = False
    labels: Annotated[list[Label], Meta(max_length=64)] = []


class Found(Message):
    """A chunk in a prompt: the `key` of its last block, whose header describes it (`kvstore.types.ChunkInfo`).

    It has so many blocks, each in some tier; `tier` is the farthest. `overhead` is Cache-Craft's fix overhead of the
    variant chosen here, 0 if it was computed behind exactly these tokens.
    """

    start: int
    stop: int
    key: bytes
    blocks: int
    tier: int
    capture: str
    overhead: float


class MatchReply(Message):
    """What was found, in order, and which of the spans asked for are no chunks yet."""

    found: list[Found]
    absent: list[tuple[int, int]]


class CountReply(Message):
    """How many blocks a verb applied to."""

    count: int


# -- writing -----------------------------------------------------------------------------------------------------------


class Offer(Message):
    """A block to be stored: key, payload bytes, and the msgpack of its `kvstore.types.BlockHeader`."""

    key: Digest
    nbytes: Annotated[int, Meta(ge=1, le=1 << 32)]
    header: Annotated[bytes, Meta(max_length=64 * 1024)] = b"\x80"


class Reserve(Message):
    """Ask for room. Waits up to `wait_s` for memory that is being written to a lower tier."""

    ns: Digest
    blocks: Annotated[list[Offer], Meta(max_length=MAX_KEYS)]
    ttl_s: Seconds = 30.0
    wait_s: Seconds = 0.0


class Room(Message):
    """Room for the offered block `index`; to be filled, then committed. Extents are empty for a remote client."""

    index: int
    extents: tuple[tuple[int, int, int], ...]


class NoRoom(Message):
    """The offered block `index` needs or gets no room: status ``exists`` or a `kvstore.types.DropReason`."""

    index: int
    status: str


class ReserveReply(Message):
    """The right lasts `ttl_s` from when the request was sent."""

    reservation: int
    ttl_s: float
    rooms: list[Room]
    others: list[NoRoom]


class Commit(Message):
    """Make filled blocks visible. Those not named are given back. With `durable`, wait until they are on disk."""

    reservation: Handle
    indexes: Indexes
    durable: bool = False


class Outcome(Message):
    """What became of block `index`: ``stored``, ``exists`` or a `kvstore.types.DropReason`."""

    index: int
    status: str


class CommitReply(Message):
    """One outcome for each index of the commit."""

    outcomes: list[Outcome]


class Abort(Message):
    """Give all room of a reservation back."""

    reservation: Handle


class Empty(Message):
    """Nothing to say."""


# -- remote payloads ---------------------------------------------------------------------------------------------------


class Fetch(Message):
    """Remote client: send me the payload of a leased block, as the payload of the reply's frame."""

    lease: Handle
    index: Annotated[int, Meta(ge=0, le=MAX_KEYS)]


class Fill(Message):
    """Remote client: this frame's payload is the content of a reserved block."""

    reservation: Handle
    index: Annotated[int, Meta(ge=0, le=MAX_KEYS)]


# -- keeping and forgetting --------------------------------------------------------------------------------------------


class Pin(Message):
    """Keep blocks from eviction for `ttl_s` seconds, wherever they are."""

    ns: Digest
    keys: Keys
    ttl_s: Seconds = 3600.0


class Unpin(Message):
    """End pins early."""

    ns: Digest
    keys: Keys


class Drop(Message):
    """Forget blocks in every tier; without keys, the whole namespace."""

    ns: Digest
    keys: Keys | None


class Stats(Message):
    """Ask for a snapshot."""


class StatsReply(Message):
    """A snapshot as a tree of plain values; its keys are described in docs/metrics.md."""

    snapshot: dict[str, Any]


class Quota(Message):
    """List the rules about quotas; or set one, or remove the one of a name, which only the daemon's own user may."""

    set: QuotaRule | None = None
    remove: Annotated[str, Meta(max_length=64)] = ""


class QuotaReply(Message):
    """The rules, and by tier and rule what their namespaces hold."""

    rules: list[QuotaRule]
    tiers: dict[str, Any]


class Verdict(Message):
    """What a probe measured of blending on an engine's model: the gate's figures and its thresholds."""

    share: Share
    selector: Label
    prompts: Count
    kl: Measured
    top1: Share
    most_kl: Measured
    least_top1: Share


class Report(Message):
    """What an engine put together from chunks since its last report: prompts, their tokens, and how many were computed.

    Without any it only tells the verdict by which it may.
    """

    ns: Digest
    prompts: Count = 0
    tokens: Count = 0
    computed: Count = 0
    verdict: Verdict | None = None


class Explain(Message):
    """Where each block of a prompt is, and why the others are nowhere. Changes nothing."""

    ns: Digest
    keys: Keys


class ExplainReply(Message):
    """A `kvstore.sightings.Sighting` for each key."""

    blocks: list[dict[str, Any]]


class Leases(Message):
    """Leases of this trust domain that are open."""


class LeasesReply(Message):
    """A `kvstore.sightings.HeldLease` for each, the oldest first."""

    leases: list[dict[str, Any]]


class Policy(Message):
    """The eviction policy of each tier; or give a tier another one, which only the daemon's own user may."""

    tier: Annotated[str, Meta(max_length=32)] = ""
    policy: Annotated[str, Meta(max_length=64)] = ""


class PolicyReply(Message):
    """Policy by tier."""

    policies: dict[str, str]


# -- events ------------------------------------------------------------------------------------------------------------


class Events(Message):
    """What happened to blocks of this trust domain after event number `after` of the daemon `boot`.

    If nothing has, the answer waits up to `wait_s` for it. Who knows nothing yet leaves `boot` empty. `snapshot` is
    that of the reply before. A reply is about at most `limit` blocks.
    """

    boot: Annotated[bytes, Meta(max_length=16)] = b""
    after: Handle = 0
    snapshot: Handle = 0
    wait_s: Seconds = 0.0
    limit: Annotated[int, Meta(ge=1, le=MAX_KEYS)] = 4096


class Event(Message):
    """Blocks that were ``stored`` in a tier or ``removed`` from it, or that a snapshot found there (``held``).

    Events are numbered from 1 without a hole, one number a block; `seq` is that of the first of `keys`, which stand one
    after the other. `nbytes` has one number for each key that came. If `chained`, each key's parent is the key before
    it, and the first one's is `parent`; else no parents are known. `reason` is a `kvstore.types.Gone`.
    """

    seq: int
    kind: str
    ns: bytes
    tier: int
    keys: bytes
    nbytes: list[int] = []
    parent: bytes = b""
    chained: bool = False
    block_tokens: int = 0
    reason: str = ""


class EventsReply(Message):
    """Ask next with this `boot`, `after` and `snapshot`. If `reset`, forget what you know: a snapshot begins here.

    It begins at the first call, after a restart of the daemon, and for those who fell so far behind that events were
    forgotten. It goes on while `snapshot` is not 0; then follow the events since.
    """

    boot: bytes
    after: int
    reset: bool
    snapshot: int
    events: list[Event]


# -- the table ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "hello": (Hello, HelloReply),
    "lookup": (Lookup, LookupReply),
    "lease": (Lease, LeaseReply),
    "release": (Release, Empty),
    "reserve": (Reserve, ReserveReply),
    "commit": (Commit, CommitReply),
    "abort": (Abort, Empty),
    "fetch": (Fetch, Empty),
    "fill": (Fill, Empty),
    "prefetch": (Prefetch, CountReply),
    "match": (Match, MatchReply),
    "pin": (Pin, CountReply),
    "unpin": (Unpin, CountReply),
    "drop": (Drop, CountReply),
    "stats": (Stats, StatsReply),
    "quota": (Quota, QuotaReply),
    "report": (Report, Empty),
    "explain": (Explain, ExplainReply),
    "leases": (Leases, LeasesReply),
    "policy": (Policy, PolicyReply),
    "events": (Events, EventsReply),
}
"""Params and result of each verb. What is not here cannot be called."""

NOTICES: dict[str, type[Message]] = {"leased": LeaseNotice}
"""What the daemon sends on its own."""


class Request(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a call."""

    kind: int
    id: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    method: str
    params: msgspec.Raw


class Answer(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a reply. `error` is (code, cause, remedy) or nil."""

    kind: int
    id: int
    error: tuple[str, str, str] | None
    result: msgspec.Raw


class Notice(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Envelope of a notice."""

    kind: int
    method: str
    params: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_request = msgspec.msgpack.Decoder(Request)
_answer = msgspec.msgpack.Decoder(Answer)
_notice = msgspec.msgpack.Decoder(Notice)
_params = {name: msgspec.msgpack.Decoder(types[0]) for name, types in METHODS.items()}
_results = {name: msgspec.msgpack.Decoder(types[1]) for name, types in METHODS.items()}
_notices = {name: msgspec.msgpack.Decoder(kind) for name, kind in NOTICES.items()}
_NIL = msgspec.Raw(b"\xc0")
_DIGEST = np.dtype(f"V{DIGEST_BYTES}")


def encode_request(call_id: int, method: str, params: Message) -> bytes:
    """A call."""
    return _encoder.encode((REQUEST, call_id, method, params))


def encode_reply(call_id: int, result: Message) -> bytes:
    """An answer."""
    return _encoder.encode((REPLY, call_id, None, result))


def encode_error(call_id: int, error: KVStoreError) -> bytes:
    """An answer that carries an error."""
    return _encoder.encode((REPLY, call_id, (error.code, error.cause, error.remedy), _NIL))


def encode_notice(method: str, params: Message) -> bytes:
    """A notice."""
    return _encoder.encode((NOTICE, method, params))


def decode_request(head: bytes) -> Request | Notice:
    """Envelope of what a client sent.

    Raises
    ------
    ProtocolError
        If it is neither a call nor a notice.
    """
    # The second byte is the kind: 0x94 0x00 is a call, 0x93 0x02 a notice.
    try:
        if head[:2] == b"\x93\x02":
            return _notice.decode(head)
        request = _request.decode(head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a call or notice: {error}.") from None
    if request.kind != REQUEST:
        raise ProtocolError(f"message kind {request.kind} is not one a client may send.")
    return request


def decode_params(method: str, params: msgspec.Raw) -> Message:
    """Parameters of a verb.

    Raises
    ------
    UnknownMethod, InvalidParams
    """
    decoder = _params.get(method)
    if decoder is None:
        raise UnknownMethod(f"there is no verb {method[:40]!r}.")
    try:
        return decoder.decode(params)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParams(f"{method}: {error}.") from None


def decode_answer(head: bytes) -> Answer | Notice:
    """Envelope of what the daemon sent.

    Raises
    ------
    ProtocolError
    """
    try:
        if head[:2] == b"\x93\x02":
            return _notice.decode(head)
        answer = _answer.decode(head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a reply or notice: {error}.") from None
    if answer.kind != REPLY:
        raise ProtocolError(f"message kind {answer.kind} is not one a daemon may send.")
    return answer


def decode_result(method: str, result: msgspec.Raw) -> Message:
    """Result of a verb; raises `ProtocolError`."""
    try:
        return _results[method].decode(result)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{method}: the reply is not understood: {error}.") from None


def decode_notice(notice: Notice) -> Message:
    """Parameters of a daemon's notice; raises `ProtocolError`."""
    try:
        return _notices[notice.method].decode(notice.params)
    except (KeyError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the notice {notice.method[:40]!r} is not understood: {error}.") from None


def split_keys(keys: bytes) -> list[bytes]:
    """Keys out of their concatenation.

    Raises
    ------
    InvalidParams
        If the length is not a multiple of a key's.
    """
    if len(keys) % DIGEST_BYTES:
        raise InvalidParams(f"keys: {len(keys)} bytes are not a whole number of {DIGEST_BYTES}-byte keys.")
    return np.frombuffer(keys, dtype=_DIGEST).tolist()  # several times faster than slicing
