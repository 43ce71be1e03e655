"""The GPU tier through a real daemon and a client, ordinary memory in the place of a GPU's."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import (
    NAMESPACE,
    SMALL,
    TOKEN,
    DaemonProcess,
    MakeDaemon,
    Raw,
    free_port,
    is_right,
    key,
    payload,
    process,
    store,
    until,
)

from kvstore import AsyncKVStoreClient, KVStoreClient, config
from kvstore.cli import probes
from kvstore.client import LeasedBlock
from kvstore.client.device import DeviceMap
from kvstore.errors import ConnectionLost, ForeignHandle, KVStoreError, ProtocolError, UnknownMethod
from kvstore.testing.device import GPU, OrdinaryImports, open_ordinary
from kvstore.types import TierCode
from kvstore.wire import messages as m

ON = {"gpu.bytes": "32MiB", "gpu.admission": "first"}
KEYS = [key(number, "gpu") for number in range(6)]


Start = Callable[..., DaemonProcess]


@pytest.fixture
def start(make_daemon: MakeDaemon, workdir: Path) -> Start:
    """Starts a daemon with a GPU tier; settings are over those of `ON`."""
    ordinary = {"kvstore.gpu_memory:open_memory": partial(open_ordinary, folder=workdir)}
    return lambda **settings: make_daemon(ON | settings, ordinary).start()


@pytest.fixture
def daemon(start: Start) -> DaemonProcess:
    """A daemon with a GPU tier."""
    return start()


def copies(daemon: DaemonProcess) -> int:
    return daemon.stats()["tiers"]["gpu"]["blocks"]


def bring_up(daemon: DaemonProcess, client: KVStoreClient) -> None:
    """Store blocks and lease them once, so that they are copied."""
    store(client, KEYS)
    with client.lease(KEYS) as lease:
        assert all(isinstance(block, LeasedBlock) and block.device is None for block in lease.blocks)
    until(lambda: copies(daemon) == len(KEYS), "the copies")


def test_leased_blocks_are_read_on_the_gpu_and_in_host_memory(daemon: DaemonProcess) -> None:
    imports = OrdinaryImports()
    client = daemon.client(device=imports)
    bring_up(daemon, client)
    with client.lease(KEYS, headers=True) as lease:
        for k, block in zip(KEYS, lease.blocks, strict=True):
            assert isinstance(block, LeasedBlock)
            assert block.tier is TierCode.GPU
            assert bytes(block.device) == payload(k) == bytes(block.parts[0])
        assert lease.valid()
        assert daemon.stats()["tiers"]["gpu"]["leased_bytes"] == len(KEYS) * SMALL
    assert imports.opened == 1
    assert client.lookup(KEYS) == [TierCode.HOST] * len(KEYS)
    until(daemon.nothing_lent, "the lease to end")
    gpu = daemon.stats()["tiers"]["gpu"]
    assert (gpu["hits"], gpu["stored"], gpu["leased_bytes"]) == (len(KEYS), len(KEYS), 0)


async def test_the_asyncio_face_does_the_same(daemon: DaemonProcess) -> None:
    bring_up(daemon, daemon.client(device=OrdinaryImports()))
    async with AsyncKVStoreClient(daemon.socket, namespace=NAMESPACE, device=OrdinaryImports()) as client:
        with await client.lease(KEYS) as lease:
            read = [bytes(block.device) for block in lease.blocks if isinstance(block, LeasedBlock)]
    assert read == [payload(k) for k in KEYS]


@pytest.mark.parametrize("why", ["other GPU", "no memory", "no importer"])
def test_who_cannot_reach_the_gpu_reads_host_memory(daemon: DaemonProcess, why: str) -> None:
    bring_up(daemon, daemon.client(device=OrdinaryImports()))
    imports = {
        "other GPU": OrdinaryImports(b"another device.."),
        "no memory": OrdinaryImports(fails=True),
    }.get(why)
    client = daemon.client(device=imports)
    for _ in range(2):
        with client.lease(KEYS) as lease:
            for k, block in zip(KEYS, lease.blocks, strict=True):
                assert isinstance(block, LeasedBlock)
                assert block.device is None
                assert bytes(block.parts[0]) == payload(k)
    asked = daemon.stats()["requests"].get("reach", {"count": 0})["count"]
    with client.lease(KEYS):
        pass
    assert daemon.stats()["requests"].get("reach", {"count": 0})["count"] == asked, "it is not asked again"
    assert is_right(KEYS[0], client.get(KEYS[0]))
    until(daemon.nothing_lent, "the leases to end")


def test_a_dropped_block_is_gone_everywhere(daemon: DaemonProcess) -> None:
    client = daemon.client(device=OrdinaryImports())
    bring_up(daemon, client)
    assert client.drop(KEYS[:2]) == 2
    assert copies(daemon) == len(KEYS) - 2
    assert not client.get(KEYS[0])
    client.drop()
    assert copies(daemon) == 0


def _leases_and_dies(address: str) -> None:
    client = KVStoreClient(address, namespace=NAMESPACE, device=OrdinaryImports())
    lease = client.lease(KEYS, ttl_s=300)
    assert all(bytes(block.device) == payload(k) for k, block in zip(KEYS, lease.blocks, strict=True))  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGSTOP)


def test_an_engine_that_is_killed_gives_its_leases_back(daemon: DaemonProcess) -> None:
    bring_up(daemon, daemon.client(device=OrdinaryImports()))
    engine = process(_leases_and_dies, daemon.socket)
    until(lambda: daemon.stats()["tiers"]["gpu"]["leased_bytes"] == len(KEYS) * SMALL, "the engine's lease")
    engine.kill()
    until(lambda: daemon.stats()["tiers"]["gpu"]["leased_bytes"] == 0, "the copies to be given back")
    until(daemon.nothing_lent, "the blocks to be given back")
    assert copies(daemon) == len(KEYS)


def test_a_daemon_that_is_killed_is_found_by_the_lease_and_met_again(daemon: DaemonProcess) -> None:
    client = daemon.client(device=OrdinaryImports())
    bring_up(daemon, client)
    lease = client.lease(KEYS)
    read = bytes(lease.blocks[0].device)  # type: ignore[union-attr]
    daemon.kill()
    assert read == payload(KEYS[0])
    assert not lease.valid(), "what was read counts for nothing"
    with pytest.raises(KVStoreError):
        client.lease(KEYS)
    daemon.start()
    bring_up(daemon, client)
    with client.lease(KEYS) as lease:
        assert bytes(lease.blocks[0].device) == payload(KEYS[0])  # type: ignore[union-attr]


def test_nobody_opens_a_slab_by_guessing(daemon: DaemonProcess) -> None:
    client = daemon.client(device=OrdinaryImports())
    bring_up(daemon, client)
    raw = Raw(daemon.socket)
    lease = raw.call("lease", [client.core.scope(None)[0], KEYS[0], 30.0, False])[0]
    gpu, places = raw.call("reach", [lease, GPU])
    assert (gpu, [place[0] for place in places]) == (GPU, [0])
    slab = places[0][1]
    assert raw.call("open_slab", [slab])[0] == 16 << 20
    for bad in (slab + 1, slab + 10, 0):
        assert raw.refusal("open_slab", [bad]) == ForeignHandle.code
    assert raw.refusal("reach", [lease + 1, GPU]) == ForeignHandle.code


def test_without_a_gpu_the_daemon_says_why_and_works(start: Start) -> None:
    daemon = start(**{"gpu.device": "1"})
    assert "gpu      off: there is no device 1." in daemon.log.read_text()
    assert "the GPU tier is off: there is no device 1." in daemon.log.read_text()
    gpu = daemon.stats()["tiers"]["gpu"]
    assert gpu["breaker"]["reason"] == "there is no device 1."
    client = daemon.client(device=OrdinaryImports())
    store(client, KEYS)
    with client.lease(KEYS) as lease:
        assert all(block.device is None for block in lease.blocks)  # type: ignore[union-attr]


def read(daemon: DaemonProcess, port: int, path: str) -> str:
    """A page of the daemon's HTTP server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_page_metrics_and_explain_show_the_copies(start: Start) -> None:
    port = free_port()
    daemon = start(**{"http.address": f"127.0.0.1:{port}"})
    client = daemon.client(device=OrdinaryImports())
    bring_up(daemon, client)
    assert f'kvstore_tier_blocks{{tier="gpu"}} {len(KEYS)}.0' in read(daemon, port, "/metrics")
    assert 'kvstore_tier_policy_info{policy="lhd",tier="gpu"} 1.0' in read(daemon, port, "/metrics")
    assert "gpu_used" in read(daemon, port, "/")
    ns = client.core.scope(None)[0].hex()
    seen = json.loads(read(daemon, port, f"/v1/explain?namespace={ns}&keys={KEYS[0].hex()}"))
    assert seen["blocks"][0]["tiers"] == ["gpu", "host"]
    assert json.loads(read(daemon, port, "/readyz"))["degraded"] == []


def test_a_tier_that_is_off_is_shown_as_degraded_and_the_daemon_as_ready(start: Start) -> None:
    port = free_port()
    daemon = start(**{"http.address": f"127.0.0.1:{port}", "gpu.device": "7"})
    ready = json.loads(read(daemon, port, "/readyz"))
    assert (ready["ready"], ready["degraded"]) == (True, ["gpu"])
    assert 'kvstore_breaker_state{state="open",tier="gpu"} 1.0' in read(daemon, port, "/metrics")
    assert "there is no device 7." in read(daemon, port, "/")


def test_its_policy_is_changed_like_any_others(daemon: DaemonProcess) -> None:
    client = daemon.client(device=OrdinaryImports())
    bring_up(daemon, client)
    raw = Raw(daemon.socket)
    assert raw.call("policy", ["gpu", "lru"])[0]["gpu"] == "lru"
    with client.lease(KEYS) as lease:
        assert all(block.device is not None for block in lease.blocks)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("asked", "devices", "cupy", "state", "words"),
    [
        ("0", 0, None, "ok", "The GPU tier is off"),
        ("1GiB", 0, "14.2", "warn", "stays off: gpu.bytes is 1 GiB of device 0"),
        ("1GiB", 1, None, "warn", "no GPU tier"),
        ("1GiB", 1, "14.2", "ok", "gpu.bytes 1 GiB of device 0"),
    ],
)
def test_doctor_says_whether_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch, asked: str, devices: int, cupy: str | None, state: str, words: str
) -> None:
    monkeypatch.setattr(probes, "_cuda_devices", lambda: devices)
    monkeypatch.setattr(probes, "_version", lambda name: cupy)
    found = probes.gpu(config.load({"gpu.bytes": asked}, env={}))
    assert found.state == state
    assert words in f"{found.found} {found.meaning}"


def test_by_default_there_is_no_such_tier(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    assert "gpu" not in daemon.stats()["tiers"]
    assert "gpu" not in daemon.log.read_text().partition("Ctrl-C")[0].lower()


def test_no_room_on_the_gpu_evicts_there_only(start: Start) -> None:
    daemon = start(**{"gpu.bytes": "16MiB", "host.bytes": "64MiB", "host.slab_bytes": "16MiB"})
    client = daemon.client(device=OrdinaryImports())
    keys = [key(number, "large") for number in range(10)]
    for k in keys:
        client.put(k, payload(k, 3 << 20))
        with client.lease([k]):
            pass
        until(lambda: not daemon.stats()["tiers"]["gpu"]["waiting_blocks"], "the copy")
    gpu = daemon.stats()["tiers"]["gpu"]
    assert (gpu["blocks"], gpu["evicted"]) == (5, 5)
    assert client.lookup(keys) == [TierCode.HOST] * 10
    with client.lease(keys) as lease:
        on_gpu = [block for block in lease.blocks if isinstance(block, LeasedBlock) and block.device is not None]
        assert len(on_gpu) == 5
        assert all(bytes(block.device) == payload(keys[block.index], 3 << 20) for block in on_gpu)


def test_a_client_on_another_host_is_told_of_no_gpu(start: Start) -> None:
    port = free_port()
    daemon = start(**{"listen.tcp": f"127.0.0.1:{port}", "listen.token": TOKEN})
    bring_up(daemon, daemon.client(device=OrdinaryImports()))
    far = daemon.client(address=f"tcp://127.0.0.1:{port}", token=TOKEN, device=OrdinaryImports())
    with far.lease(KEYS) as lease:
        assert all(block.device is None for block in lease.blocks)  # type: ignore[union-attr]
    raw = Raw(("127.0.0.1", port), token=TOKEN)
    lease = raw.call("lease", [far.core.scope(None)[0], KEYS[0], 30.0, False])[0]
    assert raw.call("reach", [lease, GPU]) == [b"", []]
    assert raw.refusal("open_slab", [1]) == ForeignHandle.code


# -- answers that no daemon of ours gives ------------------------------------------------------------------------------


def asked(answers: list[Any], imports: OrdinaryImports | None = None) -> tuple[DeviceMap, LeasedBlock]:
    """Ask about one leased block, and be given these answers."""
    slabs = DeviceMap(imports or OrdinaryImports())
    block = LeasedBlock(0, SMALL, TierCode.HOST, [np.zeros(SMALL, np.uint8)], None)
    flow = slabs.reach(1, [block])
    next(flow)
    try:
        for answer in answers:
            flow.throw(answer) if isinstance(answer, Exception) else flow.send(answer)
    except StopIteration:
        return slabs, block
    raise AssertionError("it wants to know more")


def test_a_daemon_of_before_is_asked_once() -> None:
    slabs, block = asked([UnknownMethod("there is no verb 'reach'.")])
    assert slabs.off
    assert block.device is None
    assert list(slabs.reach(2, [block])) == []


def test_a_lease_that_has_just_ended_is_asked_about_in_vain() -> None:
    slabs, block = asked([ForeignHandle("it has ended.")])
    assert not slabs.off
    assert block.device is None


@pytest.mark.parametrize("place", [(1, 1, 0), (-1, 1, 0), (0, 1, -1), (0, 1, 100), (0, 1, 1 << 40)])
def test_places_that_cannot_be_are_an_error(place: tuple[int, int, int]) -> None:
    reply = m.ReachReply(GPU, [m.Place(*place)])
    with pytest.raises(ProtocolError):
        asked([reply, [m.OpenSlabReply(SMALL, b"h")], np.zeros(SMALL, np.uint8)])


def test_an_error_of_the_connection_is_the_callers() -> None:
    with pytest.raises(ConnectionLost):
        asked([ConnectionLost("gone.")])
