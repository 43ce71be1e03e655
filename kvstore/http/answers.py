"""What is asked and answered over HTTP, as types: bodies are decoded into them and /v1/openapi.json describes them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvstore.patterns import CODE, HEX32, KEYS, NAME
from kvstore.quotas import QuotaRule
from kvstore.sightings import HeldLease, Sighting
from kvstore.types import Namespace

MAX_TOKENS = 1 << 20
MAX_KEYS = 4096
Hex32 = Annotated[str, Meta(pattern=HEX32, description="32 bytes in hexadecimal digits")]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
KeyList = Annotated[str, Meta(pattern=KEYS, description="Keys, by commas")]
Name = Annotated[str, Meta(pattern=NAME)]
Word = Annotated[str, Meta(max_length=64)]


class Problem(msgspec.Struct):
    """What went wrong: a code of docs/errors.md, one sentence, and what to do about it."""

    code: Annotated[str, Meta(pattern=CODE)]
    cause: str
    remedy: str


# -- answers -----------------------------------------------------------------------------------------------------------


class Live(msgspec.Struct):
    """The daemon's own work goes on."""

    live: bool


class Ready(msgspec.Struct):
    """Clients may come. `degraded` names optional tiers that are in trouble; they make nobody wait."""

    ready: bool
    reason: str
    degraded: list[str]


class Setting(msgspec.Struct):
    """One setting; secrets are masked."""

    name: str
    value: str
    origin: str


class Config(msgspec.Struct):
    """Every setting and where it came from."""

    settings: list[Setting]


class Quotas(msgspec.Struct):
    """The rules, and by tier and rule what their namespaces hold."""

    rules: list[QuotaRule]
    tiers: dict[str, Any]


class Held(msgspec.Struct):
    """What of a prompt lies in one tier."""

    blocks: int
    bytes: int


class Score(msgspec.Struct):
    """What one daemon has of a prompt (`kvstore.where.Score`)."""

    daemon: str
    address: str
    own: bool
    blocks: int
    tokens: int
    tiers: dict[str, Held]
    load_bytes: int
    load_s: float | None = None


class Where(msgspec.Struct):
    """The daemons that are known, the best first."""

    blocks: int
    daemons: list[Score]


class Explained(msgspec.Struct):
    """Each block of a prompt in order, and how many an engine could use: those before the first hole.

    `rows` says the same in words, as the dashboard shows it: block, key, where, bytes, usable, why.
    """

    usable: int
    blocks: list[Sighting]
    rows: list[list[str]]


class Leases(msgspec.Struct):
    """Leases that are open, the oldest first."""

    leases: list[HeldLease]


class Policies(msgspec.Struct):
    """The eviction policy of each tier, and what there is to choose from."""

    policies: dict[str, str]
    names: list[str]


class Dropped(msgspec.Struct):
    """How many blocks were forgotten."""

    blocks: int


class Drained(msgspec.Struct):
    """Whether new blocks are refused, and how many still wait to be written below."""

    draining: bool
    waiting_blocks: int


# -- questions ---------------------------------------------------------------------------------------------------------


class KeysQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A few keys of a prompt."""

    namespace: Hex32
    keys: KeyList = ""


class PageQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt to look up on the page: a namespace, and token ids or keys as somebody pasted them."""

    namespace: Annotated[str, Meta(max_length=64)] = ""
    prompt: Annotated[str, Meta(max_length=4000)] = ""


class RuleQuery(msgspec.Struct, forbid_unknown_fields=True):
    """The rule that is meant."""

    name: Name


class Question(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A prompt: a namespace by its digest or its fields, and either keys or token ids."""

    namespace: Hex32 | Namespace
    keys: Annotated[list[Hex32], Meta(max_length=MAX_KEYS)] | None = None
    tokens: Annotated[list[Token], Meta(max_length=MAX_TOKENS)] | None = None


class DropOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Forget a namespace, in one trust domain or, if `domain` is empty, in all."""

    namespace: Hex32
    domain: Word = ""


class PolicyOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Give a tier another eviction policy, until the daemon ends."""

    tier: Word
    policy: Word


class DrainOrder(msgspec.Struct, forbid_unknown_fields=True):
    """Refuse new blocks from now on, or take them again."""

    draining: bool
