"""Damaged, exchanged and foreign files under the disk tier: misses, put aside, and told of by `kvstore check`."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
from disks import directory_of, file_of, opened, real_bytes, until

from kvstore.errors import StorageError
from kvstore.testing.tier_kit import MIB, block_of, load, pages, scope_of, store
from kvstore.types import BlockHeader, BlockId, Dropped, DropReason, Miss, MissReason, Scope, Stored


async def test_a_flip_of_any_byte_of_a_stored_file_is_a_miss(tmp_path: Path) -> None:
    block, nbytes = block_of(1), 3 * 4096 + 100
    async with opened(tmp_path / "t", 64 * MIB) as tier:
        await store(tier, block, nbytes)
        path = file_of(tmp_path / "t", block)
        good = path.read_bytes()
        positions = sorted({*range(700), *range(700, len(good), 61), len(good) - 1, 4096, 4096 + nbytes})
        for count, position in enumerate(positions, 1):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            assert await tier.get(block, pages(nbytes)) == Miss(MissReason.CORRUPT), position
            assert tier.counters.corrupt == count
            assert not path.exists()
            if count % 16 == 0:  # through the tier, now and then; else past it, which is faster
                assert await store(tier, block, nbytes) == Stored()
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(good)
                assert [f.what for f in await tier.check(fix=True)] == ["unknown file"]
            assert await load(tier, block, nbytes)
        assert len(list((tmp_path / "t" / "quarantine").iterdir())) <= 64


async def test_a_file_of_any_other_length_is_a_miss(tmp_path: Path) -> None:
    block, nbytes = block_of(1), MIB + 5000
    async with opened(tmp_path / "t") as tier:
        await store(tier, block, nbytes)
        path = file_of(tmp_path / "t", block)
        good = path.read_bytes()
        for length in [0, 1, 40, 511, 4095, 4096, 4097, 8192, MIB, len(good) - 4096, len(good) - 1, len(good) + 1]:
            path.write_bytes(good[:length].ljust(length, b"\0"))
            assert await tier.get(block, pages(nbytes)) == Miss(MissReason.CORRUPT), length
            assert not tier.contains(*block)
            assert await store(tier, block, nbytes) == Stored()
            assert await load(tier, block, nbytes)
        await tier.close()


async def test_a_damaged_length_found_after_a_restart(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 50_000)
        await store(tier, block_of(2), 50_000)
    os.truncate(file_of(root, block_of(1)), 4096)
    async with opened(root) as tier:
        assert tier.contains(*block_of(1)), "a start looks at names only"
        assert await tier.get(block_of(1), pages(50_000)) == Miss(MissReason.CORRUPT)
        assert await load(tier, block_of(2), 50_000)


async def test_another_blocks_file_under_this_blocks_name_is_a_miss(tmp_path: Path) -> None:
    root = tmp_path / "t"
    other_ns, other_domain = block_of(1, scope_of(5)), block_of(1, scope_of(0, "u1"))
    async with opened(root) as tier:
        for block in (block_of(1), block_of(2), other_ns, other_domain):
            await store(tier, block, 30_000)
        for other in (block_of(2), other_ns, other_domain):
            shutil.copyfile(file_of(root, other), file_of(root, block_of(1)))
            assert await tier.get(block_of(1), pages(30_000)) == Miss(MissReason.CORRUPT)
            assert await load(tier, other, 30_000)
            await store(tier, block_of(1), 30_000)
        # a file under a name that says another length
        path = file_of(root, block_of(1))
        os.rename(path, path.with_name(path.name.replace("-7530.kv", "-7531.kv")))
    async with opened(root) as tier:
        assert tier.size(block_of(1)) == 30_001
        assert await tier.get(block_of(1), pages(30_001)) == Miss(MissReason.CORRUPT)


async def test_a_file_that_is_gone_is_a_miss_and_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path / "t") as tier:
        empty = tier.usage()
        await store(tier, block_of(1), 30_000)
        file_of(tmp_path / "t", block_of(1)).unlink()
        assert await tier.get(block_of(1), pages(30_000)) == Miss(MissReason.LOST)
        assert tier.size(block_of(1)) is None
        assert tier.usage() == empty
        await store(tier, block_of(2), 30_000)
        shutil.rmtree(directory_of(tmp_path / "t"))
        assert await tier.get(block_of(2), pages(30_000)) == Miss(MissReason.LOST)
        assert tier.usage() == empty
        assert await store(tier, block_of(2), 30_000) == Stored()
        assert await load(tier, block_of(2), 30_000)


async def test_quarantine_is_bounded_and_within_the_budget(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root, 8 * MIB) as tier:
        for number in range(100):
            await store(tier, block_of(number), 20_000)
            path = file_of(root, block_of(number))
            path.write_bytes(b"x" * path.stat().st_size)
            assert await tier.get(block_of(number), pages(20_000)) == Miss(MissReason.CORRUPT)
            held = list((root / "quarantine").iterdir())
            assert len(held) <= 64
            assert sum(p.stat().st_size for p in held) <= MIB
            assert real_bytes(root) <= tier.usage().used
        assert len(held) > 30
        state = tier.describe_state()
        assert state["quarantined_files"] == len(held)
        used = tier.usage().used
        # a block larger than the whole quarantine is removed instead
        await store(tier, block_of(1000), 2 * MIB)
        path = file_of(root, block_of(1000))
        path.write_bytes(b"x" * path.stat().st_size)
        assert await tier.get(block_of(1000), pages(2 * MIB)) == Miss(MissReason.CORRUPT)
        assert not path.exists()
        assert tier.usage().used == used
    async with opened(root, 8 * MIB) as tier:
        assert tier.usage().used == used


# -- check -------------------------------------------------------------------------------------------------------------


async def test_check_finds_and_mends_each_kind_of_disagreement(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        for number in range(8):
            await store(tier, block_of(number), 20_000)
        ns = directory_of(root)
        file_of(root, block_of(0)).unlink()
        os.truncate(file_of(root, block_of(1)), 100)
        file_of(root, block_of(2)).write_bytes(b"x" * (4096 + 20_480))
        good = file_of(root, block_of(3)).read_bytes()
        name = file_of(root, block_of(3)).name
        await tier.drop(block_of(3))
        (ns / name).write_bytes(good)
        (ns / name.replace(block_of(3).key.hex(), "00" * 32)).write_bytes(good)
        (root / "tmp" / "77").write_bytes(b"half")
        (ns / "stranger").write_bytes(b"?")
        tier._index.used += 4096
        expected = [
            "corrupt file",
            "foreign file",
            "leftover tmp",
            "missing file",
            "unknown file",
            "unknown file, corrupt file",
            "wrong size",
            "wrong totals",
        ]
        assert sorted(f.what for f in await tier.check()) == expected
        assert not any(f.fixed for f in await tier.check())
        mended = await tier.check(fix=True)
        assert sorted(f.what for f in mended) == expected
        assert [f.what for f in mended if not f.fixed] == ["foreign file"]
        assert [f.what for f in await tier.check()] == ["foreign file"]
        assert (ns / "stranger").read_bytes() == b"?"
        assert {n for n in range(8) if tier.contains(*block_of(n))} == {3, 4, 5, 6, 7}
        for number in range(3, 8):
            assert await load(tier, block_of(number), 20_000)
    async with opened(root) as again:
        assert again.usage().blocks == 5
        assert [f.what for f in await again.check()] == ["foreign file"]


async def test_check_while_serving_accuses_nobody(tmp_path: Path) -> None:
    async with opened(tmp_path / "t", 3 * MIB) as tier:
        busy = True

        async def traffic(seed: int) -> None:
            rng = random.Random(seed)
            while busy:
                block = block_of(rng.randrange(40))
                await (store(tier, block, 100_000) if rng.random() < 0.6 else tier.drop(block))

        tasks = [asyncio.ensure_future(traffic(seed)) for seed in range(4)]
        for number in range(20):
            assert await tier.check(fix=number % 2 == 1) == []
        busy = False
        await asyncio.gather(*tasks)
        assert await tier.check() == []


async def test_check_adopts_only_what_the_budget_allows(tmp_path: Path) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 2 * MIB)
        kept = file_of(root, block_of(1)).read_bytes()
        name = file_of(root, block_of(1)).name
    shutil.rmtree(root)
    async with opened(root, MIB) as tier:
        await store(tier, block_of(2), 1000)
        (directory_of(root) / name).write_bytes(kept)
        assert [(f.what, f.fixed) for f in await tier.check(fix=True)] == [("unknown file", True)]
        assert not (directory_of(root) / name).exists()
        assert tier.usage().used <= MIB


# -- what is not ours --------------------------------------------------------------------------------------------------


async def test_foreign_things_are_ignored_reported_and_left_alone(tmp_path: Path) -> None:
    root, outside = tmp_path / "t", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s" * 8192)
    async with opened(root) as tier:
        await store(tier, block_of(0), 4096)
        used = tier.usage().used
        model = file_of(root, block_of(0)).name
    ns = directory_of(root)

    def named(number: int) -> Path:
        return ns / model.replace(block_of(0).key.hex(), block_of(number).key.hex())

    named(1).symlink_to(outside / "secret")
    os.mkfifo(named(2))
    named(3).mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(ns)
        sock.bind(os.path.join(".", named(4).name[:60]))
        os.chdir("/")
    (ns / "notes.txt").write_bytes(b"n")
    (ns / model.replace("-1000-", "-1001-")).write_bytes(b"")
    (ns / model.upper()).write_bytes(b"")
    (ns / model.replace(block_of(0).key.hex(), block_of(8).key.hex().upper())).write_bytes(b"")
    (ns / model.replace(block_of(0).key.hex(), "  " + block_of(0).key.hex()[2:])).write_bytes(b"")
    (root / "blocks" / "file").write_bytes(b"")
    (root / "blocks" / "-bad").mkdir()
    (root / "blocks" / "link").symlink_to(outside)
    (root / "blocks" / "u0" / ("AB" * 32)).mkdir()
    (root / "blocks" / "u0" / ("cd" * 32)).symlink_to(outside)
    twin = ns / model.replace(block_of(0).key.hex(), block_of(0).key.hex().upper())
    twin.write_bytes(b"")
    async with opened(root) as tier:
        await until(lambda: tier.usage().blocks == 1)
        assert tier.usage().used == used, "no block counts twice"
        assert await load(tier, block_of(0), 4096)
    twin.unlink()
    async with opened(root) as tier:
        await until(lambda: tier.describe_state()["foreign_files"] == 14)  # some are known only when looked at
        assert tier.usage().blocks == 1
        assert tier.usage().used == used
        for number in (1, 2, 3):
            assert await tier.get(block_of(number), pages(4096)) == Miss(MissReason.ABSENT)
        findings = await tier.check(fix=True)
        assert [f.what for f in findings] == ["foreign file"] * 14
        assert not any(f.fixed for f in findings)
        assert await load(tier, block_of(0), 4096)
    assert (outside / "secret").read_bytes() == b"s" * 8192
    assert named(1).is_symlink()
    assert named(3).is_dir()


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "hard link"])
async def test_a_block_replaced_by_something_else_is_a_miss(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "t"
    async with opened(root) as tier:
        await store(tier, block_of(1), 4096)
        await store(tier, block_of(2), 4096)
        path = file_of(root, block_of(1))
        keep = tmp_path / "elsewhere"
        if kind == "hard link":
            os.link(path, keep)
        else:
            path.rename(keep)
        if kind == "symlink":
            path.symlink_to(keep)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        assert await tier.get(block_of(1), pages(4096)) == Miss(MissReason.LOST)
        assert tier.size(block_of(1)) is None
        assert keep.stat().st_size == 8192
        outcome = await store(tier, block_of(1), 4096)
        assert outcome == (Dropped(DropReason.IO_ERROR) if kind == "directory" else Stored())
        assert await load(tier, block_of(1), 4096) == (kind != "directory")
        assert keep.stat().st_size == 8192
        assert list((root / "tmp").iterdir()) == []


@pytest.mark.parametrize("domain", ["", ".", "..", "a/b", "x" * 65, "a\0b"])
async def test_a_domain_that_makes_no_path(tmp_path: Path, domain: str) -> None:
    async with opened(tmp_path / "t") as tier:
        block = BlockId(Scope(domain, bytes(32)), bytes(32))
        assert tier.size(block) is None
        assert await tier.get(block, pages(1)) == Miss(MissReason.ABSENT)
        with pytest.raises(StorageError):
            await tier.put(block, BlockHeader(), pages(1), 1)
        with pytest.raises(StorageError):
            await tier.describe(block.scope, b"text")
        assert tier.usage().blocks == 0
