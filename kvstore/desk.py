"""The operator's desk: where each block of a prompt is and why the rest is not here, who holds leases, and the few
things an operator changes while the daemon runs. The same for the wire, the CLI, HTTP and the dashboard.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvstore.chain import TierChain
from kvstore.errors import ConfigError, RequestError
from kvstore.eviction import names
from kvstore.obs.blends import Blends
from kvstore.obs.departures import Departures
from kvstore.obs.reuse import ReuseSampler
from kvstore.obs.savings import Savings
from kvstore.sightings import NEVER, HeldLease, Sighting
from kvstore.types import BlockId, Scope

if TYPE_CHECKING:
    from kvstore.service import Service

MAX_LEASES = 1000
"""Leases that are listed; the oldest first."""


class Desk:
    """What an operator sees and does.

    Parameters
    ----------
    service : Service
        The daemon's verbs; the desk is part of it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.reuse = ReuseSampler()
        self.departures = Departures()
        self.savings = Savings()
        self.blends = Blends()

    def absent(self, scope: Scope, key: bytes) -> None:
        """Note that a prompt was asked for of which this is the first block that is nowhere."""
        self.savings.asked(BlockId(scope, key))

    def offered(self, scope: Scope, key: bytes, nbytes: int) -> None:
        """Note that an engine offers a block, which it had to compute."""
        self.reuse.note([(key, nbytes)])
        fields = self._service.namespaces.fields(scope)
        self.savings.computed(BlockId(scope, key), 0 if fields is None else fields.block_tokens)

    def tick(self) -> Iterator[None]:
        """Once a second: work off what was noted, in steps between which others may have their turn."""
        self.savings.tick()
        return self.reuse.steps()

    @property
    def _chain(self) -> TierChain:
        return self._service.chain

    # -- seeing --------------------------------------------------------------------------------------------------------

    def explain(self, scope: Scope, keys: Sequence[bytes]) -> list[Sighting]:
        """Each block of a prompt in order. Changes nothing."""
        found: list[Sighting] = []
        reachable = True
        for key in keys:
            sighting = self._sight(BlockId(scope, key), reachable)
            reachable = reachable and bool(sighting.tiers)
            found.append(sighting)
        return found

    def _sight(self, block: BlockId, reachable: bool) -> Sighting:
        now = time.monotonic()
        in_host = self._chain.host.get(block)
        holding = [(tier, size) for tier in self._chain.below if (size := tier.size(block)) is not None]
        below = [(tier.name, size) for tier, size in holding]
        chains = {tier.name: chain for tier, _ in holding if (chain := tier.chain(block))}
        gpu = self._service.gpu
        copies = ["gpu"] if gpu is not None and gpu.tier.get(block) is not None else []
        if in_host is not None:
            return Sighting(
                block.key.hex(),
                [*copies, "host", *(name for name, _ in below)],
                in_host.nbytes,
                reachable,
                age_s=now - in_host.since,
                readers=in_host.refs,
                pinned=self._chain.host.pins.until(in_host.id) > now,
                waiting=in_host.dirty > 0,
                chunk=in_host.header.chunk.capture if in_host.header.chunk is not None else "",
                chains=chains,
            )
        if below:
            return Sighting(block.key.hex(), [name for name, _ in below], below[0][1], reachable, chains=chains)
        gone = self.departures.find(block)
        if gone is None:
            return Sighting(block.key.hex(), [], 0, False, reason=NEVER)
        return Sighting(block.key.hex(), [], 0, False, reason=gone.reason, left=gone.tier, gone_s=now - gone.at)

    def leases(self) -> list[HeldLease]:
        """Open leases, the oldest first."""
        now = time.monotonic()
        held: list[HeldLease] = []
        for lease in list(self._service.ledger.leases.values())[:MAX_LEASES]:
            fields = self._service.namespaces.fields(lease.scope)
            held.append(
                HeldLease(
                    client=lease.session.name,
                    domain=lease.scope.domain,
                    namespace=lease.scope.ns.hex(),
                    model="" if fields is None else fields.model,
                    blocks=len(lease.blocks),
                    bytes=sum(block.nbytes for block in lease.blocks.values()),
                    pending=lease.pending,
                    expires_s=max(0.0, lease.expires - now),
                )
            )
        return held

    def savings_state(self) -> dict[str, Any]:
        """Tokens served instead of computed, about how many seconds that saved, and of how many tokens that is known.

        Ranks of one engine each hold their part of the same tokens, so each counts for its share.
        """
        tokens = seconds = known = 0.0
        for record in self._service.namespaces:
            fields = record.fields
            served = sum(record.hit.values()) * fields.block_tokens / max(1, fields.tp_size * fields.pp_size)
            saved = self.savings.saved(record.scope, served)
            tokens += saved.tokens
            if saved.seconds is not None:
                seconds += saved.seconds
                known += saved.tokens
        return {"tokens": tokens, "seconds": seconds, "tokens_timed": known}

    def reuse_state(self) -> dict[str, Any]:
        """What the sample of wanted blocks says: the ceiling, and what stores of other sizes would have served."""
        sizes = _sizes(sum(tier["capacity"] for tier in self._capacities().values()))
        curve = self.reuse.curve(sizes)
        return {
            "wanted": self.reuse.wanted,
            "reusable": self.reuse.reusable,
            "ceiling": self.reuse.ceiling(),
            "sampled_share": self.reuse.share,
            "sampled_keys": len(self.reuse),
            "curve": [[size, rate] for size, rate in zip(sizes, curve, strict=True)],
        }

    def _capacities(self) -> dict[str, dict[str, int]]:
        host = {"host": {"capacity": self._chain.host.capacity}}
        return host | {tier.name: {"capacity": tier.usage().capacity} for tier in self._chain.below}

    # -- doing ---------------------------------------------------------------------------------------------------------

    def policies(self) -> dict[str, str]:
        """The eviction policy of each tier that has one here."""
        return {name: order.policy for name, order in self._orders().items()}

    def set_policy(self, tier: str, policy: str) -> None:
        """Give a tier another eviction policy, until the daemon ends.

        Raises
        ------
        RequestError, ConfigError
            If there is no such tier, or no such policy.
        """
        orders = self._orders()
        if tier not in orders:
            raise RequestError(f"tier {tier!r} has no eviction policy here.", f"There is: {', '.join(orders)}.")
        if policy not in names():
            raise ConfigError(f"policy: {policy!r} is not one of {', '.join(names())}.", "Choose one of them.")
        orders[tier].switch(policy)

    def _orders(self):
        orders = {"host": self._chain.host.order}
        if self._service.gpu is not None:
            orders["gpu"] = self._service.gpu.tier.order
        return orders | {tier.name: tier.order for tier in self._chain.below if tier.order is not None}

    async def drop(self, ns: bytes, domain: str = "") -> int:
        """Forget every block of a namespace, in one trust domain or in all; how many there were."""
        scopes = {scope for scope in self._known() if scope.ns == ns and domain in ("", scope.domain)}
        return sum([await self._chain.drop(scope, None) for scope in sorted(scopes)])

    def _known(self) -> set[Scope]:
        held = set(self._chain.host.scopes()).union(*(tier.scopes() for tier in self._chain.below))
        return held | {record.scope for record in self._service.namespaces}

    def drain(self, on: bool) -> int:
        """Take no new blocks and say so, or take them again; how many still wait to be written below."""
        self._service.draining = on
        return self._chain.dirty_blocks


def _sizes(capacity: int) -> list[int]:
    """Sizes around what there is: from a sixteenth to sixteen times of it, two for each doubling."""
    return [round(capacity * 2 ** (step / 2)) for step in range(-8, 9)]
