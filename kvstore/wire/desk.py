"""Messages about the daemon instead of blocks: its numbers, quotas, leases, policies, reports and events."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from kvstore.quotas import QuotaRule
from kvstore.types import Label
from kvstore.wire.fields import MAX_KEYS, Count, Digest, Handle, Keys, Measured, Message, Seconds, Share


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
    nbytes: list[int] = []  # noqa: RUF012 - msgspec copies it
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
