"""Several daemons that store large blocks into a small budget of one Redis server: who gets in, what the server takes.

Each daemon writes some blocks at a time, for some seconds, and rests for 20 ms after each. Seen meanwhile are the bytes
reserved of the budget, and the server's memory beyond what it took before; afterwards, when the server has had 6 s to
shrink its buffers, that memory once more.

    python bench/redis_budget.py --out bench/results/redis_budget.json
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis.asyncio as aioredis
import uvloop
from common import arguments, finish, key, touched

from kvstore.remote.index import Names
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import BlockHeader, BlockId, Dropped, Scope

MIB = 1 << 20
DAEMONS, AT_ONCE = 3, 4
REST_S = 0.02
SETTLE_S = 6.0
PREFIX = "kvstore"
SCOPE = Scope("uid-bench", b"n" * 32)


async def one(nbytes: int, room: float, seconds: float) -> dict[str, Any]:
    """Store into a budget of so many blocks."""
    capacity, payload = int(nbytes * room), touched(nbytes)
    with tempfile.TemporaryDirectory(prefix="kvb-") as place, ValkeyServer(Path(place)) as server:
        tiers = [RedisTier(server.url, capacity, prefix=PREFIX, timeout_s=10) for _ in range(DAEMONS)]
        for tier in tiers:
            await tier.start()
        client = aioredis.Redis.from_url(server.url)
        before = (await client.info("memory"))["used_memory"]
        seen = [Counter[str]() for _ in tiers]
        until = time.monotonic() + seconds

        async def worker(which: int, lane: int) -> None:
            number = 0
            while time.monotonic() < until:
                number += 1
                block = BlockId(SCOPE, key(number, f"{which}/{lane}"))
                outcome = await tiers[which].put(block, BlockHeader(), [payload.data], nbytes)
                seen[which][outcome.reason.value if isinstance(outcome, Dropped) else "stored"] += 1
                await asyncio.sleep(REST_S)

        work = asyncio.gather(*(worker(which, lane) for which in range(DAEMONS) for lane in range(AT_ONCE)))
        reserved = used = 0
        while not work.done():
            reserved = max(reserved, int(await client.get(Names(PREFIX).sum) or 0))
            used = max(used, (await client.info("memory"))["used_memory"] - before)
            await asyncio.sleep(0.005)
        await work
        await asyncio.sleep(SETTLE_S)
        after = (await client.info("memory"))["used_memory"] - before
        left = int(await client.get(Names(PREFIX).sum) or 0)
        for tier in tiers:
            await tier.close()
        await client.aclose()
    return {
        "reserved_share": reserved / capacity,
        "server_above_budget_mib": (used - capacity) / MIB,
        "server_above_reserved_afterwards_mib": (after - left) / MIB,
        "outcomes": [dict(each) for each in seen],
    }


async def main_async(args: Any) -> dict[str, Any]:
    """All sizes and budgets."""
    return {
        f"{size} MiB, room for {room:g}": await one(size * MIB, room, args.seconds)
        for size in args.sizes
        for room in args.rooms
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 6], help="MiB of a block (default 1 6)")
    parser.add_argument(
        "--rooms", nargs="*", type=float, default=[2.2, 4.5, 8.5, 13.5, 20.5], help="blocks of a budget"
    )
    parser.add_argument("--seconds", type=float, default=4, help="how long each lasts (default 4)")
    args = parser.parse_args()
    results = uvloop.run(main_async(args))
    rows = [
        (
            name,
            f"{row['reserved_share']:.0%}",
            f"{row['server_above_budget_mib']:+.1f}",
            f"{row['server_above_reserved_afterwards_mib']:+.1f}",
            " / ".join(str(each.get("stored", 0)) for each in row["outcomes"]),
            " / ".join(str(each.get("tier_full", 0)) for each in row["outcomes"]),
        )
        for name, row in results.items()
    ]
    header = ("block", "reserved", "above budget MiB", "afterwards MiB", "stored", "refused")
    finish(args, "redis_budget", results, header, rows)


if __name__ == "__main__":
    main()
