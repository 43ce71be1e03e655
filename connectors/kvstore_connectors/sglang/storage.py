"""kvstore as a storage backend of SGLang's hierarchical cache.

SGLang calls from threads of its own: one asks for the prefix of a prompt, one loads and one stores, at most 128 pages
at a time. None of these calls raises, save `clear`: what can not be had is a miss, and what can not be stored is not
there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult

from kvstore.client import KVStoreClient
from kvstore.errors import ConfigError, Unavailable
from kvstore_connectors.base import Breaker, Link, Tally, log, shielded
from kvstore_connectors.sglang.config import BackendConfig
from kvstore_connectors.sglang.identity import rank_namespace
from kvstore_connectors.sglang.pages import Bytes, HostPages
from kvstore_connectors.sglang.stats import Samples, publish
from kvstore_connectors.sglang.transfers import Transfers
from kvstore_connectors.sglang.updates import watch_weights, weights_in_use

CONNECT_S = 1.0
"""Longest wait for the daemon at start. After it SGLang starts without, and meets the daemon later."""

CLEAR_TIMEOUT_S = 30.0


class KVStoreHiCache(HiCacheStorage):
    """Pages of SGLang's host pool in kvstore.

    Parameters
    ----------
    storage_config : sglang.srt.mem_cache.hicache_storage.HiCacheStorageConfig
        Its `extra_config` holds the settings, see `BackendConfig`.
    kwargs : dict
        What SGLang's factory has besides; nothing is needed.

    Raises
    ------
    ConfigError
        At start only: for a setting that breaks its rule, and for pools that can not be stored.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        self._storage = storage_config
        self._config = config = BackendConfig.from_extra(storage_config.extra_config or {})
        self.tally = Tally()
        self._samples = Samples()
        self._breaker = Breaker("kvstore sglang", self.tally)
        self._lookup_link = self._link("lookup", config.lookup_deadline_ms / 1e3)
        self._load_link = self._link("load", min(config.load_deadline_ms / 1e3, 1.0))
        self._save_link = self._link("save", config.save_deadline_ms / 1e3)
        self._clear_link = self._link("clear", CLEAR_TIMEOUT_S)
        self._transfers: Transfers | None = None
        self._weights: tuple[str, ...] = ()

    def _link(self, purpose: str, timeout_s: float) -> Link:
        config = self._config
        return Link(
            lambda: KVStoreClient(config.address or None, timeout_s=timeout_s, name=f"sglang/{purpose}"),
            self._breaker,
            self.tally,
        )

    # -- start and end -------------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn where pages lie, and connect.

        Raises
        ------
        ConfigError
            If this pool can not be stored.
        """
        super().register_mem_pool_host(mem_pool_host)
        config = self._config
        pages = HostPages(mem_pool_host)
        watch_weights()
        self._weights = weights_in_use()
        self._transfers = Transfers(
            rank_namespace(self._storage, pages, config),
            pages,
            self.tally,
            config.load_deadline_ms / 1e3,
            config.save_deadline_ms / 1e3,
        )
        self._breaker.start(CONNECT_S)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Accept the pool that is known already and no other.

        Raises
        ------
        ConfigError
            For a pool of states, windows, indexes or drafts.
        """
        if str(host_pool_name) != PoolName.KV.value or host_pool is not self.mem_pool_host:
            self._transfers = None
            raise ConfigError(
                f"sglang: this model keeps a pool {str(host_pool_name)!r} besides its KV; kvstore supports models whose"
                " whole state is the KV of full attention or MLA.",
                "Run this model with one of SGLang's own storage backends.",
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def close(self) -> None:
        """End all connections. May be called twice."""
        self._breaker.close()
        for link in (self._lookup_link, self._load_link, self._save_link, self._clear_link):
            link.close()

    def clear(self) -> bool:
        """Forget every page of this rank, in all tiers.

        Raises
        ------
        Unavailable
            If that could not be done. SGLang takes any answer for a success, and reports an exception.
        """
        transfers = self._transfers
        if transfers is None:
            return True
        if self._clear_link.run("clear", lambda client: client.drop(namespace=transfers.namespace)) is None:
            raise Unavailable("the pages of this rank could not be cleared.")
        return True

    @shielded()
    def get_stats(self) -> Any:
        """Record of SGLang's storage metrics since the last call; counters of our own go out with it."""
        if not self._storage.enable_storage_metrics:
            return None
        publish(self.tally.drain())
        return self._samples.drain()

    # -- asking --------------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return self.batch_exists([key]) == 1

    @shielded(lambda: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Leading pages that are stored."""
        transfers = self._usable()
        return 0 if transfers is None else transfers.count(self._lookup_link, keys)

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Leading pages that are stored; none where the prefix needs other pools too."""
        if any(not _is_kv(transfer) for transfer in pool_transfers or ()):
            self.tally.add("refused_pools")
            return PoolTransferResult.empty()
        hits = self.batch_exists(keys, extra_info)
        return PoolTransferResult(hits, {PoolName.KV: hits} if hits else {}, list(range(1, hits + 1)))

    # -- in place ------------------------------------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Load pages into the host pool. Behind the first that is missing none is loaded."""
        done = self._load(keys, lambda pages: pages.pages(host_indices, len(keys)))
        return [True] * done + [False] * (len(keys) - done)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages straight from the host pool; for each, whether it is there now."""
        before = getattr(extra_info, "prefix_keys", None)
        saved = self._save(keys, lambda pages: pages.pages(host_indices, len(keys)), before)
        return saved or [False] * len(keys)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """As `batch_get_v1`, for the one pool that is supported."""
        return {one.name: self._pool(one, extra_info, self.batch_get_v1) for one in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """As `batch_set_v1`, for the one pool that is supported."""
        return {one.name: self._pool(one, extra_info, self.batch_set_v1) for one in transfers}

    def _pool(self, transfer: Any, extra_info: Any, move: Callable[..., list[bool]]) -> list[bool]:
        keys = transfer.keys or []
        if not _is_kv(transfer) or transfer.host_indices is None:
            self.tally.add("refused_pools")
            return [False] * len(keys)
        return move(keys, transfer.host_indices, extra_info)

    # -- flat pages ----------------------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Load one page into a flat tensor, or a new one; None if it is missing."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Load pages into flat tensors, or new ones; None from the first on that is missing."""
        targets: list[Any] = []

        def flat(pages: HostPages) -> list[Bytes]:
            targets.extend(target_locations or (pages.empty() for _ in keys))
            return [pages.flat(target) for target in targets]

        done = self._load(keys, flat)
        return targets[:done] + [None] * (len(keys) - done)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one page from a flat tensor."""
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages from flat tensors; whether all are there now."""
        saved = self._save(keys, lambda pages: [pages.flat(value) for value in values or ()], None)
        return len(saved) == len(keys) and all(saved)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _usable(self) -> Transfers | None:
        """What moves pages; None before there is a pool, and from when the weights were changed on."""
        if self._transfers is not None and weights_in_use() != self._weights:
            self._transfers = None
            self.tally.add("weights_changed")
            log.warning("kvstore sglang: the weights were changed at run time; off until SGLang is started again.")
        return self._transfers

    @shielded(lambda: 0)
    def _load(self, keys: Sequence[str], find: Callable[[HostPages], list[Bytes]]) -> int:
        """Load the leading pages of a prefix to where `find` says; how many."""
        begun = time.monotonic()
        transfers = self._usable()
        if transfers is None:
            return 0
        done = transfers.load(self._load_link, keys, find(transfers.pages))
        self._samples.load(done, done * transfers.pages.nbytes, time.monotonic() - begun)
        return done

    @shielded(list)
    def _save(
        self, keys: Sequence[str], find: Callable[[HostPages], list[Bytes]], before: Sequence[str] | None
    ) -> list[bool]:
        """Store pages from where `find` says; for each, whether it is there now, or nothing if none could be."""
        begun = time.monotonic()
        transfers = self._usable()
        if transfers is None:
            return []
        saved = transfers.save(self._save_link, keys, find(transfers.pages), before)
        self._samples.save(sum(saved), sum(saved) * transfers.pages.nbytes, time.monotonic() - begun)
        return saved


def _is_kv(transfer: Any) -> bool:
    return str(transfer.name) == PoolName.KV.value
