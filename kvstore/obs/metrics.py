"""The Prometheus metrics: one table, read from the daemon's snapshot when somebody scrapes.

`TABLE` is the whole truth. `/metrics` and `docs/metrics.md` are made from it; nothing is counted here. Ratios are not
exported: divide rates in PromQL, where the window is the reader's choice. Write `docs/metrics.md` anew with
``python -m kvstore.obs.metrics > docs/metrics.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from kvstore.obs import Snapshot, count, namespaces, number, numbers, part

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
MAX_NAMESPACES = 64
"""Above this many namespaces they are exported as one sum, so that tenants cannot fill a Prometheus server."""
MAX_LABEL = 120
"""Characters of a label value that came from a user, such as a model name."""
BREAKER_STATES = ("closed", "half_open", "open")
_NS = ("domain", "ns")
_ABOUT = ("model", "dtype", "tp_rank", "tp_size", "lora")

Labels = tuple[str, ...]
Sample = tuple[Labels, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the values of a metric are taken out of a snapshot.

    Attributes
    ----------
    labels : tuple of str
        Label names, in the order in which `samples` gives their values.
    source : str
        Where in the snapshot the values stand, for the docs.
    samples : callable
        Gives (label values, value) of a snapshot. A histogram's value is (buckets, sum).
    """

    labels: Labels
    source: str
    samples: Callable[[Snapshot], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: its full name (``_total`` on counters), type (gauge, counter or histogram), help and reading."""

    name: str
    type: str
    help: str
    reading: Reading


# -- ways to read ------------------------------------------------------------------------------------------------------


def _one(*path: str) -> Reading:
    """A single number without labels; absent from the exposition where the snapshot has none."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        value = number(snapshot, *path)
        if value is not None:
            yield (), value

    return Reading((), ".".join(path), samples)


def _each(name: str, label: str) -> Reading:
    """A mapping of label value to number."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for each, value in numbers(snapshot, name).items():
            yield (each,), value

    return Reading((label,), f"{name}.*", samples)


def _tiers(*path: str) -> Reading:
    """The same number of each tier that has it."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            value = number(state, *path)
            if value is not None:
                yield (tier,), value

    return Reading(("tier",), "tiers.*." + ".".join(path), samples)


def _tiers_split(label: str, fields: dict[str, str]) -> Reading:
    """Several numbers of each tier, told apart by a second label; `fields` maps its values to names in the snapshot."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, state in part(snapshot, "tiers").items():
            for each, name in fields.items():
                value = number(state, name)
                if value is not None:
                    yield (tier, each), value

    return Reading(("tier", label), "tiers.*.{" + ",".join(fields.values()) + "}", samples)


def _dropped(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        for reason, value in numbers(state, "dropped").items():
            yield (tier, reason), value


def _breakers(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, state in part(snapshot, "tiers").items():
        now = part(state, "breaker").get("state")
        if now is not None:
            for each in BREAKER_STATES:
                yield (tier, each), float(str(now).replace("-", "_") == each)


def _outcomes(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        errors = count(state, "errors")
        yield (verb, "ok"), max(0, count(state, "count") - errors)
        yield (verb, "error"), errors


def _latencies(snapshot: Snapshot) -> Iterator[Sample]:
    for verb, state in part(snapshot, "requests").items():
        buckets = [(f"{le:g}", below) for le, below in _buckets(state) if math.isfinite(le)]
        yield (verb,), ([*buckets, ("+Inf", count(state, "count"))], count(state, "seconds"))


def _buckets(state: Any) -> Iterator[tuple[float, float]]:
    """Pairs of (upper bound in seconds, requests at or below it); a list of anything else counts as no buckets."""
    listed = part(state).get("buckets")
    for pair in listed if isinstance(listed, (list, tuple)) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            yield float(pair[0]), float(pair[1])


def _policies(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, policy in part(snapshot, "policies").items():
        yield (_short(tier), _short(policy)), 1


def _version(snapshot: Snapshot) -> Iterator[Sample]:
    yield (_short(snapshot.get("version", "unknown")),), 1


def _short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text[:MAX_LABEL]


def _digest(namespace: Mapping[str, Any]) -> str:
    return _short(namespace.get("digest", "unknown"))[:12]


def _owner(snapshot: Snapshot) -> Callable[[Mapping[str, Any]], Labels]:
    """How namespaces are told apart in this scrape: one by one, or not at all where there are too many."""
    if len(namespaces(snapshot)) > MAX_NAMESPACES:
        return lambda namespace: ("all", "all")
    return lambda namespace: (_short(namespace.get("domain", "")), _digest(namespace))


def _spaces(name: str) -> Reading:
    """A number of each namespace."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            yield owner(each), count(each, name)

    return Reading(_NS, f"namespaces[].{name}", samples)


def _spaces_by_tier(name: str) -> Reading:
    """A number of each namespace and tier."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            for tier, value in numbers(each, name).items():
                yield (*owner(each), tier), value

    return Reading((*_NS, "tier"), f"namespaces[].{name}.*", samples)


def _space_info(snapshot: Snapshot) -> Iterator[Sample]:
    if len(namespaces(snapshot)) <= MAX_NAMESPACES:
        owner = _owner(snapshot)
        for each in namespaces(snapshot):
            about = (_short(each.get(name, "")) for name in _ABOUT)
            yield (*owner(each), *about), 1


def _space_count(snapshot: Snapshot) -> Iterator[Sample]:
    yield (), len(namespaces(snapshot))


def _partitions(name: str) -> Reading:
    """A number of each partition of each tier; there are at most as many as rules."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for tier, partitions in part(snapshot, "quotas").items():
            for rule, state in part(partitions).items():
                yield (tier, rule or "none"), count(state, name)

    return Reading(("tier", "rule"), f"quotas.*.*.{name}", samples)


def _quota_evictions(snapshot: Snapshot) -> Iterator[Sample]:
    for tier, by, victim, blocks in snapshot.get("quota_evictions", ()):
        yield (tier, by or "none", victim or "none"), blocks


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
    _gauge("build_info", Reading(("version",), "version", _version), "Always 1; the version is in the label."),
    _gauge("uptime_seconds", _one("uptime_s"), "Time since the daemon started."),
    _gauge("ready", _one("ready"), "1 when the daemon serves, 0 while it starts or drains."),
    _gauge("draining", _one("draining"), "1 while the daemon finishes before it stops."),
    _gauge("sessions", _one("sessions"), "Connected clients."),
    _gauge("leases", _one("leases"), "Rights to read that are held now."),
    _gauge("reservations", _one("reservations"), "Rights to fill that are held now."),
    _counter("expired_leases", _one("leases_expired"), "Leases and reservations that ran out of time."),
    _counter("refused_connections", _one("refused_connections"), "Connections refused before their first request."),
    _counter("requests", Reading(("verb", "outcome"), "requests.*.{count,errors}", _outcomes), "Requests answered."),
    Row(
        "kvstore_request_seconds",
        "histogram",
        "Time from a request's arrival to its reply.",
        Reading(("verb",), "requests.*.{seconds,count,buckets}", _latencies),
    ),
    _counter("errors", _each("errors", "code"), "Errors sent to clients, by code."),
    _counter("asked_blocks", _one("asked_blocks"), "Blocks that clients asked for."),
    _counter("hit_blocks", _each("hit_blocks", "tier"), "Blocks handed out, by the tier they were found in."),
    _counter("missed_blocks", _each("missed", "reason"), "Blocks asked for and not handed out, by reason."),
    _counter("hit_tokens", _one("hit_tokens"), "Tokens in blocks handed out."),
    _counter("wanted_blocks", _one("reuse", "wanted"), "Blocks handed out, and blocks offered since computed."),
    _counter("reusable_blocks", _one("reuse", "reusable"), "Estimate: wanted blocks that had been wanted before."),
    _counter("saved_tokens", _one("saved", "tokens"), "Tokens served instead of computed; ranks share one count."),
    _gauge("saved_prefill_seconds", _one("saved", "seconds"), "Estimate: at least how long computing those takes."),
    _counter("unstored_blocks", _each("not_stored", "reason"), "Blocks offered and not taken, by reason."),
    _gauge(
        "tier_policy_info",
        Reading(("tier", "policy"), "policies.*", _policies),
        "Always 1; the eviction policy of a tier is in the label.",
    ),
    _gauge("tier_capacity_bytes", _tiers("capacity"), "Byte budget of a tier."),
    _gauge(
        "tier_bytes",
        _tiers_split("state", _STATES),
        "Bytes of a tier by state. Used is what it takes of the machine, free is room left for blocks; the states "
        "overlap: do not add.",
    ),
    _gauge("tier_blocks", _tiers("blocks"), "Blocks in a tier."),
    _gauge("tier_slabs", _tiers("slabs"), "Memory slabs of a tier."),
    _gauge("tier_huge_pages", _tiers("huge_pages"), "1 when the tier's memory is in huge pages."),
    _gauge("tier_direct_io", _tiers("direct_io"), "1 when the tier reads and writes with O_DIRECT."),
    _gauge("tier_recovered_blocks", _tiers("recovered_blocks"), "Blocks of a tier that were found again at start."),
    _gauge("tier_recover_seconds", _tiers("recover_s"), "Time that a tier took at start to find its blocks again."),
    _counter("tier_events", _tiers_split("event", _EVENTS), "What happened to blocks in a tier."),
    _counter(
        "tier_dropped_blocks",
        Reading(("tier", "reason"), "tiers.*.dropped.*", _dropped),
        "Blocks offered to a tier and not stored, by reason.",
    ),
    _counter("tier_read_bytes", _tiers("bytes_read"), "Payload bytes read from a tier."),
    _counter("tier_written_bytes", _tiers("bytes_written"), "Payload bytes written to a tier."),
    _counter("tier_read_seconds", _tiers("read_s"), "Time spent reading from a tier."),
    _counter("tier_write_seconds", _tiers("write_s"), "Time spent writing to a tier."),
    _gauge(
        "breaker_state",
        Reading(("tier", "state"), "tiers.*.breaker.state", _breakers),
        "1 for the state that a tier's circuit breaker is in, 0 for the others.",
    ),
    _gauge("breaker_failures", _tiers("breaker", "failures"), "Failures that a tier's circuit breaker has counted."),
    _gauge("write_behind_blocks", _one("queue", "blocks"), "Blocks on their way to lower tiers."),
    _gauge("write_behind_bytes", _one("queue", "bytes"), "Bytes on their way to lower tiers."),
    _gauge("prefetch_blocks", _one("prefetch", "blocks"), "Blocks to be brought up once nobody waits for others."),
    _gauge("prefetch_bytes", _one("prefetch", "bytes"), "Bytes to be brought up once nobody waits for others."),
    _counter("prefetch_refused_blocks", _one("prefetch", "refused"), "Prefetches not taken because so many wait."),
    _counter("kept_out_blocks", _tiers("kept_out"), "Blocks that a tier did not take at their first sighting."),
    _gauge("chunks", _one("chunks", "chunks"), "Chunks that are found by their tokens."),
    _gauge("chunk_variants", _one("chunks", "variants"), "Their variants, each computed in another context."),
    _gauge("chunk_index_bytes", _one("chunks", "bytes"), "Memory of the index of chunks."),
    _counter("chunk_variants_replaced", _one("chunks", "replaced"), "Variants that gave their place to another."),
    _counter("chunk_variants_forgotten", _one("chunks", "forgotten"), "Variants whose place in the index was needed."),
    _gauge("event_waiters", _one("events", "waiting"), "Subscribers that wait for the next event."),
    _counter("events", _one("events", "logged"), "Blocks that came into a tier or left one while somebody subscribed."),
    _counter("events_sent", _one("events", "sent"), "Events told to subscribers, one a block."),
    _counter("event_gaps", _one("events", "gaps"), "Subscribers that fell behind the events kept."),
    _counter("event_snapshots", _one("events", "snapshots"), "Snapshots begun for subscribers."),
    _gauge("event_peers", _one("event_exchange", "peers"), "Other daemons that share events and are there."),
    _gauge("event_peers_believed", _one("event_exchange", "believed"), "Those of whom nothing was missed."),
    _counter("event_entries_published", _one("event_exchange", "published"), "Entries added to our stream in Redis."),
    _counter("event_entries_followed", _one("event_exchange", "followed"), "Entries read from streams of others."),
    _counter("event_entries_missed", _one("event_exchange", "missed"), "Holes found in streams of others."),
    _counter("event_entries_garbage", _one("event_exchange", "garbage"), "Entries and cards that made no sense."),
    _counter("event_exchange_failures", _one("event_exchange", "failures"), "Times that sharing events broke off."),
    _gauge("namespaces", Reading((), "namespaces", _space_count), "Namespaces known."),
    _counter("tier_refused_pins", _tiers("pins_refused"), "Pins refused because so much is pinned already."),
    _gauge("quota_bytes", _partitions("bytes"), "Bytes held under a rule about quotas; `none` is without a rule."),
    _gauge("quota_blocks", _partitions("blocks"), "Blocks held under a rule."),
    _gauge("quota_guarantee_bytes", _partitions("guarantee"), "Bytes that others cannot take from a rule."),
    _gauge("quota_limit_bytes", _partitions("limit"), "The most bytes a rule may have; 0 is no limit."),
    _counter("quota_expired_blocks", _partitions("expired"), "Blocks forgotten because a rule's time was over."),
    _counter(
        "quota_evicted_blocks",
        Reading(("tier", "by", "rule"), "quota_evictions", _quota_evictions),
        "Blocks evicted from those under a rule, by the rule of who needed the room.",
    ),
    _gauge(
        "namespace_info",
        Reading((*_NS, *_ABOUT), "namespaces[]", _space_info),
        f"Always 1; joins a namespace to its model. Absent above {MAX_NAMESPACES} namespaces.",
    ),
    _gauge("namespace_blocks", _spaces_by_tier("blocks"), "Blocks of a namespace in a tier."),
    _gauge("namespace_bytes", _spaces_by_tier("bytes"), "Bytes of a namespace in a tier."),
    _counter("namespace_asked_blocks", _spaces("asked"), "Blocks asked for in a namespace."),
    _counter("namespace_hit_blocks", _spaces_by_tier("hit"), "Blocks handed out in a namespace, by tier."),
    _counter("namespace_stored_blocks", _spaces("stored"), "Blocks stored in a namespace."),
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
            histogram.add_metric([_short(value) for value in labels], buckets=buckets, sum_value=total)
        return histogram
    # Two sources of one series (namespaces summed, or digests with the same head) are added, since Prometheus refuses
    # doubles. An info series says 1 however often it was named.
    sums: dict[Labels, float] = {}
    for labels, value in row.reading.samples(snapshot):
        key = tuple(_short(value) for value in labels)
        sums[key] = 1 if row.name.endswith("_info") else sums.get(key, 0) + value
    family = (CounterMetricFamily if row.type == "counter" else GaugeMetricFamily)(
        row.name, row.help, labels=row.reading.labels
    )
    for key, value in sums.items():
        family.add_metric(list(key), float(value))
    return family


def markdown() -> str:
    """The text of ``docs/metrics.md``."""
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


if __name__ == "__main__":
    print(markdown(), end="")
