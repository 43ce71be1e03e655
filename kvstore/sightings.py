"""What the operator's desk shows of blocks and leases, as values: the same on the wire, over HTTP and in the CLI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

NEVER = "never_stored"
"""Reason of a block of which nothing is remembered."""


def places(tiers: Sequence[str], chains: Mapping[str, str]) -> str:
    """Tiers in words, with the chain that a block is kept by."""
    return ", ".join(f"{tier} ({chains[tier]})" if tier in chains else tier for tier in tiers) or "nowhere"


class Sighting(msgspec.Struct, frozen=True):
    """One block of a prompt.

    Attributes
    ----------
    key : str
        Its prefix key in hexadecimal digits.
    tiers : list of str
        Where it is, nearest first; empty if it is nowhere.
    bytes : int
        Payload bytes; 0 if it is nowhere.
    reachable : bool
        Whether every block before it is here, too: an engine uses a prefix without a hole.
    age_s : float or None
        How long it has been in memory; None if it is not there.
    readers : int
        Leases that read it now.
    pinned, waiting : bool
        Whether it is kept from eviction, and whether a lower tier has yet to be told of it.
    chunk : str
        How the chunk was captured that ends here; empty if none does.
    reason : str
        Why it is nowhere: ``never_stored``, how it left (``evicted``, ``expired``, ``dropped``, ``corrupt``, ``lost``),
        or why it was not taken (a `kvstore.types.DropReason`).
    left : str
        The tier that it left last.
    gone_s : float or None
        How long ago that was.
    chains : dict
        By tier, the chain of codecs that it is kept by there; tiers that keep it as it came are not named.
    """

    key: str
    tiers: list[str]
    bytes: int
    reachable: bool
    age_s: float | None = None
    readers: int = 0
    pinned: bool = False
    waiting: bool = False
    chunk: str = ""
    reason: str = ""
    left: str = ""
    gone_s: float | None = None
    chains: dict[str, str] = {}

    @property
    def where(self) -> str:
        """Tiers in words, with how it is kept there."""
        return places(self.tiers, self.chains)


class HeldLease(msgspec.Struct, frozen=True):
    """A lease that is open: whose, on what, and for how long."""

    client: str
    domain: str
    namespace: str
    model: str
    blocks: int
    bytes: int
    pending: int
    expires_s: float
