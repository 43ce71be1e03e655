"""SGLang's own pools, factory and controller on the CPU, as the tests need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry, base
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.runtime_context import get_context, get_parallel

PAGE = 4
"""Tokens in a page."""

PAGES = 24
LAYERS = 3

LAYOUTS = [
    *(("mha", layout) for layout in ("layer_first", "page_first", "page_first_direct", "page_head", "page_unified")),
    *(("mla", layout) for layout in ("layer_first", "page_first", "page_first_direct", "page_unified")),
]
"""Every layout in which SGLang keeps pages in host memory, save those of other hardware."""

DYNAMIC = {
    "backend_name": "kvstore",
    "module_path": "kvstore_connectors.sglang",
    "class_name": "KVStoreHiCache",
    "interface_v1": 1,
    "revision": "of the tests",
    # The machine may be busy; the tests of deadlines bring their own.
    "lookup_deadline_ms": 20_000,
    "load_deadline_ms": 20_000,
    "save_deadline_ms": 20_000,
}


def device_pool(kind: str = "mha", *, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS, **shape: int) -> Any:
    """The pool that an engine computes into."""
    common: dict[str, Any] = {
        "size": PAGE * PAGES,
        "page_size": PAGE,
        "dtype": dtype,
        "layer_num": layers,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if kind == "mla":
        return MLATokenToKVPool(**common, **{"kv_lora_rank": 24, "qk_rope_head_dim": 8, **shape})
    return MHATokenToKVPool(**common, **{"head_num": 2, "head_dim": 16, **shape})


def host_pool(kind: str, layout: str, *, device: Any = None, start_layer: int = 0, **shape: Any) -> Any:
    """SGLang's host pool of a device pool, as SGLang's assembler makes it."""
    device = device or device_pool(kind, **shape)
    info = device._mla_buffer_info() if kind == "mla" else device._mha_buffer_info()
    how: dict[str, Any] = {
        "host_to_device_ratio": 1.0,
        "host_size": 0,
        "page_size": PAGE,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": PAGE * PAGES,
        "start_layer": start_layer,
        "end_layer": start_layer + device.layer_num,
    }
    # Without a budget SGLang wants 10 GB of memory to be free, whatever the pool.
    with base.host_memory_budget_scope(1 << 30):
        if kind == "mla":
            return MLATokenToKVPoolHost(info, target_layer_num=device.layer_num, **how)
        return get_mha_host_pool_cls(info)(info, **how)


def fill(pool: Any, seed: int = 0) -> None:
    """Random bytes everywhere, NaN of all kinds included."""
    raw = pool.kv_buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))


def content(pool: Any, page: int) -> bytes:
    """Bytes of a page of a host pool, found by the definition of its layout alone."""
    buffer, tokens = pool.kv_buffer, slice(page * PAGE, (page + 1) * PAGE)
    mla = isinstance(pool, MLATokenToKVPoolHost)
    if pool.layout == "layer_first":
        part = buffer[:, tokens] if mla else buffer[:, :, tokens]
    elif pool.layout == "page_first":
        part = buffer[tokens] if mla else buffer[:, tokens]
    elif mla or pool.layout == "page_unified":
        part = buffer[page]
    else:
        part = buffer[:, page]
    return part.contiguous().view(torch.uint8).numpy().tobytes()


def indices(pages: Sequence[int]) -> torch.Tensor:
    """Indices of the tokens of pages of a host pool."""
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def storage_config(extra: dict[str, Any], kind: str = "mha", **how: Any) -> HiCacheStorageConfig:
    """What SGLang tells a backend."""
    told: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": kind == "mla",
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "models/tiny",
        "extra_config": {**DYNAMIC, **extra},
    }
    return HiCacheStorageConfig(**{**told, **how})


def backend(pool: Any, extra: dict[str, Any], kind: str = "mha", **how: Any) -> Any:
    """Our backend for a host pool, made by SGLang's factory and told what SGLang's controller tells."""
    made = StorageBackendFactory.create_backend("dynamic", storage_config(extra, kind, **how), pool)
    try:
        made.register_mem_pool_host(pool)
        made.on_host_pools_registered()
    except BaseException:
        made.close()
        raise
    return made


@contextlib.contextmanager
def engine(**arguments: Any) -> Iterator[Any]:
    """SGLang's own record of what it was started with, as one rank of one."""
    rank = {"tp_rank": 0, "pp_rank": 0, "attn_dcp_rank": 0}
    arguments = {"hicache_storage_backend": "dynamic", **arguments}
    with get_context().override_server_args(**arguments) as args, get_parallel().override(**rank):
        yield args


class _Allocator:
    """The one question that the controller asks SGLang's allocator of device memory here."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def get_kvcache(self) -> Any:
        return self._pool


@contextlib.contextmanager
def controller(kind: str, layout: str, extra: dict[str, Any], **shape: Any) -> Iterator[HybridCacheController]:
    """SGLang's controller with its threads, and our backend attached by it."""
    device = device_pool(kind, **shape)
    pool = host_pool(kind, layout, device=device)
    entry = PoolEntry(PoolName.KV, pool, device, lambda layer: layer, is_primary_index_anchor=True)
    made = HybridCacheController(
        _Allocator(device),
        HostPoolGroup([entry]),
        PAGE,
        torch.distributed.group.WORLD,
        threading.Event(),
        storage_backend="dynamic",
        model_name="models/tiny",
        storage_backend_extra_config={**DYNAMIC, **extra},
        enable_storage_metrics=True,
    )
    try:
        yield made
    finally:
        made.detach_storage_backend()
