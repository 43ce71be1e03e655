"""The namespaces the daemon knows, and what was asked of each."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvstore.errors import UnknownNamespace
from kvstore.keys import namespace_digest
from kvstore.types import Namespace, Scope, TierCode

MAX_IDLE = 4096
"""Namespaces without blocks that are remembered; the one unused longest is forgotten first."""


@dataclass(slots=True, eq=False)
class NamespaceRecord:
    """One namespace in one trust domain, with its counts in blocks."""

    scope: Scope
    fields: Namespace
    asked: int = 0
    stored: int = 0
    hit: Counter[int] = field(default_factory=Counter)
    """Blocks handed out, by tier."""

    def to_json(self) -> dict[str, Any]:
        """What the status page shows; the salt stays a digest."""
        fields = {k: v for k, v in msgspec.structs.asdict(self.fields).items() if v not in ("", 0)}
        hit = {TierCode(code).name.lower(): n for code, n in self.hit.items()}
        return {**fields, "digest": self.scope.ns.hex(), "domain": self.scope.domain} | {
            "asked": self.asked,
            "stored": self.stored,
            "hit": hit,
        }


class NamespaceRegistry:
    """Namespaces by scope. A verb may only name one that was introduced in its trust domain."""

    def __init__(self) -> None:
        self._records: OrderedDict[Scope, NamespaceRecord] = OrderedDict()
        self.on_new: Callable[[Scope], None] = lambda scope: None

    def introduce(self, domain: str, namespace: Namespace) -> NamespaceRecord:
        """Remember a namespace."""
        scope = Scope(domain, namespace_digest(namespace))
        record = self._records.get(scope)
        if record is None:
            record = self._records[scope] = NamespaceRecord(scope, namespace)
            self.on_new(scope)
        self._records.move_to_end(scope)
        return record

    def find(self, domain: str, ns: bytes) -> NamespaceRecord:
        """The record of a namespace.

        Raises
        ------
        UnknownNamespace
            If it was never introduced, or so long ago, and without blocks, that it was forgotten.
        """
        record = self._records.get(Scope(domain, ns))
        if record is None:
            raise UnknownNamespace(f"namespace {ns.hex()[:16]} is not known in this trust domain.")
        return record

    def fields(self, scope: Scope) -> Namespace | None:
        """What a namespace is, if it is known."""
        record = self._records.get(scope)
        return None if record is None else record.fields

    def count_stored(self, scope: Scope) -> None:
        """Count a block stored in a namespace, if it is still remembered."""
        record = self._records.get(scope)
        if record is not None:
            record.stored += 1

    def prune(self, held: set[Scope]) -> None:
        """Forget the longest unused namespaces that hold no blocks, beyond `MAX_IDLE`."""
        idle = [scope for scope in self._records if scope not in held]
        for scope in idle[: max(0, len(idle) - MAX_IDLE)]:
            del self._records[scope]

    def __iter__(self) -> Iterator[NamespaceRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)


def is_exact(namespace: Namespace) -> bool:
    """Whether what is handed out of a namespace is, bit by bit, what was stored."""
    return namespace.fidelity in ("", "exact")


def only_exact(namespace: Namespace) -> str:
    """Why a namespace's fidelity is refused where there are no profiles."""
    return "" if is_exact(namespace) else "no profile is here: codecs.profiles is not set"


def describe_namespace(namespace: Namespace) -> bytes:
    """A namespace as text that a tier keeps beside its blocks, so that a later daemon knows what they are."""
    return msgspec.json.format(msgspec.json.encode(namespace), indent=1)


def read_description(text: bytes) -> Namespace | None:
    """The namespace a description is of, or None. A description names blocks, it never identifies them."""
    try:
        return msgspec.json.decode(text, type=Namespace)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
