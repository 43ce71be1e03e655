"""What the connector counted, in the shapes that vLLM reports: log lines and Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS: dict[str, str] = {
    "lookups": "Prompts that were looked up.",
    "lookup_late": "Lookups that were not answered before their deadline and counted as a miss.",
    "asked_tokens": "Tokens of prompts that were looked up.",
    "hit_tokens_host": "Tokens promised to the engine from the daemon's memory.",
    "hit_tokens_disk": "Tokens promised to the engine from disk.",
    "hit_tokens_redis": "Tokens promised to the engine from Redis.",
    "loaded_blocks": "Blocks copied into the engine's cache.",
    "loaded_bytes": "Bytes copied into the engine's cache.",
    "load_seconds": "Time spent on loads, waiting included.",
    "load_failures": "Loads of which a part had to be recomputed.",
    "recomputed_tokens": "Tokens promised, not delivered, and recomputed.",
    "load_given_up": "Loads that did not pay any more: what had come was used, the rest recomputed.",
    "choice_load": "Prompts of which all that the daemon had was loaded.",
    "choice_part": "Prompts of which a part was loaded, since computing the rest is faster.",
    "choice_recompute": "Prompts that were computed though the daemon had some of it, since that is faster.",
    "chosen_recompute_tokens": "Tokens that the daemon had and that were computed, since that is faster.",
    "load_forecast_seconds": "Time that loads were expected to take.",
    "load_actual_seconds": "Time that the same loads took.",
    "first_token_forecast_seconds": "Time to the first token that was expected when load or recompute was decided.",
    "first_token_actual_seconds": "Time to the first token of the same prompts.",
    "regret_seconds": "Time by which first tokens came later than the other choice was expected to bring them.",
    "gained_seconds": "Time by which first tokens came sooner than the other choice was expected to bring them.",
    "load_missing": "Blocks that were gone when they were to be loaded.",
    "load_corrupt": "Blocks that were found damaged and recomputed.",
    "load_expired": "Leases that ran out or were lost before the copy was finished.",
    "load_wrong_size": "Blocks refused because they are not of this engine's size, nor encoded by its chain.",
    "blend_searches": "Prompts in which chunks were looked for.",
    "blend_prompts": "Prompts that were to be put together from chunks.",
    "blended_tokens": "Tokens of these, without what was exact in front.",
    "blend_computed_tokens": "Tokens of these that were computed.",
    "blend_reused_tokens": "Tokens of these that were taken from chunks as they are.",
    "blend_seconds": "Time spent on putting prompts together.",
    "blend_failures": "Prompts that could not be put together and were computed.",
    "blend_chunk_missing": "Chunks that were gone when they were to be loaded.",
    "blend_wrong_tokens": "Chunks refused because their tokens are not those of the prompt.",
    "blend_too_long": "Prompts too long to be put together in the memory set aside for it.",
    "blend_no_memory": "Prompts that were computed since the device had no memory to put them together in.",
    "blend_not_worth": "Prompts of which chunks cover too little.",
    "blend_slower": "Prompts that are computed since blending them was expected to take longer.",
    "blend_gate_closed": "Prompts not put together because the probe of this model has not passed.",
    "blend_bad_request": "Requests whose kv_transfer_params were not understood; they were computed.",
    "captured_chunks": "Chunks stored out of prompts that were computed.",
    "captured_tokens": "Tokens of these.",
    "saved_blocks": "Blocks stored.",
    "saved_bytes": "Bytes stored.",
    "save_seconds": "Time spent on saves.",
    "save_exists": "Blocks offered that were there already.",
    "save_dropped": "Blocks that the daemon had no room for, or lost.",
    "save_overtaken": "Blocks that the engine used again before they could be copied.",
    "save_unencodable": "Blocks with values that the chain set by `chain` cannot say; they were not stored.",
    "save_unreachable": "Blocks not stored since the daemon did not answer.",
    "save_after_failed_load": "Blocks not stored since their context failed to load.",
    "outages": "Times the daemon was lost.",
    "skipped_lookup": "Lookups skipped while the daemon was not to be had.",
    "skipped_load": "Loads skipped while the daemon was not to be had.",
    "skipped_save": "Saves skipped while the daemon was not to be had.",
    "failed_lookup": "Lookups that ended in an error.",
    "failed_load": "Loads that ended in an error.",
    "skipped_search": "Searches for chunks skipped while the daemon was not to be had.",
    "failed_search": "Searches for chunks that ended in an error.",
    "skipped_blend": "Prompts whose chunks could not be loaded while the daemon was not to be had.",
    "failed_blend": "Prompts whose chunks could not be loaded for an error.",
    "skipped_prefetch": "Probes of a tier's speed skipped while the daemon was not to be had.",
    "failed_prefetch": "Probes of a tier's speed that ended in an error.",
    "skipped_ahead": "Looks for memory to pin ahead skipped while the daemon was not to be had.",
    "failed_ahead": "Looks for memory to pin ahead that ended in an error.",
    "failed_save": "Saves that ended in an error.",
}
"""Every counter, with its meaning. What is not here is not exported."""


@dataclass
class KVStoreStats(KVConnectorStats):
    """Counters of one interval: `data` maps their names to sums."""

    def reset(self) -> None:
        """Begin a new interval."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another process's counters."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval as vLLM logs it."""
        return {name: round(value, 3) for name, value in sorted(self.data.items()) if value}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class KVStorePromMetrics(KVConnectorPromMetrics):
    """`vllm:kvstore_*_total`, one counter for each of `COUNTERS`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        counter = metric_types[Counter]
        for name, documentation in COUNTERS.items():
            metric = counter(name=f"vllm:kvstore_{name}", documentation=documentation, labelnames=labelnames)
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval."""
        for name, value in transfer_stats_data.items():
            by_engine = self._counters.get(name)
            if by_engine is not None and value > 0:
                by_engine[engine_idx].inc(value)
