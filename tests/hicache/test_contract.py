"""What is stored is what is loaded, for every layout of SGLang's host pool and by each of its interfaces."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import Daemon
from pools import LAYOUTS, PAGE, content, fill, host_pool, indices
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolName, PoolTransfer

STORED = [3, 11, 0, 7, 20]
LOADED = [5, 1, 19, 2, 8]
UNTOUCHED = 13

Make = Callable[..., Any]


def hashes(count: int) -> list[str]:
    """Page hashes as SGLang makes them, new at every call."""
    return [uuid.uuid4().hex * 2 for _ in range(count)]


def kv(keys: list[str], pages: list[int]) -> PoolTransfer:
    """Pages of the pool that every model has."""
    return PoolTransfer(name=PoolName.KV, keys=keys, host_indices=indices(pages))


class InPlace:
    """``batch_*_v1``: SGLang names the pages of its pool."""

    @staticmethod
    def save(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        return backend.batch_set_v1(keys, indices(pages), HiCacheStorageExtraInfo(prefix_keys=[]))

    @staticmethod
    def load(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        return backend.batch_get_v1(keys, indices(pages), HiCacheStorageExtraInfo())


class ByPool:
    """``batch_*_v2``: as v1, by pools."""

    @staticmethod
    def save(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        return backend.batch_set_v2([kv(keys, pages)])[PoolName.KV]

    @staticmethod
    def load(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        return backend.batch_get_v2([kv(keys, pages)])[PoolName.KV]


class Flat:
    """``batch_get`` and ``batch_set``: SGLang copies pages to flat tensors and back itself."""

    @staticmethod
    def save(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        data = [pool.get_data_page(page * PAGE) for page in pages]
        return [backend.batch_set(keys, data)] * len(keys)

    @staticmethod
    def load(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        targets = [pool.get_dummy_flat_data_page() for _ in keys]
        found = backend.batch_get(keys, targets)
        for page, data in zip(pages, found, strict=True):
            if data is not None:
                pool.set_from_flat_data_page(page * PAGE, data)
        return [data is not None for data in found]


class Single:
    """``get`` and ``set``, one page a call, into tensors of our own making."""

    @staticmethod
    def save(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        return [backend.set(key, pool.get_data_page(page * PAGE)) for key, page in zip(keys, pages, strict=True)]

    @staticmethod
    def load(backend: Any, pool: Any, keys: list[str], pages: list[int]) -> list[bool]:
        found = [backend.get(key) for key in keys]
        for page, data in zip(pages, found, strict=True):
            if data is not None:
                pool.set_from_flat_data_page(page * PAGE, data)
        return [data is not None for data in found]


INTERFACES = [InPlace, ByPool, Flat, Single]
FLAT_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
"""SGLang makes flat pages of these only."""


def cases() -> list[Any]:
    """Every layout with every interface that SGLang has for it."""
    return [
        pytest.param(kind, layout, interface, id=f"{kind}-{layout}-{interface.__name__}")
        for kind, layout in LAYOUTS
        for interface in INTERFACES
        if interface in (InPlace, ByPool) or layout in FLAT_LAYOUTS
    ]


@pytest.mark.parametrize(("kind", "layout", "interface"), cases())
def test_pages_come_back_as_they_were(daemon: Daemon, make: Make, kind: str, layout: str, interface: Any) -> None:
    """Byte for byte, into other places of another engine's pool, and nothing else of that pool changes."""
    source, target = host_pool(kind, layout), host_pool(kind, layout)
    fill(source, 1)
    fill(target, 2)
    writer = make(source, {"address": daemon.address}, kind)
    reader = make(target, {"address": daemon.address}, kind)
    keys, before = hashes(len(STORED)), target.kv_buffer.view(torch.uint8).clone()

    assert reader.batch_exists(keys) == 0
    assert interface.load(reader, target, keys, LOADED) == [False] * 5
    assert torch.equal(target.kv_buffer.view(torch.uint8), before)

    assert interface.save(writer, source, keys, STORED) == [True] * 5
    assert reader.batch_exists(keys) == 5
    assert reader.exists(keys[4])
    assert interface.load(reader, target, keys, LOADED) == [True] * 5
    for stored, loaded in zip(STORED, LOADED, strict=True):
        assert content(target, loaded) == content(source, stored)
    after = host_pool(kind, layout)
    after.kv_buffer.view(torch.uint8).copy_(before)
    for page in set(range(source.page_num)) - set(LOADED):
        assert content(target, page) == content(after, page)


@pytest.mark.parametrize(("kind", "layout"), [("mha", "layer_first"), ("mha", "page_first"), ("mla", "page_first")])
def test_interfaces_store_the_same_bytes(daemon: Daemon, make: Make, kind: str, layout: str) -> None:
    """What one interface stored, every other loads."""
    source, target = host_pool(kind, layout), host_pool(kind, layout)
    fill(source, 3)
    backend = make(source, {"address": daemon.address}, kind)
    reader = make(target, {"address": daemon.address}, kind)
    for save in INTERFACES:
        keys = hashes(2)
        assert save.save(backend, source, keys, [1, 2]) == [True, True]
        for load in INTERFACES:
            fill(target, 4)
            assert load.load(reader, target, keys, [8, 6]) == [True, True]
            assert [content(target, 8), content(target, 6)] == [content(source, 1), content(source, 2)]


def test_prefix_ends_at_the_first_hole(daemon: Daemon, make: Make) -> None:
    """Pages behind one that is missing are neither counted nor loaded."""
    pool = host_pool("mha", "page_first")
    fill(pool)
    backend = make(pool, {"address": daemon.address})
    keys = hashes(5)
    assert all(backend.batch_set_v1([keys[i] for i in (0, 1, 3, 4)], indices([0, 1, 3, 4])))
    behind = content(pool, 8)

    assert backend.batch_exists(keys) == 2
    assert not backend.exists(keys[2])
    assert backend.exists(keys[3])
    assert backend.batch_get_v1(keys, indices([5, 6, 7, 8, 9])) == [True, True, False, False, False]
    assert content(pool, 8) == behind
    found = backend.batch_exists_v2(keys, [])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (2, [1, 2])


def test_many_pages_in_one_call(daemon: Daemon, make: Make) -> None:
    """A whole batch of SGLang's, which is more than is leased at a time."""
    pool = host_pool("mha", "layer_first")
    fill(pool, 5)
    backend = make(pool, {"address": daemon.address})
    keys = hashes(128)
    pages = [number % (pool.page_num // 2) for number in range(128)]
    assert all(backend.batch_set_v1(keys, indices(pages)))
    half = pool.page_num // 2
    for first in range(0, 128, half):
        some = keys[first : first + half]
        fresh = list(range(half, half + len(some)))
        assert all(backend.batch_get_v1(some, indices(fresh)))
        for page, number in zip(fresh, range(first, 128), strict=False):
            assert content(pool, page) == content(pool, pages[number])


def test_a_prompt_of_more_pages_than_a_question_holds(
    daemon: Daemon, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang asks for all pages of a prompt at once; they are counted over several questions."""
    from kvstore_connectors.sglang import transfers

    pool = host_pool("mha", "page_first")
    backend = make(pool, {"address": daemon.address})
    keys = hashes(20)
    assert backend.batch_exists(hashes(20_000)) == 0
    assert all(backend.batch_set_v1(keys[:18], indices(range(18))))
    for size in (1, 5, 6, 9, 18, 19, 20, 21):
        monkeypatch.setattr(transfers, "LOOKUP_PAGES", size)
        assert backend.batch_exists(keys) == 18
        assert backend.batch_exists(keys[:18]) == 18
    assert backend.batch_exists([]) == 0
    assert backend.tally.peek()["lookups"] > 20_000
    assert "failed_lookup" not in backend.tally.peek()


def test_storing_again_is_a_success(daemon: Daemon, make: Make) -> None:
    """A page that is there already counts as stored, and the first bytes stay."""
    pool = host_pool("mha", "page_first_direct")
    fill(pool, 6)
    backend = make(pool, {"address": daemon.address})
    keys = hashes(1)
    assert backend.batch_set_v1(keys, indices([0])) == [True]
    assert backend.batch_set_v1(keys, indices([1])) == [True]
    assert backend.batch_get_v1(keys, indices([2])) == [True]
    assert content(pool, 2) == content(pool, 0)


def test_clear_forgets_the_pages_of_this_rank_only(daemon: Daemon, make: Make) -> None:
    """After clear nothing is found; another rank's pages stay."""
    pool = host_pool("mha", "page_first")
    one = make(pool, {"address": daemon.address}, tp_size=2, tp_rank=0)
    other = make(pool, {"address": daemon.address}, tp_size=2, tp_rank=1)
    keys = hashes(2)
    assert all(one.batch_set_v1(keys, indices([0, 1])))
    assert all(other.batch_set_v1(keys, indices([0, 1])))
    one.clear()
    assert (one.batch_exists(keys), other.batch_exists(keys)) == (0, 2)


def test_calls_that_name_no_pages_of_this_pool_move_nothing(daemon: Daemon, make: Make) -> None:
    """Indices that are not whole pages, and tensors that are not a page, are misses and no exceptions."""
    pool = host_pool("mha", "page_first")
    fill(pool, 7)
    backend = make(pool, {"address": daemon.address})
    keys = hashes(2)
    before = pool.kv_buffer.view(torch.uint8).clone()
    for wrong in (
        indices([0]),
        indices([0, 1]) + 1,
        indices([0, pool.page_num]),
        -indices([1, 2]),
        torch.arange(0, 2 * PAGE * 2, 2),
        torch.cat([indices([0, 1])[:-1], torch.tensor([0])]),
    ):
        assert backend.batch_set_v1(keys, wrong) == [False, False]
    assert backend.batch_exists(keys) == 0
    assert all(backend.batch_set_v1(keys, indices([0, 1])))
    assert backend.batch_get_v1(keys, indices([2])) == [False, False]
    page = pool.get_data_page(0)
    for tensor in (page[:-1], page.float(), page.view(torch.uint8), page.repeat(2)[::2], "page", None):
        assert not backend.batch_set(hashes(1), [tensor])
        assert tensor is None or backend.get(keys[0], tensor) is None
    assert not backend.batch_set(hashes(2), [page])
    assert torch.equal(pool.kv_buffer.view(torch.uint8), before)


def test_metrics_are_sglangs_own(daemon: Daemon, make: Make) -> None:
    """What was moved is told as SGLang's storage metrics, and our counters are on the same page."""
    from prometheus_client import REGISTRY

    pool = host_pool("mha", "page_first")
    backend = make(pool, {"address": daemon.address})
    keys = hashes(3)
    before = REGISTRY.get_sample_value("sglang:kvstore_saved_pages_total") or 0
    backend.batch_set_v1(keys, indices([0, 1, 2]))
    backend.batch_get_v1(keys, indices([3, 4, 5]))
    told = backend.get_stats()
    assert (told.backup_pgs, told.prefetch_pgs) == ([3], [3])
    assert all(speed > 0 for speed in told.backup_bandwidth + told.prefetch_bandwidth)
    assert REGISTRY.get_sample_value("sglang:kvstore_saved_pages_total") == before + 3
    assert backend.get_stats().backup_pgs == []


def test_pages_outlive_the_engine_and_the_daemon(own_daemon: Daemon, make: Make) -> None:
    """Stored by one backend, loaded by another after the daemon started again from its disk."""
    source, target = host_pool("mla", "page_first"), host_pool("mla", "page_first")
    fill(source, 8)
    keys = hashes(4)
    writer = make(source, {"address": own_daemon.address}, "mla")
    assert all(writer.batch_set_v1(keys, indices([0, 1, 2, 3])))
    writer.close()
    own_daemon.stop()
    own_daemon.start()
    reader = make(target, {"address": own_daemon.address}, "mla")
    assert reader.batch_exists(keys) == 4
    assert all(reader.batch_get_v1(keys, indices([9, 8, 7, 6])))
    assert [content(target, 9 - i) for i in range(4)] == [content(source, i) for i in range(4)]


def test_pages_are_linked_where_sglang_tells_what_came_before(daemon: Daemon, make: Make) -> None:
    """With ``hicache_storage_pass_prefix_keys`` each page names the one before it and stands where it stood."""
    from kvstore.keys import derived_key, namespace_digest

    pool = host_pool("mha", "page_first")
    backend = make(pool, {"address": daemon.address})
    before, keys = hashes(3), hashes(2)
    assert all(backend.batch_set_v1(keys, indices([0, 1]), HiCacheStorageExtraInfo(prefix_keys=before)))
    namespace = backend._transfers.namespace
    names = [derived_key(namespace_digest(namespace), one.encode()) for one in (before[-1], *keys)]
    with daemon.client() as client, client.lease(names[1:], namespace=namespace, headers=True) as lease:
        headers = [block.header for block in lease.blocks]
    assert [header.parent for header in headers] == names[:2]
    assert [header.position for header in headers] == [3 * PAGE, 4 * PAGE]


def test_threads_of_sglang_at_once(daemon: Daemon, make: Make) -> None:
    """One thread stores, one asks, one loads, as in SGLang; what is loaded is what was stored, always."""
    pool = host_pool("mha", "page_first")
    fill(pool, 9)
    backend = make(pool, {"address": daemon.address})
    keys, half = hashes(400), pool.page_num // 2
    stored: dict[str, int] = {}
    wrong: list[str] = []
    counted: list[int] = []

    def store() -> None:
        for number, key in enumerate(keys):
            if backend.batch_set_v1([key], indices([number % half])) == [True]:
                stored[key] = number % half

    def ask() -> None:
        while writer.is_alive():
            counted.append(backend.batch_exists(keys))

    def load() -> None:
        while writer.is_alive() or not loaded:
            for key, page in list(stored.items())[-5:]:
                if backend.batch_get_v1([key], indices([half])) == [True]:
                    loaded.append(key)
                    if content(pool, half) != content(pool, page):
                        wrong.append(key)

    loaded: list[str] = []
    writer = threading.Thread(target=store)
    others = [threading.Thread(target=work) for work in (ask, load)]
    for thread in (writer, *others):
        thread.start()
    for thread in (writer, *others):
        thread.join(60)
    assert len(stored) == 400
    assert loaded
    assert not wrong
    assert counted == sorted(counted)
    assert not [name for name in backend.tally.peek() if name.startswith(("failed", "skipped"))]
