"""The class that vLLM makes: one for its scheduler, one in each worker. It only hands calls on.

Every hook is shielded: whatever fails in here, the engine goes on and computes for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvstore.types import TierCode
from kvstore_connectors.base import Breaker, Link, Tally, log, report_defect, shielded
from kvstore_connectors.vllm.blend_gate import Gate
from kvstore_connectors.vllm.blend_scheduler import Blends, default_wish
from kvstore_connectors.vllm.blend_search import Searches
from kvstore_connectors.vllm.blend_wish import NAME
from kvstore_connectors.vllm.config import ConnectorConfig, block_tokens_for
from kvstore_connectors.vllm.decisions import Decisions
from kvstore_connectors.vllm.jobs import ConnectorMeta, Handshake, Report
from kvstore_connectors.vllm.lookups import Lookups
from kvstore_connectors.vllm.scheduler import SchedulerSide
from kvstore_connectors.vllm.stats import KVStorePromMetrics, KVStoreStats
from kvstore_connectors.vllm.support import check_address, check_supported, fix_hash_seed, recompute_on_failure
from kvstore_connectors.vllm.worker import START_WAIT_S, WorkerSide

if TYPE_CHECKING:
    import torch

LOOKUP_TIMEOUT_S = 0.2
"""After this time the daemon counts as gone; the scheduler has stopped waiting long before."""


def open_client(config: ConnectorConfig, purpose: str, timeout_s: float, device: Any = None) -> Any:
    """A client for one thread; it connects later. With a device it reads there what the daemon has there."""
    from kvstore.client import KVStoreClient

    return KVStoreClient(
        config.address or None, token=config.token or None, timeout_s=timeout_s, name=f"vllm/{purpose}", device=device
    )


class KVStoreConnector(KVConnectorBase_V1):
    """Reuse of prefixes that kvstore holds.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
    role : KVConnectorRole
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig

    Raises
    ------
    ConfigError
        At start only: for a setting that breaks its rule, and for models whose KV can not be stored.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = ConnectorConfig.from_extra(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        check_address(config.address)
        spec = check_supported(vllm_config, kv_cache_config)
        block_tokens = block_tokens_for(config, spec.block_size)
        self._meta: ConnectorMeta | None = None
        self._block_pool: Any = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(config, spec.block_size, block_tokens)
        else:
            self._worker = WorkerSide(
                vllm_config,
                spec,
                kv_cache_config.num_blocks,
                block_tokens,
                lambda purpose, timeout_s, device=None: open_client(config, purpose, timeout_s, device),
                config,
            )

    def _start_scheduler(self, config: ConnectorConfig, engine_block: int, block_tokens: int) -> None:
        transfer = self._vllm_config.kv_transfer_config
        fix_hash_seed()
        recompute_on_failure(transfer)
        self._tally = Tally()
        self._breaker = Breaker("kvstore scheduler", self._tally)
        self._link = Link(lambda: open_client(config, "lookup", LOOKUP_TIMEOUT_S), self._breaker, self._tally)
        self._lookups = Lookups(self._link, self._tally, config.lookup_deadline_ms / 1e3)
        chunk = self._vllm_config.scheduler_config.max_num_batched_tokens
        decisions = Decisions(self._tally, block_tokens, chunk, always=config.load == "always")
        self._blends = self._make_blends(config, engine_block, block_tokens, decisions)
        self._scheduler = SchedulerSide(
            self._lookups,
            self._tally,
            engine_block,
            block_tokens,
            decisions,
            async_load=config.async_load,
            may_load=transfer.is_kv_consumer,
            may_save=transfer.is_kv_producer,
            blends=self._blends,
        )
        self._breaker.start(START_WAIT_S)

    def _make_blends(
        self, config: ConnectorConfig, engine_block: int, block_tokens: int, decisions: Decisions
    ) -> Blends:
        link = Link(lambda: open_client(config, "search", LOOKUP_TIMEOUT_S), self._breaker, self._tally)
        searches = Searches(link, self._tally, config.lookup_deadline_ms / 1e3)
        default = default_wish(
            config.blend_share,
            config.blend_selector,
            config.blend_separator,
            config.blend_amount,
            blend=config.blend,
            capture=config.capture,
        )
        gate = Gate(config.blend_gate) if config.blend_gate else None
        return Blends(searches, self._tally, engine_block, block_tokens, default, gate, decisions.blend_pays)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may drop saves: nobody waits for them."""
        return False

    # -- scheduler -----------------------------------------------------------------------------------------------------

    @shielded()
    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The ranks' namespaces, from a vLLM that knows tensor ranks only."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): data for rank, data in metadata.items()})

    @shielded()
    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """The ranks' namespaces."""
        if self._scheduler is None:
            return
        parallel = self._vllm_config.parallel_config
        expected = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        hands = [data for _, data in sorted(metadata.items()) if isinstance(data, Handshake)]
        ranks = [hand.namespace for hand in hands]
        if len(ranks) != expected:
            log.warning("kvstore: %d of %d ranks said who they are; nothing will be loaded.", len(ranks), expected)
            return
        self._scheduler.know_ranks(ranks, max(hand.block_bytes for hand in hands))

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The engine's blocks, some of which may have to leave its prefix cache."""
        self._block_pool = gpu_block_pool

    @shielded()
    def on_new_request(self, request: Any) -> None:
        """Begin the lookup of a new request."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @shielded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of a prompt can be loaded; None while that is not known."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The engine allocated blocks, perhaps for a load.

        Not shielded: if a promise were forgotten here, the engine would wait for it, or compute on blocks that nobody
        fills. It only reads ids and writes two fields.
        """
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Which tier the promised tokens come from, for vLLM's own metrics."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource as Source

        names = {TierCode.HOST: Source.HOST, TierCode.DISK: Source.DISK}
        try:
            out: dict[Any, int] = {}
            tiers = self._scheduler.sources(request, num_external_tokens) if self._scheduler is not None else {}
            for tier, tokens in tiers.items():
                source = names.get(tier, Source.EXTERNAL_UNSPECIFIED)
                out[source] = out.get(source, 0) + tokens
            return out
        except Exception:
            report_defect("naming cache hit sources")
            return {Source.EXTERNAL_UNSPECIFIED: num_external_tokens} if num_external_tokens else {}

    @shielded(ConnectorMeta)
    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMeta:
        """The workers' part in this step."""
        if self._scheduler is None:
            return ConnectorMeta()
        return self._scheduler.plan(scheduler_output)

    @shielded()
    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers report of a step."""
        if self._scheduler is None:
            return
        if connector_output.invalid_block_ids:
            spoiled = self._scheduler.failed(set(connector_output.invalid_block_ids))
            # The engine put them into its prefix cache before they were loaded, and would leave them there should their
            # request end before it has computed them again.
            if spoiled and self._block_pool is not None:
                self._block_pool.evict_blocks(spoiled)
        report = getattr(connector_output, "kv_connector_worker_meta", None)
        report = report if isinstance(report, Report) else None
        if report is not None:
            self._scheduler.confirmed(report)
        self._scheduler.ended(report, connector_output.finished_recving or ())

    @shielded(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended; its blocks may be freed at once."""
        if self._scheduler is None:
            return False, None
        report = self._blends.report(request.request_id)
        self._scheduler.finished(request)
        return False, None if report is None else {NAME: report}

    @shielded(lambda: False)
    def reset_cache(self) -> bool:
        """The engine's caches are reset together with ours: its weights may have changed."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # -- worker --------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn how the cache is laid out. May refuse, as the engine is only starting."""
        if self._worker is not None:
            self._worker.register(kv_caches, _rank())

    @shielded()
    def get_handshake_metadata(self) -> Handshake | None:
        """This rank's namespace, for the scheduler."""
        return None if self._worker is None else self._worker.handshake()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        self._meta = connector_metadata if isinstance(connector_metadata, ConnectorMeta) else None
        if self._worker is not None and self._meta is not None:
            self._worker.begin(self._meta)

    def clear_connector_metadata(self) -> None:
        """A step has ended."""
        super().clear_connector_metadata()
        self._meta = None

    @shielded()
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's loads."""
        if self._worker is not None and self._meta is not None:
            self._worker.start_loads(self._meta)

    def has_connector_metadata(self) -> bool:
        """Whether attention has to come here with each layer: never, since blocks are whole before and after it."""
        return False

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are whole before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do by layer: blocks are stored whole after the forward pass."""

    @shielded()
    def wait_for_save(self) -> None:
        """Store what became full in this step."""
        if self._worker is not None and self._meta is not None:
            self._worker.save(self._meta)

    @shielded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended."""
        if self._worker is None:
            return None, None
        return None, self._worker.take_finished(self._meta) or None

    @shielded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Engine blocks that have to be recomputed."""
        return set() if self._worker is None else self._worker.take_failed()

    @shielded()
    def build_connector_worker_meta(self) -> Report | None:
        """What the scheduler's side has to know of this step."""
        return None if self._worker is None else self._worker.take_report()

    # -- both ----------------------------------------------------------------------------------------------------------

    @shielded()
    def get_kv_connector_stats(self) -> KVStoreStats | None:
        """Counters since the last call."""
        tally = self._worker.tally if self._worker is not None else self._tally
        counts = tally.drain()
        return KVStoreStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStoreStats:
        """Counters that came from another process."""
        return KVStoreStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> KVStorePromMetrics:
        """Prometheus metrics."""
        return KVStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @shielded()
    def shutdown(self) -> None:
        """End threads and connections."""
        if self._worker is not None:
            self._worker.close()
        else:
            self._breaker.close()
            self._lookups.close()
            self._blends.close()
            self._link.close()


def _rank() -> tuple[int, int]:
    """(pipeline rank, tensor rank) of this worker."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_pp_group().rank_in_group, get_tp_group().rank_in_group
