"""What engines offer to store, answered block by block."""

from __future__ import annotations

from typing import Any

import pytest
from daemons import key
from service_kit import House

from kvstore.wire import messages as m


async def test_of_a_full_memory_room_is_asked_once_for_blocks_that_are_no_smaller(monkeypatch: pytest.MonkeyPatch):
    house = House(1 << 20)
    session = house.session("uid-1")
    held = await house.reserve(session, *(m.Offer(k, 192 * 1024) for k in map(key, range(3))))
    assert len(held.rooms) == 3, "lent, so that none of it can be evicted"
    asked: list[int] = []
    allocate = house.host.allocate

    def count(domain: str, nbytes: int, *rest: Any, **more: Any) -> Any:
        asked.append(nbytes)
        return allocate(domain, nbytes, *rest, **more)

    monkeypatch.setattr(house.host, "allocate", count)
    sizes = [256 * 1024, 512 * 1024, 256 * 1024, 4096, 256 * 1024, 4096]
    offers = [m.Offer(k, nbytes) for k, nbytes in zip(map(key, range(3, 9)), sizes, strict=True)]
    reply = await house.reserve(session, *offers)
    assert asked == [256 * 1024, 4096, 4096]
    assert [room.index for room in reply.rooms] == [3, 5]
    assert [(no.index, no.status) for no in reply.others] == [(i, "host_full") for i in (0, 1, 2, 4)]
    house.check()
