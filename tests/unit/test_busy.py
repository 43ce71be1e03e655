"""Marks on what a thread is working on: inside each other, overlapping, and waited for."""

from __future__ import annotations

import asyncio

from kvstore.disk.busy import Busy
from kvstore.testing.tier_kit import block_of

ONE, OTHER = block_of(1), block_of(2)


async def test_a_name_is_free_when_the_last_mark_ends_whichever_that_is() -> None:
    busy = Busy()
    first, second = busy.mark([ONE]), busy.mark([ONE, OTHER])
    first.__enter__()
    second.__enter__()
    waiting = asyncio.ensure_future(busy.until_free(ONE))
    first.__exit__(None, None, None)  # the first to begin is the first to end
    await asyncio.sleep(0)
    assert ONE in busy
    assert not waiting.done()
    second.__exit__(None, None, None)
    await asyncio.wait_for(waiting, 1)
    assert not busy


async def test_who_waits_waits_again_for_who_came_first_after_the_end() -> None:
    busy = Busy()
    with busy.mark([ONE]):
        waiting = asyncio.ensure_future(busy.until_free(ONE))
        await asyncio.sleep(0)
    with busy.mark([ONE]):
        await asyncio.sleep(0.01)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 1)


async def test_marks_inside_each_other_are_one() -> None:
    busy = Busy()
    with busy.mark([ONE]):
        with busy.mark([ONE, OTHER]):
            assert list(busy) == [ONE, OTHER]
        assert list(busy) == [ONE]
    assert not busy
    await asyncio.wait_for(busy.until_free(ONE), 1)
