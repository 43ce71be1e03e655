"""Rules about who may have how much: what a rule says, how it is written, and the file that keeps the table.

A rule makes a partition of every tier out of the namespaces it names. Blocks of all other namespaces share the rest.
`kvstore.eviction.partitions` does what the rules say; `kvstore.quota_desk` changes them at run time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvstore.errors import QuotaRefused
from kvstore.patterns import DIGEST_START, NAME
from kvstore.types import Namespace, Scope
from kvstore.units import format_size, parse_duration, parse_size

MAX_RULES = 64
"""Each is a partition with a policy of its own, and a label of metrics."""
MAX_FILE_BYTES = 1 << 20
VERSION = 1

TIERS = ("host", "disk")
"""Tiers that are partitioned. What a cluster of daemons shares is not one daemon's to divide."""

Word = Annotated[str, Meta(max_length=256)]


class QuotaRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rule: the namespaces it is about (all that is given must match), and what they get.

    Attributes
    ----------
    name : str
        What the rule is called; also the label of its metrics.
    tenant, domain : str
        Tenant of the namespace, and trust domain it was stored in, exactly.
    model : str
        Pattern of the model's name, with ``*`` and ``?``.
    namespace : str
        First hexadecimal digits of the namespace digest, 8 or more.
    guarantee : str
        Bytes or percent of a tier that others cannot take: ``30%``, ``2GiB``, or by tier ``host=2GiB,disk=40%``.
    limit : str
        The most it may have, written the same way.
    priority : int
        Lower ones give way first, down to their guarantees.
    ttl : str
        Time since the last use after which a block is forgotten; empty for never.
    """

    name: Annotated[str, Meta(pattern=NAME)]
    tenant: Word = ""
    domain: Word = ""
    model: Word = ""
    namespace: Annotated[str, Meta(pattern=DIGEST_START)] = ""
    guarantee: Word = ""
    limit: Word = ""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    ttl: Word = ""

    def matches(self, scope: Scope, namespace: Namespace | None) -> bool:
        """Whether a namespace is one of those that the rule is about; None where only its digest is known."""
        if self.domain and scope.domain != self.domain:
            return False
        if self.namespace and not scope.ns.hex().startswith(self.namespace):
            return False
        if self.tenant or self.model:
            return (
                namespace is not None
                and (not self.tenant or namespace.tenant == self.tenant)
                and (not self.model or fnmatchcase(namespace.model, self.model))
            )
        return True

    @property
    def rank(self) -> tuple[bool, bool, bool, str]:
        """Where several rules match, the lowest applies: one that names a namespace before a tenant before a model."""
        return (not self.namespace, not self.tenant, not self.model, self.name)


@dataclass(frozen=True, slots=True)
class Share:
    """What a rule means for one tier, in its bytes and in seconds; 0 is no guarantee, no limit, no expiry."""

    guarantee: int = 0
    limit: int = 0
    priority: int = 0
    ttl_s: float = 0.0


def share_of(rule: QuotaRule, tier: str, capacity: int) -> Share:
    """What a rule means for a tier of that capacity; raises `QuotaRefused` where it is not well written."""
    guarantee = _amount(rule, "guarantee", tier, capacity)
    limit = _amount(rule, "limit", tier, capacity)
    if limit and limit < guarantee:
        amounts = f"the limit of {tier} is {format_size(limit)}, less than the guarantee, {format_size(guarantee)}"
        raise QuotaRefused(f"quota {rule.name}: {amounts}.", "Raise the limit, or lower the guarantee.")
    return Share(guarantee, limit, rule.priority, _seconds(rule))


def shares_of(rules: Iterable[QuotaRule], tier: str, capacity: int) -> dict[str, Share]:
    """Shares of one tier by rule; raises `QuotaRefused` if a rule is not well written, or more is guaranteed than is.

    The last sixteenth of a tier cannot be guaranteed, so that those without a rule can store at all.
    """
    shares = {rule.name: share_of(rule, tier, capacity) for rule in rules}
    promised, most = sum(share.guarantee for share in shares.values()), capacity - capacity // 16
    if promised > most:
        raise QuotaRefused(
            f"quotas: {format_size(promised)} of {tier} would be guaranteed; of the {format_size(capacity)} it has for "
            f"blocks at most {format_size(most)} can be.",
            "Lower a guarantee, or raise the tier's budget.",
        )
    return shares


def _seconds(rule: QuotaRule) -> float:
    if not rule.ttl:
        return 0.0
    try:
        seconds = parse_duration(rule.ttl)
    except ValueError as error:
        raise QuotaRefused(f"quota {rule.name}: ttl: {rule.ttl!r} {error}.") from None
    if seconds <= 0:
        raise QuotaRefused(f"quota {rule.name}: ttl: {rule.ttl!r} is not more than nothing.")
    return seconds


def _amount(rule: QuotaRule, field: str, tier: str, capacity: int) -> int:
    """Bytes that ``30%``, ``2GiB`` or ``host=2GiB,disk=40%`` stands for in a tier; 0 where it says nothing of it."""
    found = 0
    for part in getattr(rule, field).split(",") if getattr(rule, field) else ():
        name, equals, text = part.strip().rpartition("=")
        if equals and name not in TIERS:
            raise QuotaRefused(f"quota {rule.name}: {field}: {name!r} is not one of {', '.join(TIERS)}.")
        nbytes = _bytes(rule, field, text.strip(), capacity)
        if not equals or name == tier:
            found = nbytes
    return found


def _bytes(rule: QuotaRule, field: str, text: str, capacity: int) -> int:
    if percent := re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)\s?%", text):
        if not 0 < float(percent[1]) <= 100:
            raise QuotaRefused(f"quota {rule.name}: {field}: {text!r} is not between 0% and 100%.")
        return max(1, int(capacity * float(percent[1]) / 100))
    try:
        nbytes = parse_size(text)
    except ValueError as error:
        raise QuotaRefused(f"quota {rule.name}: {field}: {text!r} {error}.") from None
    if nbytes <= 0:
        raise QuotaRefused(f"quota {rule.name}: {field}: {text!r} is not more than nothing.")
    return nbytes


class QuotaTable:
    """All rules by name, and the file they are kept in. A changed table is a new one: the old one stays until it holds.

    Parameters
    ----------
    rules : iterable of QuotaRule
        The rules.

    Raises
    ------
    QuotaRefused
        If a rule names nothing, two have one name, or there are too many.
    """

    def __init__(self, rules: Iterable[QuotaRule] = ()) -> None:
        self._rules: dict[str, QuotaRule] = {}
        for rule in rules:
            if rule.name in self._rules:
                raise QuotaRefused(f"quotas: two rules are called {rule.name}.")
            if not (rule.tenant or rule.domain or rule.model or rule.namespace):
                raise QuotaRefused(
                    f"quota {rule.name}: it names no tenant, domain, model or namespace.", "Say whom it is about."
                )
            _seconds(rule)
            for field in ("guarantee", "limit"):
                _amount(rule, field, TIERS[0], 1)
            self._rules[rule.name] = rule
        if len(self._rules) > MAX_RULES:
            raise QuotaRefused(f"quotas: {len(self._rules)} rules are more than {MAX_RULES}.")
        self._ranked = sorted(self._rules.values(), key=lambda rule: rule.rank)

    def with_rule(self, rule: QuotaRule) -> QuotaTable:
        """The table with one rule more, or another in the place of the one of that name."""
        return QuotaTable([*(each for each in self if each.name != rule.name), rule])

    def without(self, name: str) -> QuotaTable:
        """The table without a rule; raises `QuotaRefused` if there is none of that name."""
        if name not in self._rules:
            raise QuotaRefused(f"quotas: there is no rule {name[:64]!r}.", "`kvstore quota list` shows the rules.")
        return QuotaTable(each for each in self if each.name != name)

    def match(self, scope: Scope, namespace: Namespace | None) -> str:
        """Name of the rule that a namespace falls under; empty if none."""
        return next((rule.name for rule in self._ranked if rule.matches(scope, namespace)), "")

    def shares(self, capacities: Mapping[str, int]) -> dict[str, dict[str, Share]]:
        """Shares by rule, of each tier; raises `QuotaRefused` as `shares_of`."""
        return {tier: shares_of(self, tier, capacity) for tier, capacity in capacities.items()}

    def __iter__(self) -> Iterator[QuotaRule]:
        return iter(self._rules.values())

    def __len__(self) -> int:
        return len(self._rules)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    rules: list[QuotaRule]


def read_rule(text: bytes) -> QuotaRule:
    """A rule out of JSON; raises `QuotaRefused`."""
    try:
        return msgspec.json.decode(text, type=QuotaRule)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise QuotaRefused(f"quota: {error}.") from None


def load_table(path: Path) -> QuotaTable:
    """The table in a file, or an empty one where there is none.

    Raises
    ------
    QuotaRefused
        If the file cannot be read or is not a table of rules; it names the file.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return QuotaTable()
    except OSError as error:
        raise QuotaRefused(
            f"{path}: cannot be read ({error.strerror}).", "Make it readable, or move it away."
        ) from None
    remedy = "Mend it, or move it away and set the rules anew with `kvstore quota set`."
    try:
        if len(text) > MAX_FILE_BYTES:
            raise QuotaRefused(f"it is longer than {MAX_FILE_BYTES} bytes.")
        found = msgspec.json.decode(text, type=_File)
        if found.version != VERSION:
            raise QuotaRefused(f"version {found.version} is not one that this release reads.")
        return QuotaTable(found.rules)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise QuotaRefused(f"{path}: {error}.", remedy) from None
    except QuotaRefused as error:
        raise QuotaRefused(f"{path}: {error.cause}", remedy) from None


def save_table(path: Path, table: QuotaTable) -> None:
    """Put a table in the place of the one in a file, at once or not at all, so that it survives a loss of power.

    Raises
    ------
    QuotaRefused
        If the file cannot be written. What was there is still there.
    """
    text = msgspec.json.format(msgspec.json.encode(_File(VERSION, list(table))), indent=1)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise QuotaRefused(
            f"{path}: cannot be written ({error.strerror}); the rules are as they were.", "See to the file's directory."
        ) from None


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
