"""SGLang's own controller, with its own threads, attaches the backend, backs pages up and prefetches them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import Daemon
from pools import LAYOUTS, PAGE, content, controller, engine, fill
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.radix_cache import RadixKey
from test_contract import FLAT_LAYOUTS

from kvstore.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank of one, as far as SGLang can tell."""
    meeting = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    with engine(model_path="models/tiny"):
        yield
    torch.distributed.destroy_process_group()


def prompt(pages: int) -> RadixKey:
    """Tokens nobody asked for before."""
    return RadixKey(torch.randint(0, 32000, (pages * PAGE,), generator=_random).tolist(), None)


_random = torch.Generator().manual_seed(os.getpid())


def back_up(engine_of: Any, tokens: RadixKey, pages: int) -> tuple[list[int], int]:
    """Let SGLang store pages of its host pool; which, and how many tokens it believes to be stored."""
    places = engine_of.storage_host_pool.alloc(pages * PAGE)
    engine_of.write_storage(places, tokens, engine_of.get_hash_str(tokens, None, page_size=PAGE), [])
    done = engine_of.ack_backup_queue.get(timeout=10)
    return (places[::PAGE] // PAGE).tolist(), done.completed_tokens


def prefetch(engine_of: Any, tokens: RadixKey) -> tuple[list[int], int]:
    """Let SGLang look for a prompt and load what it finds, as its scheduler does; where to, and how many tokens."""
    operation = engine_of.prefetch(CacheRequestHandle("request", 0), tokens)
    found = engine_of.prefetch_hit_queue.get(timeout=10)
    if not found.storage_hit_count:
        return [], 0
    operation.host_indices = engine_of.storage_host_pool.alloc(found.storage_hit_count)
    engine_of.prefetch_buffer.put(operation)
    completed, deadline = 0, time.monotonic() + 10
    while time.monotonic() < deadline:
        ack = engine_of.ack_prefetch_queue.get(timeout=10)
        if ack.completed_req:
            break
        completed = ack.completed_tokens
    return (operation.host_indices[::PAGE] // PAGE).tolist(), completed


@pytest.mark.parametrize("interface", [0, 1], ids=["generic", "v1"])
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_prompt_goes_out_and_comes_back(daemon: Daemon, kind: str, layout: str, interface: int) -> None:
    """Through the controller of one engine and into the pool of another."""
    if not interface and layout not in FLAT_LAYOUTS:
        pytest.skip("SGLang makes no flat pages of this layout")
    extra = {"address": daemon.address, "interface_v1": interface}
    tokens = prompt(6)
    with controller(kind, layout, extra) as writer, controller(kind, layout, extra) as reader:
        fill(writer.storage_host_pool, 1)
        fill(reader.storage_host_pool, 2)
        assert prefetch(reader, tokens) == ([], 0)
        stored, told = back_up(writer, tokens, 6)
        assert told == 6 * PAGE
        loaded, told = prefetch(reader, tokens)
        assert told == 6 * PAGE
        assert [content(reader.storage_host_pool, page) for page in loaded] == [
            content(writer.storage_host_pool, page) for page in stored
        ]


def test_controller_lives_through_an_outage(tmp_path: Path) -> None:
    """Its threads answer every request while the daemon is dead, and use it again afterwards."""
    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        with controller("mha", "page_first", {"address": daemon.address}) as ours:
            fill(ours.storage_host_pool, 3)
            tokens = prompt(2)
            assert back_up(ours, tokens, 2)[1] == 2 * PAGE
            daemon.kill()
            assert prefetch(ours, tokens) == ([], 0)
            assert back_up(ours, prompt(2), 2)[1] == 0
            assert prefetch(ours, prompt(1)) == ([], 0)
            daemon.start()
            deadline = time.monotonic() + 15
            while not (again := back_up(ours, tokens := prompt(1), 1))[1]:
                ours.storage_host_pool.clear()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            loaded, told = prefetch(ours, tokens)
            assert told == PAGE
            assert content(ours.storage_host_pool, loaded[0]) == content(ours.storage_host_pool, again[0][0])
            assert all(
                thread.is_alive() for thread in (ours.prefetch_thread, ours.prefetch_io_aux_thread, ours.backup_thread)
            )
    finally:
        daemon.stop()


def test_refusal_reaches_the_user_and_leaves_no_thread(daemon: Daemon) -> None:
    """A setting that is wrong ends SGLang's start with our words."""
    with pytest.raises(ConfigError, match="Did you mean 'tenant'"), controller("mha", "page_first", {"tennant": "x"}):
        pass


def test_detached_and_attached_again(daemon: Daemon) -> None:
    """As SGLang's HTTP interface does it, without a restart."""
    from pools import DYNAMIC

    extra = {**DYNAMIC, "address": daemon.address}
    with controller("mha", "page_first", extra) as ours:
        fill(ours.storage_host_pool, 4)
        tokens = prompt(3)
        stored, _ = back_up(ours, tokens, 3)
        ours.detach_storage_backend()
        ours.attach_storage_backend(
            "dynamic",
            model_name="models/tiny",
            storage_backend_extra_config=dict(extra),
            host_pools=ours.mem_pool_host.entries,
        )
        loaded, told = prefetch(ours, tokens)
        assert told == 3 * PAGE
        assert [content(ours.storage_host_pool, page) for page in loaded] == [
            content(ours.storage_host_pool, page) for page in stored
        ]
