"""Uses are told to Redis before anybody chooses what leaves, whoever tells them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from kvstore.remote.index import Place
from kvstore.remote.uses import Uses
from kvstore.types import BlockId, Scope

BLOCK = BlockId(Scope("owner", b"n" * 32), b"k" * 32)


async def test_who_has_nothing_to_tell_waits_for_what_is_being_told() -> None:
    arrived: list[str] = []
    answer = asyncio.Event()

    async def script(*_: Any) -> None:
        await answer.wait()
        arrived.append("use")

    async def expire(_: Any) -> None:
        pass

    mirror = SimpleNamespace(find=lambda _: Place(1, 1, 1))
    index: Any = SimpleNamespace(mirror=mirror, member=lambda block: block.key, block=lambda _: BLOCK, script=script)
    values: Any = SimpleNamespace(names=lambda *_: [], expire=expire)
    uses = Uses(index, values, 60)
    uses.touch([BLOCK])
    follower = asyncio.create_task(uses.flush())
    await asyncio.sleep(0)
    writer = asyncio.create_task(uses.flush())
    await asyncio.sleep(0.01)
    assert not writer.done()
    answer.set()
    await writer
    assert arrived == ["use"]
    await follower
