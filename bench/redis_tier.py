"""Redis tier against a bare pipeline of the same bytes over the same socket, both ways.

A real Valkey on a Unix socket, and uvloop, which the daemon runs on. The bare pipeline is the client library with the
same number of connections, one pipeline of SET (or GET) of parts of the same size on each, and nothing else: no index,
no checksum, no header. Since the tier moves values past that library, it is also held against what moves them, the same
commands on lanes of its own with nothing else: what index, checksums and seal cost. Several blocks go at a time, as
write-behind and promotion do it. Who goes first changes, and the server has freed what was there before. Shares are the
medians of the rounds.

    python bench/redis_tier.py --out bench/results/redis_tier.json
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import redis.asyncio as aioredis
import uvloop
from common import arguments, finish, key, touched

from kvstore.remote.link import Link
from kvstore.remote.record import PART_BYTES
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.redis import RedisTier
from kvstore.types import BlockHeader, BlockId, Hit, Scope, Stored

MIB = 1 << 20
CONNECTIONS = 4
AT_ONCE = 4
"""Blocks under way."""
WHO, WAYS = ("tier", "bare", "lane"), ("set", "get")
SCOPE = Scope("uid-bench", b"n" * 32)


async def main_async(args: Any, place: Path) -> dict[str, Any]:
    """All block sizes."""
    results: dict[str, Any] = {}
    with ValkeyServer(place, "--maxmemory", "2gb") as server:
        for sealed in (False, True):
            for size in args.sizes:
                name = f"{size} MiB" + (", sealed" if sealed else "")
                results[name] = await one_size(args, server.url, size * MIB, b"k" * 32 if sealed else b"")
    return results


async def one_size(args: Any, url: str, nbytes: int, secret: bytes) -> dict[str, Any]:
    """Rounds of one block size: GiB/s of tier and pipeline, and the share."""
    tier = RedisTier(url, 1 << 30, connections=CONNECTIONS, timeout_s=30, key=secret)
    await tier.start()
    clients = [aioredis.Redis.from_url(url, socket_timeout=30) for _ in range(CONNECTIONS)]
    link = Link(url, False, CONNECTIONS, 30)
    source, target = touched(nbytes), touched(nbytes)
    count = max(4, args.mib * MIB // nbytes)
    took: dict[str, list[float]] = {f"{who} {way}": [] for who in WHO for way in WAYS}
    try:
        for number in range(args.rounds + 1):
            blocks = [BlockId(SCOPE, key(i, f"{nbytes}/{number}")) for i in range(count)]
            seconds = await one_round(number, tier, clients, link, blocks, source, target)
            if not (target == source).all():
                raise SystemExit("what came back is not what was stored")
            if number:  # the first round warms both up
                for name, each in seconds.items():
                    took[name].append(each)
            await tier.clear(SCOPE)
            numbers = [(i, p) for i in range(count) for p in range(parts(nbytes))]
            await clients[0].unlink(*[f"{who}:{i}:{p}" for who in ("bare", "lane") for i, p in numbers])
            while (await clients[0].info("memory"))["lazyfree_pending_objects"]:
                await asyncio.sleep(0.01)
    finally:
        for client in clients:
            await client.aclose()
        await link.close()
        await tier.close()
    gib = count * nbytes / (1 << 30)
    speeds = {name: gib / median(each) for name, each in took.items()}
    shares = {
        f"share_of_{who}": {way: share(took[f"{who} {way}"], took[f"tier {way}"]) for way in WAYS} for who in WHO[1:]
    }
    return {"gib_s": speeds, **shares, "rounds": args.rounds, "blocks": count}


async def one_round(
    number: int, tier: RedisTier, clients: list[Any], link: Link, blocks: list[BlockId], source: Any, target: Any
) -> dict[str, float]:
    """Seconds that each takes to set all blocks, and then to get them."""
    works = {
        "tier set": lambda: tier_set(tier, blocks, source),
        "bare set": lambda: bare_set(clients, len(blocks), source),
        "lane set": lambda: lane_set(link, len(blocks), source),
        "tier get": lambda: tier_get(tier, blocks, target),
        "bare get": lambda: bare_get(clients, len(blocks), len(source)),
        "lane get": lambda: lane_get(link, len(blocks), len(source)),
    }
    turn = number % len(WHO)
    order = [f"{who} {way}" for way in WAYS for who in WHO[turn:] + WHO[:turn]]
    return {name: await works[name]() for name in order}


def share(theirs: list[float], ours: list[float]) -> float:
    """Median of how much of their speed we have, round by round."""
    return median([one / other for one, other in zip(theirs, ours, strict=True)])


def parts(nbytes: int) -> int:
    """Parts of a block."""
    return -(-nbytes // PART_BYTES)


async def tier_set(tier: RedisTier, blocks: list[BlockId], source: Any) -> float:
    """Seconds to store all blocks."""
    began = time.perf_counter()

    async def one(number: int) -> None:
        outcome = await tier.put(blocks[number], BlockHeader(), [source.data], len(source))
        if outcome != Stored():
            raise SystemExit(f"a block was not stored: {outcome}")

    await at_once(one, len(blocks))
    return time.perf_counter() - began


async def tier_get(tier: RedisTier, blocks: list[BlockId], target: Any) -> float:
    """Seconds to load all blocks."""
    target[:] = 0
    began = time.perf_counter()

    async def one(number: int) -> None:
        outcome = await tier.get(blocks[number], [target.data])
        if not isinstance(outcome, Hit):
            raise SystemExit(f"a block was not found: {outcome}")

    await at_once(one, len(blocks))
    return time.perf_counter() - began


async def bare_set(clients: list[Any], count: int, source: Any) -> float:
    """Seconds of pipelined SETs of the same parts."""
    view, total = source.data, parts(len(source))

    async def lane(client: Any, block: int, first: int) -> None:
        async with client.pipeline(transaction=False) as pipe:
            for part in range(first, total, len(clients)):
                pipe.set(f"bare:{block}:{part}", view[part * PART_BYTES : (part + 1) * PART_BYTES])
            await pipe.execute()

    began = time.perf_counter()
    await at_once(lambda block: lanes(lane, clients, block, total), count)
    return time.perf_counter() - began


async def bare_get(clients: list[Any], count: int, nbytes: int) -> float:
    """Seconds of pipelined GETs of the same parts, each copied to where it belongs."""
    target, total = touched(nbytes).data, parts(nbytes)

    async def lane(client: Any, block: int, first: int) -> None:
        mine = range(first, total, len(clients))
        async with client.pipeline(transaction=False) as pipe:
            for part in mine:
                pipe.get(f"bare:{block}:{part}")
            for part, value in zip(mine, await pipe.execute(), strict=True):
                target[part * PART_BYTES : part * PART_BYTES + len(value)] = value

    began = time.perf_counter()
    await at_once(lambda block: lanes(lane, clients, block, total), count)
    return time.perf_counter() - began


async def lane_set(link: Link, count: int, source: Any) -> float:
    """As `bare_set`, on lanes."""
    view, total = source.data, parts(len(source))

    async def lane(_: Any, block: int, first: int) -> None:
        mine = range(first, total, CONNECTIONS)
        pieces = [view[part * PART_BYTES : (part + 1) * PART_BYTES] for part in mine]
        await link.exchange([("SET", f"lane:{block}:{p}", piece) for p, piece in zip(mine, pieces, strict=True)])

    began = time.perf_counter()
    await at_once(lambda block: lanes(lane, [None] * CONNECTIONS, block, total), count)
    return time.perf_counter() - began


async def lane_get(link: Link, count: int, nbytes: int) -> float:
    """As `bare_get`, on lanes."""
    target, total = touched(nbytes).data, parts(nbytes)

    async def lane(_: Any, block: int, first: int) -> None:
        mine = range(first, total, CONNECTIONS)
        rooms = [target[part * PART_BYTES : (part + 1) * PART_BYTES] for part in mine]
        await link.exchange([("GET", f"lane:{block}:{part}") for part in mine], rooms)

    began = time.perf_counter()
    await at_once(lambda block: lanes(lane, [None] * CONNECTIONS, block, total), count)
    return time.perf_counter() - began


async def lanes(lane: Any, clients: list[Any], block: int, total: int) -> None:
    """A block's parts, spread over the connections: which one gets the first part goes round."""
    count = len(clients)
    await asyncio.gather(*(lane(clients[(block + i) % count], block, i) for i in range(min(count, total))))


async def at_once(work: Any, count: int) -> None:
    """Do `work(number)` for each number, `AT_ONCE` at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=[1, 4, 16], help="MiB of a block (default 1 4 16)")
    parser.add_argument("--mib", type=int, default=128, help="MiB moved in a round (default 128)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvb-") as place:
        results = uvloop.run(main_async(args, Path(place)))
    rows = [
        (name, *(f"{row['gib_s'][f'{who} {way}']:.2f}" for way in WAYS for who in WHO),
         *(f"{row[f'share_of_{who}']['set']:.0%} / {row[f'share_of_{who}']['get']:.0%}" for who in WHO[1:]))
        for name, row in results.items()
    ]  # fmt: skip
    finish(
        args,
        "redis_tier",
        results,
        ("block", "set GiB/s", "bare", "lanes", "get GiB/s", "bare", "lanes", "of bare", "of lanes"),
        rows,
    )


if __name__ == "__main__":
    main()
