"""What an operator asks of the daemon: where blocks are, who leases what, which policies. Used by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.client.effects import Call, Flow
from kvstore.client.sync import KVStoreClient
from kvstore.wire import messages as m

PAGE = 1024
"""Blocks that one call explains."""


def explain(client: KVStoreClient, ns: bytes, keys: Sequence[bytes]) -> list[dict[str, Any]]:
    """Where each block of a prompt is, and why the others are nowhere: a `kvstore.sightings.Sighting` for each key."""
    found: list[dict[str, Any]] = []
    for first in range(0, len(keys), PAGE):
        part = b"".join(keys[first : first + PAGE])
        reply: m.ExplainReply = client.drive(_ask("explain", m.Explain(ns, part)), None)
        found += reply.blocks
    return found


def leases(client: KVStoreClient) -> list[dict[str, Any]]:
    """Leases that are open in the caller's trust domain: a `kvstore.sightings.HeldLease` for each."""
    reply: m.LeasesReply = client.drive(_ask("leases", m.Leases()), None)
    return reply.leases


def policy(client: KVStoreClient, tier: str = "", name: str = "") -> dict[str, str]:
    """The eviction policy of each tier, after giving one to `tier`."""
    reply: m.PolicyReply = client.drive(_ask("policy", m.Policy(tier, name)), None)
    return reply.policies


def drop(client: KVStoreClient, ns: bytes, keys: Sequence[bytes] | None = None) -> int:
    """Forget blocks of a namespace known by its digest, or all of them; how many there were."""
    named = None if keys is None else b"".join(keys)
    reply: m.CountReply = client.drive(_ask("drop", m.Drop(ns, named)), None)
    return reply.count


def _ask(method: str, params: m.Message) -> Flow[Any]:
    return (yield Call(method, params))
