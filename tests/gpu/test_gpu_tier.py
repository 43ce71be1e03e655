"""The GPU tier on a real device: a daemon and engines in processes of their own, CUDA IPC between them.

Whatever may fail for good on a device (reading memory whose owner was killed) happens in an engine process, never in
the one that runs the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import BlockHeader, KVStoreClient, Namespace
from kvstore.client import LeasedBlock
from kvstore.errors import DeviceUnavailable, KVStoreError
from kvstore.types import TierCode
from kvstore_gpu.shared import Imports

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMESPACE = Namespace(model="gpu tier", dtype="uint8")
NBYTES = 3 * 1024 * 1024 + 4096
KEYS = [hashlib.sha256(f"gpu/{number}".encode()).digest() for number in range(12)]
RUN = "import json, sys; from kvstore import config as c, process as p; p.run(c.load(json.loads(sys.argv[1]), env={}))"


def content(key: bytes, nbytes: int = NBYTES) -> bytes:
    """What a block has to hold."""
    return hashlib.shake_128(key).digest(nbytes)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
    return value


class Daemon:
    """A daemon with memory of the first GPU."""

    def __init__(self, place: Path, **settings: str) -> None:
        self.socket = str(place / "s")
        self._log = place / "log"
        self._settings = {
            "listen.socket": self.socket,
            "host.bytes": "256MiB",
            "disk.bytes": "0",
            "disk.path": str(place / "disk"),
            "http.address": "",
            "gpu.bytes": "128MiB",
            "gpu.admission": "first",
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self.start()

    def start(self) -> None:
        self._log.touch()
        before = self.log().count("Ctrl-C")
        with self._log.open("ab") as log:
            command = [sys.executable, "-c", RUN, json.dumps(self._settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(lambda: self.process.poll() is not None or self.log().count("Ctrl-C") > before, "the daemon")
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return self._log.read_text()

    def client(self, **how: Any) -> KVStoreClient:
        return KVStoreClient(self.socket, namespace=NAMESPACE, timeout_s=20, **how)

    def gpu(self) -> dict[str, Any]:
        with self.client() as client:
            return client.stats()["tiers"]["gpu"]

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvt-") as name:
        yield Path(name)


@pytest.fixture
def daemon(place: Path) -> Iterator[Daemon]:
    made = Daemon(place)
    yield made
    if made.process.poll() is None:
        made.end()


def bring_up(daemon: Daemon, keys: list[bytes] = KEYS) -> None:
    """Store blocks, and lease them as an engine on that GPU does, until all are copied there."""
    with daemon.client(device=Imports(torch.device("cuda"))) as client:
        client.put_many([(key, content(key), BlockHeader()) for key in keys])
        copied(client, keys)


def copied(client: KVStoreClient, keys: list[bytes]) -> None:
    """Lease blocks until all are on the GPU: not all may wait for it at once."""

    def all_there() -> bool:
        with client.lease(keys) as lease:
            return all(isinstance(block, LeasedBlock) and block.device is not None for block in lease.blocks)

    until(all_there, "the copies")


def on_host(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def test_what_is_read_on_the_gpu_is_what_was_stored(daemon: Daemon) -> None:
    bring_up(daemon)
    hits = daemon.gpu()["hits"]
    with daemon.client(device=Imports(torch.device("cuda"))) as client:
        first: list[int] = []
        for _ in range(2):
            with client.lease(KEYS) as lease:
                for key, block in zip(KEYS, lease.blocks, strict=True):
                    assert isinstance(block, LeasedBlock)
                    assert block.tier is TierCode.GPU
                    assert block.device.is_cuda
                    assert block.device.data_ptr() % 16 == 0
                    assert on_host(block.device) == content(key) == bytes(block.parts[0])
                assert lease.valid()
                where = [block.device.data_ptr() for block in lease.blocks if isinstance(block, LeasedBlock)]
                assert first in ([], where), "it was copied instead of mapped"
                first = where
    gpu = daemon.gpu()
    assert gpu["leased_bytes"] == 0
    assert gpu["hits"] - hits == 2 * len(KEYS)
    assert f"of {torch.cuda.get_device_name(0)}" in daemon.log()


def test_pages_filled_from_gpu_memory_are_those_filled_from_host_memory(place: Path) -> None:
    from kvstore_connectors.vllm.device_pages import DevicePages
    from kvstore_connectors.vllm.layout import learn
    from kvstore_connectors.vllm.pages import Piece

    layers, blocks, heads, tokens, dim = 4, 64, 8, 16, 128

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache[slots // tokens, :, slots % tokens] = torch.cat([key, value], dim=-1)

    caches = [torch.zeros(blocks, tokens, heads, 2 * dim, device="cuda").bfloat16() for _ in range(layers)]
    views = [learn(cache.permute(0, 2, 1, 3), write, heads, dim, "test") for cache in caches]
    pages = DevicePages(views, 4 * tokens, tokens, tokens)
    made = Daemon(place)
    try:
        keys = KEYS[:4]
        with made.client(device=Imports(torch.device("cuda"))) as client:
            client.put_many([(key, content(key, pages.nbytes), BlockHeader()) for key in keys])
            copied(client, keys)
            with client.lease(keys) as lease:
                found = [block for block in lease.blocks if isinstance(block, LeasedBlock)]
                ids = [[16 + 4 * index + place for place in range(4)] for index in range(len(keys))]
                pages.start([Piece(b.parts, 0, i) for b, i in zip(found, ids, strict=True)], pages.mark())()
                expected = [cache.view(torch.int16).clone() for cache in caches]  # as bytes: some are no numbers
                for cache in caches:
                    cache.zero_()
                torch.cuda.synchronize()
                mixed = [
                    Piece(b.parts, 0, i, 0, b.device if n else None)
                    for n, (b, i) in enumerate(zip(found, ids, strict=True))
                ]
                assert sum(piece.device is not None for piece in mixed) == len(keys) - 1
                pages.start(mixed, pages.mark())()
        assert all(torch.equal(cache.view(torch.int16), wanted) for cache, wanted in zip(caches, expected, strict=True))
        assert any(bool(wanted.any()) for wanted in expected)
    finally:
        made.end()


def test_a_handle_that_is_none_is_an_error_and_the_device_goes_on() -> None:
    with pytest.raises(DeviceUnavailable, match="cannot be opened"):
        Imports(torch.device("cuda")).open(b"\x07" * 64, 2 << 20)
    assert torch.ones(8, device="cuda").sum().item() == 8


def test_more_memory_than_there_is_leaves_the_tier_off_and_says_so(place: Path) -> None:
    daemon = Daemon(place, gpu__bytes="1024GiB")
    try:
        assert "gpu      off: " in daemon.log()
        assert "asked for" in daemon.gpu()["breaker"]["reason"]
        with daemon.client(device=Imports(torch.device("cuda"))) as client:
            client.put(KEYS[0], content(KEYS[0]))
            with client.lease(KEYS[:1]) as lease:
                assert isinstance(lease.blocks[0], LeasedBlock)
                assert lease.blocks[0].device is None
    finally:
        daemon.end()


def test_the_tier_evicts_on_the_device_and_never_a_wrong_byte_is_read(place: Path) -> None:
    daemon = Daemon(place, gpu__bytes="32MiB")
    keys = [hashlib.sha256(f"more/{number}".encode()).digest() for number in range(24)]
    try:
        with daemon.client(device=Imports(torch.device("cuda"))) as client:
            read = 0
            client.put_many([(key, content(key), BlockHeader()) for key in keys])
            for turn in range(60):
                some = [keys[(turn * 5 + step) % len(keys)] for step in range(4)]
                with client.lease(some) as lease:
                    for key, block in zip(some, lease.blocks, strict=True):
                        assert isinstance(block, LeasedBlock)
                        if block.device is not None:
                            assert on_host(block.device) == content(key)
                            read += 1
        gpu = daemon.gpu()
        assert gpu["evicted"] > 0
        assert read > 0
        assert gpu["used"] == gpu["capacity"] == gpu["blocks_bytes"] + gpu["writing_bytes"] + gpu["free"] == 32 << 20
    finally:
        daemon.end()


# -- processes that are killed -----------------------------------------------------------------------------------------


class Engine:
    """A process that leases, maps and reads in a loop; it says what it does, a JSON object a line."""

    def __init__(self, daemon: Daemon) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), daemon.socket]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def says(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the engine ended ({self._process.wait()})"
        return json.loads(line)

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)


def test_an_engine_that_is_killed_while_it_reads_costs_nobody_anything(daemon: Daemon) -> None:
    bring_up(daemon)
    engine = Engine(daemon)
    assert engine.says() == {"read": len(KEYS), "right": True}
    assert daemon.gpu()["leased_bytes"] > 0
    engine.go_on()  # from now on it reads without end
    time.sleep(0.5)
    engine.kill()
    until(lambda: daemon.gpu()["leased_bytes"] == 0, "the copies to be given back")
    more = [hashlib.sha256(f"after/{number}".encode()).digest() for number in range(8)]
    with daemon.client(device=Imports(torch.device("cuda"))) as client:
        client.put_many([(key, content(key), BlockHeader()) for key in more])
        copied(client, more)
        with client.lease([*KEYS, *more]) as lease:
            for key, block in zip([*KEYS, *more], lease.blocks, strict=True):
                assert isinstance(block, LeasedBlock)
                assert on_host(block.device) == content(key)
    assert daemon.gpu()["breaker"]["state"] == "closed"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_ends_while_an_engine_reads_leaves_the_engine_alive(daemon: Daemon, how: int) -> None:
    bring_up(daemon)
    engine = Engine(daemon)
    try:
        assert engine.says() == {"read": len(KEYS), "right": True}
        engine.go_on()
        time.sleep(0.5)
        daemon.end(how)
        after = engine.says()
        assert after["valid"] is False
        assert after["device"] == "works", after
        print(f"memory of a daemon that ended by signal {how}: {after['memory']}")
        daemon.start()
        bring_up(daemon)
        engine.go_on()
        assert engine.says() == {"again": len(KEYS), "right": True}
    finally:
        engine.kill()


def test_what_the_daemon_had_is_free_when_it_and_its_engines_are_gone(place: Path) -> None:
    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    before = free()
    daemon = Daemon(place, gpu__bytes="1GiB")
    assert before - free() >= 1 << 30
    print(f"a daemon with 1 GiB takes {before - free() >> 20} MiB of the device")
    bring_up(daemon)
    engine = Engine(daemon)
    engine.says()
    daemon.end()
    engine.kill()
    until(lambda: before - free() < 64 << 20, "the memory")


def main(address: str) -> None:
    """The engine: what `Engine` starts."""

    def say(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    client = KVStoreClient(address, namespace=NAMESPACE, timeout_s=20, device=Imports(torch.device("cuda")))

    def read(lease: Any) -> bool:
        found = [block.device for block in lease.blocks if isinstance(block, LeasedBlock)]
        return all(near is not None and on_host(near) == content(key) for key, near in zip(KEYS, found, strict=True))

    lease = client.lease(KEYS, ttl_s=300)
    say(read=len(lease.blocks), right=read(lease))
    sys.stdin.readline()
    sink = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
    while lease.valid():
        for block in lease.blocks:
            sink.bitwise_xor_(block.device)  # type: ignore[union-attr]
        torch.cuda.synchronize()
    memory = "readable"
    try:  # what was mapped stays mapped: reading on must not end the context
        for _ in range(100):
            for block in lease.blocks:
                sink.bitwise_xor_(block.device)  # type: ignore[union-attr]
        torch.cuda.synchronize()
        memory += ", unchanged" if read(lease) else ", changed"
    except RuntimeError as error:
        memory = f"faults: {error}"
    del block
    try:
        works = torch.ones(1024, device="cuda").sum().item() == 1024
    except RuntimeError as error:
        works = False
        memory += f"; {error}"
    say(valid=lease.valid(), memory=memory, device="works" if works else "failed")
    sys.stdin.readline()
    lease.release()
    try:
        with client.lease(KEYS) as lease:
            say(again=len(lease.blocks), right=read(lease))
    except KVStoreError as error:
        say(again=0, right=False, error=str(error))
    time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)
