"""One picture of the daemon as plain values: what `stats`, the CLI, the status page and the metrics all show."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvstore import __version__
from kvstore.tiers.base import TierCounters
from kvstore.types import Scope, TierCode

if TYPE_CHECKING:
    from kvstore.gpu_desk import GpuDesk
    from kvstore.service import Service
    from kvstore.tiers.base import Tier
    from kvstore.wire.traffic import Traffic
    from kvstore.writebehind import WriteBehind


def snapshot(service: Service, traffic: Traffic, started: float, ready: bool) -> dict[str, Any]:
    """The daemon now. Sizes in bytes, times in seconds, everything else counts since start unless it says otherwise."""
    chain = service.chain
    return {
        "boot": service.boot.hex(),
        "version": __version__,
        "pid": os.getpid(),
        "uptime_s": time.monotonic() - started,
        "ready": ready,
        "draining": service.draining,
        "sessions": len(service.ledger.sessions),
        "clients": sorted({s.name for s in service.ledger.sessions.values() if s.name})[:64],
        "leases": len(service.ledger.leases),
        "leases_expired": service.ledger.expired,
        "reservations": len(service.ledger.reservations),
        "tiers": {
            **({} if service.gpu is None else {"gpu": _gpu(service.gpu)}),
            "host": _host(service),
            **{queue.tier.name: _lower(queue) for queue in chain.queues},
        },
        "queue": {"blocks": chain.dirty_blocks, "bytes": sum(queue.bytes for queue in chain.queues)},
        "prefetch": {"blocks": len(chain.ahead), "bytes": chain.ahead.bytes, "refused": chain.ahead.refused},
        "events": service.feed.state(),
        "chunks": service.chunks.state(),
        "namespaces": _namespaces(service),
        "quotas": service.quotas.state(),
        "quota_evictions": [list(each) for each in service.quotas.evicted()],
        "policies": service.desk.policies(),
        "reuse": service.desk.reuse_state(),
        "saved": service.desk.savings_state(),
        "blends": service.desk.blends.state(service.namespaces.fields),
        "requests": {
            verb: {"count": s.count, "errors": s.errors, "seconds": s.seconds, "buckets": s.below()}
            for verb, s in traffic.verbs.items()
        },
        "slow": [slow._asdict() for slow in traffic.slow],
        "errors": dict(traffic.errors),
        "refused_connections": traffic.refused_connections,
        "asked_blocks": service.asked,
        "hit_blocks": {TierCode(code).name.lower(): n for code, n in service.hit.items()},
        "missed": dict(service.missed),
        "hit_tokens": service.hit_tokens,
        "not_stored": {"exists": service.host.counters.exists, **service.host.counters.dropped},
    }


def _counters(counters: TierCounters) -> dict[str, Any]:
    return {name: getattr(counters, name) for name in TierCounters.__slots__}


def _lower(queue: WriteBehind) -> dict[str, Any]:
    doorkeeper = queue.doorkeeper
    return lower_tier(queue.tier) | ({} if doorkeeper is None else {"kept_out": doorkeeper.kept_out})


def _host(service: Service) -> dict[str, Any]:
    host = service.host
    usage = host.usage()
    return _counters(host.counters) | {
        "capacity": usage.capacity,
        "blocks_capacity": host.arena.capacity,
        "used": usage.used,
        "blocks": usage.blocks,
        "slabs": host.arena.total // host.arena.slab_bytes,
        "dropping_bytes": host.arena.dropping,
        "index_bytes": host.index_bytes,
        "huge_pages": host.arena.huge,
        "pins_refused": host.pins.refused,
        **host.breakdown(),
    }


def _gpu(gpu: GpuDesk) -> dict[str, Any]:
    usage = gpu.tier.usage()
    return _counters(gpu.tier.counters) | {
        "capacity": usage.capacity,
        "used": usage.used,
        "blocks": usage.blocks,
        "slabs": usage.capacity // gpu.tier.pool.slab_bytes,
        **gpu.state(),
    }


def lower_tier(tier: Tier) -> dict[str, Any]:
    """A tier below the host: counters, usage, and what else it has to say of itself."""
    usage = tier.usage()
    return _counters(tier.counters) | {
        "capacity": usage.capacity,
        "used": usage.used,
        "blocks": usage.blocks,
        **tier.describe_state(),
    }


def _namespaces(service: Service) -> list[dict[str, Any]]:
    held: dict[Scope, dict[str, tuple[int, int]]] = {}
    for name, scopes in _by_tier(service):
        for scope, counts in scopes.items():
            held.setdefault(scope, {})[name] = counts
    out: list[dict[str, Any]] = []
    for record in service.namespaces:
        tiers = held.pop(record.scope, {})
        out.append(record.to_json() | _held(tiers))
    for scope, tiers in held.items():  # on disk since before this start, and not introduced again yet
        out.append({"digest": scope.ns.hex(), "domain": scope.domain} | _held(tiers))
    return sorted(out, key=lambda ns: -sum(ns["bytes"].values()))[:256]


def _by_tier(service: Service) -> Iterable[tuple[str, dict[Scope, tuple[int, int]]]]:
    yield "host", service.host.scopes()
    for tier in service.chain.below:
        yield tier.name, tier.scopes()


def _held(tiers: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {
        "blocks": {name: blocks for name, (blocks, _) in tiers.items()},
        "bytes": {name: nbytes for name, (_, nbytes) in tiers.items()},
    }
