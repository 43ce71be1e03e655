"""A daemon that is away, dead, hung or restarted costs SGLang its hits and nothing else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import Daemon
from pools import content, fill, host_pool, indices
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from test_contract import hashes

from kvstore.errors import KVStoreError

Make = Callable[..., Any]

PROMPT_S = 4.0
"""No call may take longer than its deadline, which is far below this; the machine may be busy."""

DEADLINES = {"lookup_deadline_ms": 200, "load_deadline_ms": 400, "save_deadline_ms": 300}


def assert_all_is_a_miss(backend: Any, pool: Any, keys: list[str]) -> None:
    """Every call of SGLang's is answered, soon, with nothing, and no page is touched."""
    before = pool.kv_buffer.view(torch.uint8).clone()
    page = pool.get_data_page(0)
    some = indices(range(len(keys)))
    transfer = PoolTransfer(name=PoolName.KV, keys=keys, host_indices=some)
    none = [False] * len(keys)
    calls: list[tuple[Callable[[], Any], Any]] = [
        (lambda: backend.batch_exists(keys), 0),
        (lambda: backend.exists(keys[0]), False),
        (lambda: backend.batch_exists_v2(keys).kv_hit_pages, 0),
        (lambda: backend.batch_get_v1(keys, some), none),
        (lambda: backend.batch_set_v1(keys, some), none),
        (lambda: backend.batch_get_v2([transfer]), {PoolName.KV: none}),
        (lambda: backend.batch_set_v2([transfer]), {PoolName.KV: none}),
        (lambda: backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys]), [None] * len(keys)),
        (lambda: backend.batch_set(keys, [page] * len(keys)), False),
        (lambda: backend.get(keys[0]), None),
        (lambda: backend.set(keys[0], page), False),
    ]
    for call, answer in calls:
        begun = time.monotonic()
        assert call() == answer
        assert time.monotonic() - begun < PROMPT_S
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before)
    backend.get_stats()


def meets_again(backend: Any, keys: list[str], pages: list[int], wait_s: float = 15.0) -> None:
    """Wait until pages can be stored again."""
    deadline = time.monotonic() + wait_s
    while not all(backend.batch_set_v1(keys, indices(pages))):
        assert time.monotonic() < deadline, "the daemon was not met again"
        time.sleep(0.05)


def test_daemon_that_comes_later(tmp_path: Path, make: Make) -> None:
    """SGLang starts without a daemon, and uses it from when it is there."""
    daemon = Daemon(tmp_path)
    pool = host_pool("mha", "page_first")
    fill(pool)
    begun = time.monotonic()
    backend = make(pool, {"address": daemon.address, **DEADLINES})
    assert time.monotonic() - begun < 10
    keys = hashes(3)
    assert_all_is_a_miss(backend, pool, keys)
    with pytest.raises(KVStoreError):
        backend.clear()
    daemon.start()
    try:
        meets_again(backend, keys, [0, 1, 2])
        assert backend.batch_get_v1(keys, indices([3, 4, 5])) == [True] * 3
        assert content(pool, 5) == content(pool, 2)
    finally:
        daemon.stop()


@pytest.mark.parametrize("disk", [False, True])
def test_killed_and_restarted(tmp_path: Path, make: Make, disk: bool) -> None:
    """kill -9: misses until it is back. What was in its memory only is a miss; what is on disk is right."""
    daemon = Daemon(tmp_path, disk=disk)
    daemon.start()
    try:
        pool = host_pool("mha", "layer_first")
        fill(pool, 1)
        backend = make(pool, {"address": daemon.address, **DEADLINES})
        keys = hashes(3)
        assert all(backend.batch_set_v1(keys, indices([0, 1, 2])))
        if disk:
            wait_until_written(daemon)
        daemon.kill()
        assert_all_is_a_miss(backend, pool, keys)
        daemon.start()
        meets_again(backend, hashes(1), [3])
        found = backend.batch_exists(keys)
        assert found == (3 if disk else 0)
        loaded = backend.batch_get_v1(keys, indices([6, 7, 8]))
        assert loaded == [disk] * 3
        if disk:
            assert [content(pool, page) for page in (6, 7, 8)] == [content(pool, page) for page in (0, 1, 2)]
    finally:
        daemon.stop()


def wait_until_written(daemon: Daemon) -> None:
    """Wait until nothing in host memory is not on disk as well."""
    deadline = time.monotonic() + 10
    with daemon.client() as client:
        while client.stats()["tiers"]["disk"]["blocks"] < 3:
            assert time.monotonic() < deadline, client.stats()["tiers"]
            time.sleep(0.05)


def test_hung(tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that does not answer costs one deadline, then nothing; afterwards all is as before."""
    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        pool = host_pool("mha", "page_first_direct")
        fill(pool, 2)
        backend = make(pool, {"address": daemon.address, **DEADLINES})
        keys = hashes(2)
        assert all(backend.batch_set_v1(keys, indices([0, 1])))
        daemon.send(signal.SIGSTOP)
        assert_all_is_a_miss(backend, pool, keys)
        begun = time.monotonic()
        for _ in range(100):
            assert backend.batch_exists(keys) == 0
        assert time.monotonic() - begun < 2
        assert sum("continuing without" in record.message for record in caplog.records) == 1
        daemon.send(signal.SIGCONT)
        meets_again(backend, hashes(1), [5])
        assert backend.batch_get_v1(keys, indices([7, 8])) == [True, True]
        assert [content(pool, 7), content(pool, 8)] == [content(pool, 0), content(pool, 1)]
    finally:
        daemon.stop()


@pytest.mark.parametrize("operation", ["lookup", "load", "save"])
def test_dies_in_the_middle_of_a_call(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Killed between a call's question and its end: a page that could not be vouched for is not told as loaded."""
    from kvstore_connectors.sglang import transfers

    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        pool = host_pool("mha", "page_first")
        fill(pool, 3)
        backend = make(pool, {"address": daemon.address, **DEADLINES})
        keys = hashes(3)
        assert all(backend.batch_set_v1(keys, indices([0, 1, 2])))

        def dying(copy: Callable[..., Any]) -> Callable[..., Any]:
            def then(*args: Any) -> Any:
                daemon.kill()
                return copy(*args)

            return then

        monkeypatch.setattr(transfers, "copy_in", dying(transfers.copy_in))
        monkeypatch.setattr(transfers, "copy_out", dying(transfers.copy_out))
        if operation == "load":
            assert backend.batch_get_v1(keys, indices([4, 5, 6])) == [False] * 3
        elif operation == "save":
            assert backend.batch_set_v1(hashes(2), indices([0, 1])) == [False] * 2
        else:
            daemon.kill()
            assert backend.batch_exists(keys) == 0
        assert_all_is_a_miss(backend, pool, keys)
    finally:
        daemon.stop()


def test_another_size_under_our_key_is_refused(daemon: Daemon, make: Make) -> None:
    """A block that is not of the size of a page never gets into the host pool, whoever stored it."""
    from kvstore.keys import derived_key, namespace_digest
    from kvstore.types import BlockHeader

    pool = host_pool("mha", "page_first")
    fill(pool, 4)
    backend = make(pool, {"address": daemon.address})
    keys = hashes(1)
    namespace = backend._transfers.namespace
    with daemon.client() as client:
        key = derived_key(namespace_digest(namespace), keys[0].encode())
        client.put(key, b"x" * (backend._transfers.pages.nbytes - 1), BlockHeader(), namespace=namespace)
    before = pool.kv_buffer.view(torch.uint8).clone()
    assert backend.batch_exists(keys) == 1
    assert backend.batch_get_v1(keys, indices([3])) == [False]
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before)
    assert backend.tally.peek()["load_wrong_size"] == 1


def test_full_daemon_refuses_and_the_rest_goes_on(tmp_path: Path, make: Make) -> None:
    """Pages there is no room for are told as not stored; what is found afterwards is right."""
    daemon = Daemon(tmp_path, host_bytes="64MiB")
    daemon.start()
    try:
        pool = host_pool("mha", "page_first", head_num=64, head_dim=128)
        fill(pool, 5)
        backend = make(pool, {"address": daemon.address})
        stored: list[tuple[str, int]] = []
        for _ in range(30):
            keys = hashes(16)
            for key, page, done in zip(keys, range(16), backend.batch_set_v1(keys, indices(range(16))), strict=True):
                stored += [(key, page)] if done else []
        found = [(key, page) for key, page in stored if backend.exists(key)]
        assert 0 < len(found) < len(stored)
        for key, page in found[:8]:
            if backend.batch_get_v1([key], indices([20])) == [True]:
                assert content(pool, 20) == content(pool, page)
    finally:
        daemon.stop()


def test_closed_backend_answers_with_misses(daemon: Daemon, make: Make) -> None:
    """SGLang's threads may still call while it is being detached."""
    pool = host_pool("mha", "page_first")
    backend = make(pool, {"address": daemon.address})
    backend.close()
    backend.close()
    assert_all_is_a_miss(backend, pool, hashes(2))
