"""The Prometheus metrics: one table, read from the daemon's snapshot when somebody scrapes.

`TABLE` is the whole truth. `/metrics` and `docs/metrics.md` are made from it; nothing is counted here. Ratios are not
exported: divide rates in PromQL, where the window is the reader's choice. ``python -m kvstore.cli.docs`` writes the
page anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from kvstore.obs import Snapshot
from kvstore.obs import readings as r
from kvstore.obs.readings import MAX_NAMESPACES, Labels, Reading

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: its full name (``_total`` on counters), type (gauge, counter or histogram), help and reading."""

    name: str
    type: str
    help: str
    reading: Reading


# -- the table ---------------------------------------------------------------------------------------------------------

_STATES = {
    "used": "used",
    "free": "free",
    "leased": "leased_bytes",
    "dirty": "dirty_bytes",
    "pinned": "pinned_bytes",
    "writing": "writing_bytes",
    "dropping": "dropping_bytes",
    "index": "index_bytes",
    "quarantined": "quarantined_bytes",
}
_EVENTS = {
    "hit": "hits",
    "miss": "misses",
    "stored": "stored",
    "exists": "exists",
    "evicted": "evicted",
    "corrupt": "corrupt",
}


def _gauge(name: str, reading: Reading, text: str) -> Row:
    return Row(f"kvstore_{name}", "gauge", text, reading)


def _counter(name: str, reading: Reading, text: str) -> Row:
    return Row(f"kvstore_{name}_total", "counter", text, reading)


TABLE: tuple[Row, ...] = (
    _gauge("build_info", Reading(("version",), "version", r.version), "Always 1; the version is in the label."),
    _gauge("uptime_seconds", r.one("uptime_s"), "Time since the daemon started."),
    _gauge("ready", r.one("ready"), "1 when the daemon serves, 0 while it starts or drains."),
    _gauge("draining", r.one("draining"), "1 while the daemon finishes before it stops."),
    _gauge("sessions", r.one("sessions"), "Connected clients."),
    _gauge("leases", r.one("leases"), "Rights to read that are held now."),
    _gauge("reservations", r.one("reservations"), "Rights to fill that are held now."),
    _counter("expired_leases", r.one("leases_expired"), "Leases and reservations that ran out of time."),
    _counter("refused_connections", r.one("refused_connections"), "Connections refused before their first request."),
    _counter("requests", Reading(("verb", "outcome"), "requests.*.{count,errors}", r.outcomes), "Requests answered."),
    Row(
        "kvstore_request_seconds",
        "histogram",
        "Time from a request's arrival to its reply.",
        Reading(("verb",), "requests.*.{seconds,count,buckets}", r.latencies),
    ),
    _counter("errors", r.by_label("errors", "code"), "Errors sent to clients, by code."),
    _counter("asked_blocks", r.one("asked_blocks"), "Blocks that clients asked for."),
    _counter("hit_blocks", r.by_label("hit_blocks", "tier"), "Blocks handed out, by the tier they were found in."),
    _counter("missed_blocks", r.by_label("missed", "reason"), "Blocks asked for and not handed out, by reason."),
    _counter("hit_tokens", r.one("hit_tokens"), "Tokens in blocks handed out."),
    _counter("wanted_blocks", r.one("reuse", "wanted"), "Blocks handed out, and blocks offered since computed."),
    _counter("reusable_blocks", r.one("reuse", "reusable"), "Estimate: wanted blocks that had been wanted before."),
    _counter("saved_tokens", r.one("saved", "tokens"), "Tokens served instead of computed; ranks share one count."),
    _gauge(
        "saved_prefill_seconds",
        r.one("saved", "seconds"),
        "Estimate: how long computing those takes at the fastest seen.",
    ),
    _counter("unstored_blocks", r.by_label("not_stored", "reason"), "Blocks offered and not taken, by reason."),
    _gauge(
        "tier_policy_info",
        Reading(("tier", "policy"), "policies.*", r.policies),
        "Always 1; the eviction policy of a tier is in the label.",
    ),
    _gauge("tier_capacity_bytes", r.tiers("capacity"), "Byte budget of a tier."),
    _gauge(
        "tier_bytes",
        r.tiers_split("state", _STATES),
        "Bytes of a tier by state. Used is what it takes of the machine, free is room left for blocks; the states "
        "overlap: do not add.",
    ),
    _gauge("tier_blocks", r.tiers("blocks"), "Blocks in a tier."),
    _gauge("tier_slabs", r.tiers("slabs"), "Memory slabs of a tier."),
    _gauge("tier_huge_pages", r.tiers("huge_pages"), "1 when the tier's memory is in huge pages."),
    _gauge("tier_direct_io", r.tiers("direct_io"), "1 when the tier reads and writes with O_DIRECT."),
    _gauge("tier_recovered_blocks", r.tiers("recovered_blocks"), "Blocks of a tier that were found again at start."),
    _gauge("tier_recover_seconds", r.tiers("recover_s"), "Time that a tier took at start to find its blocks again."),
    _counter("tier_events", r.tiers_split("event", _EVENTS), "What happened to blocks in a tier."),
    _counter(
        "tier_dropped_blocks",
        Reading(("tier", "reason"), "tiers.*.dropped.*", r.dropped),
        "Blocks offered to a tier and not stored, by reason.",
    ),
    _counter("tier_read_bytes", r.tiers("bytes_read"), "Payload bytes read from a tier."),
    _counter("tier_written_bytes", r.tiers("bytes_written"), "Payload bytes written to a tier."),
    _counter("tier_read_seconds", r.tiers("read_s"), "Time spent reading from a tier."),
    _counter("tier_write_seconds", r.tiers("write_s"), "Time spent writing to a tier."),
    _gauge("codec_blocks", r.chains("held", "blocks"), "Encoded blocks in a tier, by rung: chain and planes."),
    _gauge("codec_stored_bytes", r.chains("held", "stored_bytes"), "Bytes that encoded blocks take."),
    _gauge("codec_logical_bytes", r.chains("held", "logical_bytes"), "Bytes that these blocks have decoded."),
    _counter("codec_encoded_blocks", r.chains("since_start", "blocks"), "Blocks encoded, by rung."),
    _gauge("codec_can_step_blocks", r.tiers("codecs", "can_step"), "Blocks that can become smaller yet."),
    _counter("codec_steps", r.tiers("codecs", "stepped_down"), "Times that a block was made smaller to make room."),
    _counter("codec_freed_bytes", r.tiers("codecs", "bytes_freed"), "Bytes that this has freed."),
    _counter("codec_taken_over_blocks", r.tiers("codecs", "taken_over"), "Blocks replaced by a better copy."),
    _counter("codec_lost_blocks", r.tiers("codecs", "lost_stepping"), "Blocks lost on the way; 0 where all is well."),
    _counter("codec_undecodable_blocks", r.tiers("codecs", "undecodable"), "Blocks of a chain or profile not here."),
    _counter("codec_unweighed_blocks", r.tiers("codecs", "without_importance"), "Blocks that passed over rungs."),
    _counter("codec_busy_seconds", r.tiers("codecs", "busy_s"), "Time that codec threads worked, waits included."),
    _gauge(
        "breaker_state",
        Reading(("tier", "state"), "tiers.*.breaker.state", r.breakers),
        "1 for the state that a tier's circuit breaker is in, 0 for the others.",
    ),
    _gauge("breaker_failures", r.tiers("breaker", "failures"), "Failures that a tier's circuit breaker has counted."),
    _gauge("write_behind_blocks", r.one("queue", "blocks"), "Blocks on their way to lower tiers."),
    _gauge("write_behind_bytes", r.one("queue", "bytes"), "Bytes on their way to lower tiers."),
    _gauge("prefetch_blocks", r.one("prefetch", "blocks"), "Blocks to be brought up once nobody waits for others."),
    _gauge("prefetch_bytes", r.one("prefetch", "bytes"), "Bytes to be brought up once nobody waits for others."),
    _counter("prefetch_refused_blocks", r.one("prefetch", "refused"), "Prefetches not taken because so many wait."),
    _counter("kept_out_blocks", r.tiers("kept_out"), "Blocks that a tier did not take at their first sighting."),
    _gauge("chunks", r.one("chunks", "chunks"), "Chunks that are found by their tokens."),
    _gauge("chunk_variants", r.one("chunks", "variants"), "Their variants, each computed in another context."),
    _gauge("chunk_index_bytes", r.one("chunks", "bytes"), "Memory of the index of chunks."),
    _counter("chunk_variants_replaced", r.one("chunks", "replaced"), "Variants that gave their place to another."),
    _counter("chunk_variants_forgotten", r.one("chunks", "forgotten"), "Variants whose place in the index was needed."),
    _gauge(
        "profile_rungs",
        Reading(("profile", "gate"), "profiles[].rungs[].passed", r.rungs),
        "Rungs of a profile, by what the gate says of them.",
    ),
    _counter("blended_prompts", r.blended("prompts"), "Prompts that engines put together from chunks, as they report."),
    _counter("blended_tokens", r.blended("tokens"), "Tokens of these behind what was exact in front."),
    _counter("blended_computed_tokens", r.blended("computed"), "Tokens of these that were computed."),
    _gauge(
        "blend_gate_passed",
        Reading(r.NS, "blends[].verdict", r.gates),
        "1 if the probe of this namespace's model passed, 0 if not; absent where no engine told.",
    ),
    _gauge("event_waiters", r.one("events", "waiting"), "Subscribers that wait for the next event."),
    _counter(
        "events", r.one("events", "logged"), "Blocks that came into a tier or left one while somebody subscribed."
    ),
    _counter("events_sent", r.one("events", "sent"), "Events told to subscribers, one a block."),
    _counter("event_gaps", r.one("events", "gaps"), "Subscribers that fell behind the events kept."),
    _counter("event_snapshots", r.one("events", "snapshots"), "Snapshots begun for subscribers."),
    _gauge("event_peers", r.one("event_exchange", "peers"), "Other daemons that share events and are there."),
    _gauge("event_peers_believed", r.one("event_exchange", "believed"), "Those of whom nothing was missed."),
    _counter("event_entries_published", r.one("event_exchange", "published"), "Entries added to our stream in Redis."),
    _counter("event_entries_followed", r.one("event_exchange", "followed"), "Entries read from streams of others."),
    _counter("event_entries_missed", r.one("event_exchange", "missed"), "Holes found in streams of others."),
    _counter("event_entries_garbage", r.one("event_exchange", "garbage"), "Entries and cards that made no sense."),
    _counter("event_exchange_failures", r.one("event_exchange", "failures"), "Times that sharing events broke off."),
    _gauge("namespaces", Reading((), "namespaces", r.space_count), "Namespaces known."),
    _counter("tier_refused_pins", r.tiers("pins_refused"), "Pins refused because so much is pinned already."),
    _gauge("quota_bytes", r.partitions("bytes"), "Bytes held under a rule about quotas; `none` is without a rule."),
    _gauge("quota_blocks", r.partitions("blocks"), "Blocks held under a rule."),
    _gauge("quota_guarantee_bytes", r.partitions("guarantee"), "Bytes that others cannot take from a rule."),
    _gauge("quota_limit_bytes", r.partitions("limit"), "The most bytes a rule may have; 0 is no limit."),
    _counter("quota_expired_blocks", r.partitions("expired"), "Blocks forgotten because a rule's time was over."),
    _counter(
        "quota_evicted_blocks",
        Reading(("tier", "by", "rule"), "quota_evictions", r.quota_evictions),
        "Blocks evicted from those under a rule, by the rule of who needed the room.",
    ),
    _gauge(
        "namespace_info",
        Reading((*r.NS, *r.ABOUT), "namespaces[]", r.space_info),
        f"Always 1; joins a namespace to its model. Absent above {MAX_NAMESPACES} namespaces.",
    ),
    _gauge("namespace_blocks", r.spaces_by_tier("blocks"), "Blocks of a namespace in a tier."),
    _gauge("namespace_bytes", r.spaces_by_tier("bytes"), "Bytes of a namespace in a tier."),
    _counter("namespace_asked_blocks", r.spaces("asked"), "Blocks asked for in a namespace."),
    _counter("namespace_hit_blocks", r.spaces_by_tier("hit"), "Blocks handed out in a namespace, by tier."),
    _counter("namespace_stored_blocks", r.spaces("stored"), "Blocks stored in a namespace."),
)


# -- exposition --------------------------------------------------------------------------------------------------------


class SnapshotCollector(Collector):
    """Prometheus collector that asks for one snapshot a scrape, so all numbers of a scrape belong together."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        """Nothing: without this, registering would already take a snapshot."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric of the table."""
        snapshot = self._snapshot()
        for row in TABLE:
            yield _family(row, snapshot)


def expose(snapshot: Snapshot) -> bytes:
    """Prometheus text of a snapshot."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(lambda: snapshot))
    return generate_latest(registry)


def _family(row: Row, snapshot: Snapshot) -> Metric:
    if row.type == "histogram":
        histogram = HistogramMetricFamily(row.name, row.help, labels=row.reading.labels)
        for labels, (buckets, total) in row.reading.samples(snapshot):
            histogram.add_metric([r.short(value) for value in labels], buckets=buckets, sum_value=total)
        return histogram
    # Two sources of one series (namespaces summed, or digests with the same head) are added, since Prometheus refuses
    # doubles. An info series says 1 however often it was named.
    sums: dict[Labels, float] = {}
    for labels, value in row.reading.samples(snapshot):
        key = tuple(r.short(value) for value in labels)
        sums[key] = 1 if row.name.endswith("_info") else sums.get(key, 0) + value
    family = (CounterMetricFamily if row.type == "counter" else GaugeMetricFamily)(
        row.name, row.help, labels=row.reading.labels
    )
    for key, value in sums.items():
        family.add_metric(list(key), float(value))
    return family


def markdown() -> str:
    """The daemon's part of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Generated from the table in `kvstore/obs/metrics.py`; do not edit. `GET /metrics` gives these in Prometheus'",
        "text format, all numbers of one scrape from one instant. The last column names the field of `GET /v1/stats`",
        "that a metric is read from.",
        "",
        "Ratios are not exported. The hit rate of the last five minutes by tier is",
        "`rate(kvstore_hit_blocks_total[5m]) / ignoring(tier) group_left rate(kvstore_wanted_blocks_total[5m])`,",
        "and its ceiling `rate(kvstore_reusable_blocks_total[5m]) / rate(kvstore_wanted_blocks_total[5m])`.",
        "",
        f"`ns` is the first 12 digits of a namespace's digest. Above {MAX_NAMESPACES} namespaces `domain` and `ns` are",
        "`all`, and the values are sums.",
        "",
        "| metric | type | labels | meaning | field |",
        "|---|---|---|---|---|",
    ]
    for row in TABLE:
        labels = ", ".join(f"`{label}`" for label in row.reading.labels) or " "
        lines.append(f"| `{row.name}` | {row.type} | {labels} | {row.help} | `{row.reading.source}` |")
    return "\n".join(lines) + "\n"


NAME = re.compile(r"kvstore_[a-z]+(_[a-z]+)*")
"""What a metric may be called."""
