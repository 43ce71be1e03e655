"""`check` of the disk tier: index against files, files against index, every byte against its checksum.

Safe while the tier serves: what changes under the walk is looked at again before it is called wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kvstore.disk.blocks import DESCRIPTION, ForeignFile, WrongSize
from kvstore.disk.format import Shape, block_name, parse_name, scope_path
from kvstore.disk.index import NAMESPACE_COST, Departure
from kvstore.disk.recover import walk
from kvstore.disk.store import Store
from kvstore.errors import CorruptBlock, TierDown
from kvstore.tiers.base import Finding
from kvstore.types import BlockId

Item = tuple[BlockId, Shape]


async def check_disk(store: Store, fix: bool) -> list[Finding]:
    """Everything that is not as it should be, and whether it was mended.

    Raises
    ------
    TierDown
        If a directory cannot be listed.
    """
    try:
        on_disk, foreign = await store.threads.run(_survey, store)
        findings = [Finding("foreign file", path) for path in foreign]
        findings += await _check_tmp(store, fix)
    except OSError as error:
        raise TierDown(f"disk tier: {store.root} cannot be listed ({error}).") from error
    indexed = [
        (BlockId(scope, key), s) for scope, space in store.index.spaces.items() for key, s in space.blocks.items()
    ]
    known = set(indexed)
    findings += await _in_parallel(store, fix, indexed, _check_indexed)
    findings += await _in_parallel(store, fix, [item for item in on_disk if item not in known], _check_unknown)
    return findings + _check_totals(store, fix)


def _survey(store: Store) -> tuple[list[Item], list[str]]:
    """In a thread: every block that a file name tells of, and the paths of everything else."""
    blocks: list[Item] = []
    foreign: list[str] = []
    for scope, path, listing in walk(store.directory, store.files, store.files.list_dir, foreign):
        foreign += [f"{path}/{name}" for name in (*listing.dirs, *listing.others)]
        for name in listing.files:
            parsed = parse_name(name)
            if parsed is not None:
                blocks.append((BlockId(scope, parsed[0]), parsed[1]))
            elif name != DESCRIPTION:
                foreign.append(f"{path}/{name}")
    return blocks, foreign


async def _in_parallel(
    store: Store, fix: bool, items: list[Item], examine: Callable[[Store, Item, bool], Awaitable[Finding | None]]
) -> list[Finding]:
    """Examine items, as many at once as there are I/O threads; what was found, in the order of the items."""
    found: list[Finding | None] = [None] * len(items)
    numbered = enumerate(items)

    async def worker() -> None:
        for number, item in numbered:
            found[number] = await examine(store, item, fix)

    await asyncio.gather(*(worker() for _ in range(store.threads.count)))
    return [finding for finding in found if finding is not None]


async def _verdict(store: Store, item: Item) -> str:
    """What is wrong with a block's file; empty if nothing is."""
    try:
        await store.threads.run(store.blocks.verify, *item)
    except WrongSize:
        return "wrong size"
    except CorruptBlock:
        return "corrupt file"
    except FileNotFoundError:
        return "missing file"
    except ForeignFile:
        return "foreign file"
    except OSError:
        return "unreadable file"
    return ""


async def _check_indexed(store: Store, item: Item, fix: bool) -> Finding | None:
    """A block that the index knows."""
    block, shape = item
    if store.index.find(block) != shape:
        return None  # gone since the walk began
    reading = store.index.begin_read(block)
    try:
        wrong = await _verdict(store, item)
    finally:
        store.index.end_read(block, reading)
    if not wrong or reading.gone:
        return None
    fixed = fix and wrong != "unreadable file"
    if fixed and wrong in ("missing file", "foreign file"):
        await store.forget_lost(block, shape)
    elif fixed:
        await store.set_aside(block, shape)
    return Finding(wrong, _path(item), fixed)


async def _check_unknown(store: Store, item: Item, fix: bool) -> Finding | None:
    """A file that has a block's name and is not in the index."""
    block, shape = item
    if store.index.find(block) == shape or block in store.busy:
        return None  # it came since the walk began, or is on its way out
    with store.occupied(Departure([item])):
        wrong = await _verdict(store, item)
        if wrong == "missing file":
            return None
        fixed = fix and wrong not in ("foreign file", "unreadable file")
        if fixed and wrong:
            await store.set_aside(block, shape)
        elif fixed and not _adopt(store, item):
            await store.threads.run(store.blocks.remove, block, shape)
        if fixed:
            store.index.used -= store.index.leftovers.pop(f"blocks/{_path(item)}", 0)
    return Finding(f"unknown file, {wrong}" if wrong else "unknown file", _path(item), fixed)


def _adopt(store: Store, item: Item) -> bool:
    """Take a good file into the index, if the budget has room for it and there is no other file of the same block."""
    block, shape = item
    index = store.index
    new = 0 if block.scope in index.spaces else NAMESPACE_COST
    if index.find(block) is not None or index.used + shape.cost + new > index.capacity:
        return False
    reservation = index.reserve(block.scope, shape.cost)
    if reservation is None:
        return False
    index.insert(block, shape)
    index.settle(reservation, shape.cost)
    return True


async def _check_tmp(store: Store, fix: bool) -> list[Finding]:
    """Temporary files that nobody is writing."""
    tmp = store.directory.tmp
    listed = (await store.threads.run(store.files.list_dir, tmp)).files
    idle = [name for name in listed if name not in store.blocks.live_tmp]
    still = set((await store.threads.run(store.files.list_dir, tmp)).files) if idle else set()
    findings: list[Finding] = []
    for name in idle:
        if name not in still:
            continue  # it was given its name between the two looks
        if fix:
            await store.threads.run(store.blocks.forget_tmp, name)
            store.index.used -= store.index.leftovers.pop(f"tmp/{name}", 0)
        findings.append(Finding("leftover tmp", f"tmp/{name}", fix))
    return findings


def _check_totals(store: Store, fix: bool) -> list[Finding]:
    """The sum of all costs, if nothing is in motion."""
    index = store.index
    if store.busy or index.open_reads or index.total() == index.used:
        return []
    finding = Finding("wrong totals", f"{index.used} bytes are booked, {index.total()} are there", fix)
    if fix:
        index.used = index.total()
    return [finding]


def _path(item: Item) -> str:
    return f"{scope_path(item[0].scope)}/{block_name(item[0].key, item[1])}"
