"""A service with sessions of several trust domains, without a socket."""

from __future__ import annotations

import inspect
from typing import Any

from daemons import NAMESPACE, NS, SMALL, payload

from kvstore.chain import TierChain
from kvstore.eviction.lru import LRU
from kvstore.leases import Session
from kvstore.service import Service
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier
from kvstore.types import Extent
from kvstore.wire import messages as m


class House:
    """A service with sessions of several trust domains, without a socket."""

    def __init__(self, nbytes: int = 4 << 20, below: list[Tier] | None = None) -> None:
        self.host = HostTier(nbytes, LRU(), slab_bytes=256 * 1024, ahead_bytes=0)
        self.chain = TierChain(self.host, below or [])
        self.service = Service(self.chain, max_ttl_s=60)
        self.told: list[tuple[str, m.Message]] = []

    def session(self, domain: str, remote: bool = False) -> Session:
        session = self.service.ledger.open(domain, remote, lambda method, params: self.told.append((method, params)))
        if not remote:
            self.ask(session, m.Hello(m.PROTOCOL_VERSION, domain, [NAMESPACE]))
        return session

    def ask(self, session: Session, params: m.Message) -> Any:
        result: Any = self.service.call(session, type(params).__name__.lower(), params)
        assert isinstance(result, m.Message)
        return result

    async def put(self, session: Session, *keys: bytes, nbytes: int = SMALL) -> list[str]:
        offers = [m.Offer(k, nbytes) for k in keys]
        reply = await self.reserve(session, *offers)
        for room in reply.rooms:
            for view in self.host.arena.views(at(room.extents)):
                view[:] = payload(keys[room.index], nbytes)[: len(view)]
        indexes = [room.index for room in reply.rooms]
        return [o.status for o in self.ask(session, m.Commit(reply.reservation, indexes)).outcomes] if indexes else []

    async def reserve(self, session: Session, *offers: m.Offer, wait_s: float = 0.0) -> m.ReserveReply:
        made: Any = self.service.call(session, "reserve", m.Reserve(NS, list(offers), 30.0, wait_s))
        return await made if inspect.isawaitable(made) else made

    def check(self) -> None:
        self.host.check()


def at(extents: Any) -> list[Extent]:
    """Extents as they travel, as the arena knows them."""
    return [Extent(*extent) for extent in extents]
