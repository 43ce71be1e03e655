"""Every message of the protocol, typed. `docs/protocol.md` is generated from this file.

Request ``[0, id, method, params]``, reply ``[1, id, error, result]``, notice ``[2, method, params]``. Params and
results are arrays in field order. Decoding (`kvstore.wire.envelope`) refuses unknown methods, wrong types, missing and
surplus fields. Here stand the messages about blocks and the table of all; `kvstore.wire.desk` has the others.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvstore.types import Label, Namespace
from kvstore.wire.desk import Event as Event
from kvstore.wire.desk import (
    Events,
    EventsReply,
    Explain,
    ExplainReply,
    Leases,
    LeasesReply,
    Policy,
    PolicyReply,
    Quota,
    QuotaReply,
    Report,
    Stats,
    StatsReply,
)
from kvstore.wire.desk import Verdict as Verdict
from kvstore.wire.device import OpenSlab, OpenSlabReply, Reach, ReachReply
from kvstore.wire.device import Place as Place
from kvstore.wire.fields import MAX_KEYS as MAX_KEYS
from kvstore.wire.fields import MAX_MATCH_TOKENS as MAX_MATCH_TOKENS
from kvstore.wire.fields import Digest, Handle, Indexes, Keys, Seconds, Span
from kvstore.wire.fields import Message as Message
from kvstore.wire.fields import split_keys as split_keys

PROTOCOL_VERSION = 1
"""Raised when a message changes its meaning; `hello` refuses a peer of another version."""


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
    speeds: dict[int, tuple[float, float, float]] = {}  # noqa: RUF012 - msgspec copies it


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


class Slabs(Message):
    """Ask which slabs of host memory this trust domain has, to map them before blocks in them are asked for."""


class SlabsReply(Message):
    """Their ids. None for a client on another host."""

    slabs: list[int]


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
    spans: Annotated[list[Span], Meta(max_length=4096)] = []  # noqa: RUF012
    separator: Annotated[bytes, Meta(max_length=256)] = b""
    find: bool = False
    labels: Annotated[list[Label], Meta(max_length=64)] = []  # noqa: RUF012


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


# -- the table ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    "hello": (Hello, HelloReply),
    "lookup": (Lookup, LookupReply),
    "lease": (Lease, LeaseReply),
    "reach": (Reach, ReachReply),
    "open_slab": (OpenSlab, OpenSlabReply),
    "slabs": (Slabs, SlabsReply),
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
