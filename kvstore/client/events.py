"""Events as a subscriber sees them, and a mirror of what the daemon has that is kept from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import ProtocolError
from kvstore.keys import namespace_digest
from kvstore.types import DIGEST_BYTES, Gone, Namespace, TierCode
from kvstore.wire import messages as m


class Position(NamedTuple):
    """Where in the log of a daemon a subscriber is. `boot` is which life of the daemon, empty at the beginning."""

    boot: bytes = b""
    after: int = 0


class Event(NamedTuple):
    """Something that happened to blocks.

    Attributes
    ----------
    kind : str
        ``stored`` in the tier; ``removed`` from it; ``held`` there, as a snapshot found; or ``reset``: forget what you
        know, a snapshot follows.
    seq : int
        Number of the event of the first key; one number a key.
    ns : bytes
        Namespace digest.
    tier : TierCode
        Where.
    keys : list of bytes
        The blocks.
    nbytes : list of int
        Payload bytes of each that came.
    parent : bytes
        Key before the first block, if `chained` and there is one.
    chained : bool
        Whether each block is the one that follows the one before it in a prompt.
    block_tokens : int
        Tokens in a block; 0 where unknown.
    reason : Gone or None
        Why blocks were removed.
    """

    kind: str
    seq: int
    ns: bytes = b""
    tier: TierCode = TierCode.ABSENT
    keys: Sequence[bytes] = ()
    nbytes: Sequence[int] = ()
    parent: bytes = b""
    chained: bool = False
    block_tokens: int = 0
    reason: Gone | None = None


RESET, STORED, HELD, REMOVED = "reset", "stored", "held", "removed"
_COMING = (STORED, HELD)


def read_reply(reply: m.EventsReply) -> list[Event]:
    """The events of a reply; raises `ProtocolError` where one makes no sense."""
    events = [Event(RESET, reply.after)] if reply.reset else []
    return events + [read_event(event) for event in reply.events]


def read_event(event: m.Event) -> Event:
    """An event off the wire; raises `ProtocolError` if it makes no sense."""
    try:
        keys = m.split_keys(event.keys)
        tier = TierCode(event.tier)
        reason = Gone(event.reason) if event.reason else None
    except (ValueError, ProtocolError) as error:
        raise ProtocolError(f"an event is not understood: {error}.") from None
    comes = event.kind in _COMING
    if not comes and event.kind != REMOVED:
        raise ProtocolError(f"an event of the unknown kind {event.kind[:20]!r} came.")
    if len(event.ns) != DIGEST_BYTES or len(event.nbytes) != (len(keys) if comes else 0):
        raise ProtocolError("an event came whose keys and sizes are not equally many.")
    if tier is TierCode.ABSENT or min(event.nbytes, default=0) < 0:
        raise ProtocolError("an event came of a block that is nowhere, or of fewer bytes than none.")
    known = (event.parent, event.chained, event.block_tokens, reason)
    return Event(event.kind, event.seq, event.ns, tier, keys, event.nbytes, *known)


class Mirror:
    """What is where in a daemon, kept from its events.

    Attributes
    ----------
    tiers : dict
        Of each tier, by namespace digest: key to payload bytes.
    blocks : int
        Blocks in all of them.
    """

    def __init__(self) -> None:
        self.tiers: dict[TierCode, dict[bytes, dict[bytes, int]]] = {}
        self.blocks = 0

    def apply(self, event: Event) -> None:
        """Take in an event. One that is known already changes nothing."""
        if event.kind == RESET:
            self.tiers.clear()
            self.blocks = 0
            return
        spaces = self.tiers.setdefault(event.tier, {})
        held = spaces.setdefault(event.ns, {})
        self.blocks -= len(held)
        if event.kind in _COMING:
            held.update(zip(event.keys, event.nbytes, strict=True))
        else:
            for key in event.keys:
                held.pop(key, None)
        self.blocks += len(held)
        if not held:
            del spaces[event.ns]

    def locate(self, namespace: Namespace | bytes, keys: Sequence[bytes]) -> list[tuple[TierCode, int]]:
        """Nearest tier and bytes of the blocks of a prompt, up to the first that is nowhere."""
        ns = namespace if isinstance(namespace, bytes) else namespace_digest(namespace)
        nearest = [(tier, self.tiers[tier].get(ns, {})) for tier in sorted(self.tiers)]
        found: list[tuple[TierCode, int]] = []
        for key in keys:
            place = next(((tier, held[key]) for tier, held in nearest if key in held), None)
            if place is None:
                break
            found.append(place)
        return found
